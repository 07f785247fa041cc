"""Options of `collect` with each other, against one plain device."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.collection.running_sums import RunningSums
from utilized_rank.products import convolution
from utilized_rank.walk.cost import peak_bytes

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
PARAMS = {
  'conv': RNG.normal(size=(3, 3, 2, 4)).astype(np.float32) / 4,
  'up': RNG.normal(size=(4, 12)).astype(np.float32) / 2,
  'down': RNG.normal(size=(12, 4)).astype(np.float32) / 3,
}
# The second batch does not divide by the devices.
BATCHES = [RNG.normal(size=(n, 5, 5, 2)).astype(np.float32) for n in (8, 6)]
DOWN = [('down', True)]
collect = functools.partial(ur.collect, progress=False)


def model(params, x):
  h = jax.lax.conv_general_dilated(
    x,
    params['conv'],
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  h = jnp.tanh(h).mean((1, 2))
  return jnp.tanh(h @ params['up']) @ params['down']


def squares(outputs, batch):
  del batch
  return (outputs**2).sum(-1)


def alone():
  return jax.sharding.Mesh(np.array(jax.devices()[:1]), ('x',))


def on_mesh(kind=AxisType.Auto):
  mesh = jax.make_mesh((2, 2), ('data', 'model'), axis_types=(kind,) * 2)
  specs = {'conv': P(), 'up': P(None, 'model'), 'down': P('model')}
  return mesh, {
    name: jax.device_put(v, NamedSharding(mesh, specs[name]))
    for name, v in PARAMS.items()
  }


FULL = dict(loss=squares, fisher_rows=True, from_outputs=DOWN)


@pytest.fixture(scope='module')
def want():
  return collect(model, PARAMS, BATCHES, mesh=alone(), **FULL)


def assert_equal(got, want, rtol=1e-6):
  assert got.table == want.table
  leaves = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  for a, b in leaves:
    # float32 sums in another order.
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def collect_by_pmap(**options):
  two = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('x',))
  copies = jax.tree.map(lambda a: np.stack([a] * 2), PARAMS)
  batches = [b.reshape(2, -1, *b.shape[1:]) for b in BATCHES]
  return collect(model, copies, batches, mesh=two, pmap_axis='i', **options)


@pytest.mark.parametrize('how', ['float32', 'compensated', 'float64'])
@pytest.mark.parametrize('where', ['devices', 'pmap', 'mesh'])
def test_everything_is_summed_everywhere(want, where, how):
  options = dict(FULL, accumulate=how)
  if where == 'devices':
    got = collect(model, PARAMS, BATCHES, **options)
  elif where == 'mesh':
    mesh, placed = on_mesh()
    got = collect(model, placed, BATCHES, mesh=mesh, **options)
  else:
    got = collect_by_pmap(**options)
  wide = np.float32 if how == 'float32' else np.float64
  assert got['up'].second.dtype == got['up'].row_fisher.dtype == wide
  assert got['down'].output_second.shape == (4, 4)
  assert_equal(got, want)


@pytest.mark.parametrize('where', ['devices', 'mesh'])
def test_a_mask_leaves_padding_out_of_all_of_it(want, where):
  """Whatever the padding holds; in strides, so that no device is left out."""
  padded = []
  for batch in BATCHES:
    wide = np.full((2 * len(batch), *batch.shape[1:]), np.nan, np.float32)
    wide[::2] = batch
    padded.append(wide)
  mask = lambda batch: np.isfinite(batch[:, 0, 0, 0])
  options = dict(FULL, mask=mask, accumulate='compensated')
  if where == 'devices':
    got = collect(model, PARAMS, padded, **options)
  else:
    mesh, placed = on_mesh()
    got = collect(model, placed, padded, mesh=mesh, **options)
  assert_equal(got, want)


@pytest.mark.parametrize('most', [1, 60, 400])
def test_patches_are_read_in_blocks_on_a_mesh(want, most, monkeypatch):
  """Blocks of a device's share of the images, not of the batch's."""
  monkeypatch.setattr(convolution, '_MOST_PATCHES', most)
  mesh, placed = on_mesh()
  got = collect(model, placed, BATCHES, mesh=mesh, **FULL)
  assert_equal(got, want)


def test_compensated_sums_do_not_drift_on_a_mesh():
  fn = lambda params, x: x @ params['w']
  batch = (30 + RNG.normal(size=(64, 4))).astype(np.float32)
  mesh = jax.make_mesh((4,), ('d',), axis_types=(AxisType.Auto,))
  w = np.eye(4, dtype=np.float32)
  placed = {'w': jax.device_put(w, NamedSharding(mesh, P('d')))}
  options = dict(mesh=mesh, accumulate='compensated')
  one = collect(fn, placed, [batch], **options)['w']
  many = collect(fn, placed, [batch] * 300, **options)['w']
  np.testing.assert_allclose(many.second, one.second, rtol=1e-12)


def test_all_of_it_is_interrupted_and_goes_on(tmp_path):
  options = dict(FULL, accumulate='compensated')
  batches = BATCHES * 2

  def killed():
    yield from batches[:3]
    raise KeyboardInterrupt

  folder = dict(checkpoint_dir=tmp_path / 'sums', checkpoint_every=2)
  with pytest.raises(KeyboardInterrupt):
    collect(model, PARAMS, killed(), **options, **folder)
  for other in (
    {'fisher_rows': False},
    {'from_outputs': None},
    {'accumulate': 'float32'},
  ):
    with pytest.raises(ValueError, match='sums of another collection'):
      collect(model, PARAMS, batches, **dict(options, **other), **folder)
  got = collect(model, PARAMS, batches, **options, **folder)
  straight = collect(model, PARAMS, batches, **options)
  jax.tree.map(np.testing.assert_array_equal, got, straight)


def test_passes_are_of_all_of_it():
  mask = lambda batch: np.arange(len(batch)) < 5
  options = dict(FULL, mask=mask)
  share = jax.ShapeDtypeStruct((2, *BATCHES[0].shape[1:]), np.float32)
  real = jax.ShapeDtypeStruct((2,), bool)
  costs = ur.plan(model, PARAMS, share, **dict(FULL, mask=real))
  plain = ur.plan(model, PARAMS, share, loss=squares, from_outputs=DOWN)
  # sum_j (dL/dW_ij)^2, a number for each row of a kernel.
  assert costs.sums_bytes - plain.sums_bytes == 4 * (18 + 4 + 12)
  limit = costs.peak_bytes - 1000
  got = collect(model, PARAMS, BATCHES, memory_limit=limit, **options)
  report = str(ur.measure(PARAMS, got, progress=False))
  assert 'collected in 2 passes over the batches' in report
  assert_equal(got, collect(model, PARAMS, BATCHES, **options))


@pytest.mark.parametrize('where', ['pmap', 'mesh'])
def test_passes_fit_the_step_that_runs_on_a_device(want, where, monkeypatch):
  found = []
  real = RunningSums.step_bytes

  def step_bytes(self, batch):
    found.append(real(self, batch))
    return found[-1]

  monkeypatch.setattr(RunningSums, 'step_bytes', step_bytes)
  run = collect_by_pmap
  if where == 'mesh':
    mesh, placed = on_mesh()
    run = functools.partial(collect, model, placed, BATCHES, mesh=mesh)
  assert_equal(run(memory_limit=10**9, **FULL), want)
  (whole,) = found
  with pytest.raises(ValueError, match='memory_limit is 1000 B'):
    run(memory_limit=1000, **FULL)
  found.clear()
  got = run(memory_limit=whole - 1, **FULL)
  assert {e.number for e in got.table} == {0, 1}
  assert_equal(got, want)
  # Each pass was compiled to fit: all, the least, and no more in collecting.
  assert found[0] == whole and found[1] < whole and len(found) == 2


def test_bytes_of_a_program_are_those_of_one_device():
  mesh = jax.make_mesh((4,), ('d',), axis_types=(AxisType.Auto,))
  of = lambda spec: jax.ShapeDtypeStruct(
    (64, 32), np.float32, sharding=NamedSharding(mesh, spec)
  )
  double = jax.jit(lambda x: 2 * x)
  size = lambda spec: peak_bytes(double.lower(of(spec)).compile())
  assert size(P()) == 2 * 4 * 64 * 32
  assert size(P('d')) == size(P()) / 4


def test_what_does_not_go_together_is_named():
  refused = lambda one, other: pytest.raises(
    ValueError, match=f'{one}.*cannot be used with.*{other}'
  )
  mesh, placed = on_mesh()
  with refused('batch_axes', 'pmap_axis'):
    collect(
      model, placed, BATCHES, mesh=mesh, batch_axes=['data'], pmap_axis='i'
    )
  mesh, placed = on_mesh(AxisType.Explicit)
  with refused('fisher_rows', 'AxisType.Explicit'):
    collect(model, placed, BATCHES, mesh=mesh, loss=squares, fisher_rows=True)
  tokens = lambda batch: np.ones(batch.shape[:2])
  dense = lambda params, x: x.mean(1) @ params['w']
  with pytest.raises(ValueError, match='fisher_rows=True .* mask= is of token'):
    collect(
      dense,
      {'w': np.eye(3, dtype=np.float32)},
      [np.ones((4, 5, 3), np.float32)],
      mask=tokens,
      loss=squares,
      fisher_rows=True,
      mesh=alone(),
    )
