"""Parameters that are spread over the caller's mesh, against one device."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.collection import running_sums
from utilized_rank.collection.devices import Sharded
from utilized_rank.moments.capture import count
from utilized_rank.moments.counting import Counting

collect = functools.partial(ur.collect, progress=False)
# Mesh, and how each parameter is spread over it.
LAYOUTS = {
  'fsdp': (
    ((4,), ('data',)),
    {'in': P(None, 'data'), 'stack': P(None, 'data'), 'out': P('data')},
  ),
  'tensor': (
    ((2, 2), ('data', 'model')),
    {
      'in': P(None, 'model'),
      'stack': P(None, 'model', None),
      'out': P('model'),
    },
  ),
}


@pytest.fixture(scope='module')
def params():
  rng = np.random.default_rng(0)
  shapes = {'in': (6, 8), 'stack': (3, 8, 8), 'out': (8, 4)}
  return {
    name: (rng.normal(size=shape) / 3).astype(np.float32)
    for name, shape in shapes.items()
  }


def batches(sizes):
  rng = np.random.default_rng(1)
  return [rng.normal(size=(n, 5, 6)).astype(np.float32) for n in sizes]


def run(params, x, gather=lambda w: w, spec=None, spec_out=None):
  """One function, with what an Explicit mesh wants to be told."""
  dot = lambda h, w, spec: jnp.einsum(
    'btd,de->bte', h, gather(w), out_sharding=spec
  )
  h = jnp.tanh(dot(x, params['in'], None))
  h, _ = jax.lax.scan(
    lambda h, w: (jnp.tanh(dot(h, w, spec)), None), h, params['stack']
  )
  return dot(h, params['out'], spec_out)


def model(layout, kind):
  if kind == AxisType.Auto:
    return run
  if layout == 'fsdp':
    return functools.partial(run, gather=lambda w: jax.reshard(w, P()))
  spec = P('data', None, 'model')
  return functools.partial(run, spec=spec, spec_out=P('data'))


def spread(params, layout, kind):
  (shape, names), specs = LAYOUTS[layout]
  mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
  return mesh, {
    name: jax.device_put(v, NamedSharding(mesh, specs[name]))
    for name, v in params.items()
  }


def squares(outputs, batch):
  del batch
  return (outputs**2).sum((1, 2))


def assert_equal(got, want):
  assert list(got) == list(want)
  for path in want:
    np.testing.assert_array_equal(got[path].count, want[path].count)
    for name in ('mean', 'second', 'grad_second', 'rows_per_example'):
      b = np.asarray(getattr(want[path], name))
      np.testing.assert_allclose(
        getattr(got[path], name), b, rtol=0, atol=1e-6 * np.abs(b).max()
      )


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_spread_parameters_give_the_same_moments(params, layout, kind):
  x = batches([8, 8, 4])
  want = collect(run, params, x, loss=squares, mesh=alone())
  mesh, placed = spread(params, layout, kind)
  got = collect(model(layout, kind), placed, x, loss=squares, mesh=mesh)
  assert_equal(got, want)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_the_mesh_that_parameters_are_spread_over_is_theirs(
  params, layout, monkeypatch
):
  """Nobody has to say it, and no device gets all of them."""
  used = []
  real = Sharded.__init__

  def init(self, values, mesh, *rest):
    used.append(mesh)
    real(self, values, mesh, *rest)

  monkeypatch.setattr(Sharded, '__init__', init)
  x = batches([8, 8, 4])
  mesh, placed = spread(params, layout, AxisType.Auto)
  got = collect(run, placed, x, loss=squares)
  assert used == [mesh]
  assert_equal(got, collect(run, params, x, loss=squares, mesh=alone()))


def test_parameters_on_several_meshes_are_refused(params):
  placed = spread(params, 'fsdp', AxisType.Auto)[1]
  placed |= {'out': spread(params, 'tensor', AxisType.Auto)[1]['out']}
  with pytest.raises(ValueError, match='spread over several meshes'):
    collect(run, placed, batches([8]))


def alone():
  return jax.sharding.Mesh(np.array(jax.devices()[:1]), ('x',))


@pytest.mark.parametrize('layout', LAYOUTS)
def test_uneven_batches_and_masks_on_spread_parameters(params, layout):
  x = batches([8, 6, 3, 1])
  mesh, placed = spread(params, layout, AxisType.Auto)
  want = collect(run, params, x, loss=squares, mesh=alone())
  assert_equal(collect(run, placed, x, loss=squares, mesh=mesh), want)
  mask = lambda batch: batch[:, :, 0] > 0
  kept = [b[i, mask(b)[i]][None] for b in x for i in range(len(b))]
  kept = [b for b in kept if b.size]
  want = collect(run, params, kept, loss=squares, mesh=alone())
  real = lambda outputs, batch: (outputs**2).sum(2) @ jnp.ones(5)
  got = collect(run, placed, x, mesh=mesh, mask=mask, loss=real)
  for path in want:
    np.testing.assert_array_equal(got[path].count, want[path].count)
    b = want[path].second
    np.testing.assert_allclose(
      got[path].second, b, rtol=0, atol=1e-6 * np.abs(b).max()
    )


def test_parameters_stay_where_they_are_and_sums_meet_once(params):
  mesh, placed = spread(params, 'fsdp', AxisType.Auto)
  names = sorted(placed)
  where = Sharded([placed[n] for n in names], mesh, ['data'])
  for name, array in zip(names, where.params, strict=True):
    assert array is placed[name]

  def measure(params, batch):
    params = dict(zip(names, params, strict=True))
    return count(run, Counting(None, where.over), params, batch[0])

  steps = running_sums.RunningSums(measure, where)
  ((batch, _),) = where.split((batches([8])[0], None))
  state = steps.zeros(batch)
  text = steps.step().lower(state, where.params, batch).compile().as_text()
  matrices = ('f32[8,8]', 'f32[1,8,8]', 'f32[6,6]', 'f32[3,8,8]', 'f32[4,8,8]')
  for line in text.splitlines():
    if ' all-reduce(' in line:
      assert not any(m in line.split(' all-reduce(')[0] for m in matrices)
  last = where.reducer(state).lower(state).compile().as_text()
  assert last.count(' all-reduce(') == 1


def test_kernels_whose_examples_are_unknown_are_summed_all_the_same(params):
  """Examples in another order: summed over all devices at every batch."""
  fn = lambda p, x: run(p, x[::-1])
  x = batches([8])
  mesh, placed = spread(params, 'fsdp', AxisType.Auto)
  want = collect(fn, params, x, loss=squares, mesh=alone())
  assert_equal(collect(fn, placed, x, loss=squares, mesh=mesh), want)


def test_counts_that_overflow_on_a_mesh(params, monkeypatch):
  monkeypatch.setattr(running_sums, '_MOST_ROWS', 5)
  x = batches([8, 8])
  mesh, placed = spread(params, 'fsdp', AxisType.Auto)
  got = collect(run, placed, x, loss=squares, mesh=mesh)
  assert got['in'].count.dtype == np.int64
  assert_equal(got, collect(run, params, x, loss=squares, mesh=alone()))


def test_batch_axes_are_axes_of_the_mesh(params):
  x = batches([8])
  mesh, placed = spread(params, 'fsdp', AxisType.Auto)
  with pytest.raises(ValueError, match=r"batch_axes \('model',\) must be axes"):
    collect(run, placed, x, mesh=mesh, batch_axes=['model'])
  with pytest.raises(ValueError, match='pass mesh= as well'):
    collect(run, params, x, batch_axes=['data'])
