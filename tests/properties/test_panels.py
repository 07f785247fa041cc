"""Sums of wide inputs, of which only panels are kept, wherever sums go."""

import functools

import forms
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
import numpy as np
import pytest
import test_sharded_params as sharded

import utilized_rank as ur
from utilized_rank.collection import running_sums
from utilized_rank.collection.devices import Devices
from utilized_rank.linalg import gram
from utilized_rank.moments.capture import count
from utilized_rank.moments.counting import EVERY
from utilized_rank.moments.moments import Sums
from utilized_rank.storage import encoding

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
collect = functools.partial(ur.collect, progress=False)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
  """Panels of 8 columns for all widths above, in place of a quarter of 512."""
  monkeypatch.setattr(gram, '_LEAST_WIDTH', 9)


def symmetric(*shape):
  x = RNG.normal(size=shape)
  return x + np.swapaxes(x, -1, -2)


@pytest.mark.parametrize('shape', [(8, 8), (9, 9), (3, 20, 20), (2, 3, 33, 33)])
@pytest.mark.parametrize('of', [np.asarray, jax.numpy.asarray])
def test_panels_hold_a_symmetric_matrix(shape, of):
  full = of(symmetric(*shape).astype(np.float32))
  panels = gram.panels_of(full)
  np.testing.assert_array_equal(gram.whole(panels), full)
  assert sum(p.size for p in panels) * shape[-1] ** 2 == (
    gram.panel_entries(shape[-1]) * full.size
  )
  diagonal = np.asarray(full, np.float64).trace(axis1=-2, axis2=-1)
  np.testing.assert_allclose(gram.trace(panels), diagonal, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', forms.FORMS)
def test_every_form_has_its_moments(name):
  """All ways to write a product, experts, stacks and convolutions."""
  form = forms.FORMS[name]
  params, x = form.params(0), form.inputs(0)
  _, moments = jax.jit(ur.capture(form.fn))(params, x)
  for path, rows in form.rows(params, x).items():
    want = np.einsum('...nd,...ne->...de', rows, rows)
    d = want.shape[-1]
    sums = moments[path].sums
    assert len(sums.panels) == (1 if d < 9 else -(-d // (-(-d // 32) * 8)))
    np.testing.assert_allclose(sums.second, want, rtol=1e-5, atol=1e-5)


def wide(seed=0):
  rng = np.random.default_rng(seed)
  shapes = {'in': (12, 40), 'stack': (3, 40, 40), 'out': (40, 5)}
  return {
    name: (rng.normal(size=shape) / 6).astype(np.float32)
    for name, shape in shapes.items()
  }


def one_device():
  return Mesh(np.array(jax.devices()[:1]), ('one',))


def batches(sizes):
  return [RNG.normal(size=(n, 5, 12)).astype(np.float32) for n in sizes]


def mean_square(outputs, batch):
  del batch
  return (outputs**2).mean((1, 2))


def assert_equal(got, want, rtol=1e-6):
  assert list(got) == list(want)
  for path in want:
    np.testing.assert_array_equal(got[path].count, want[path].count)
    for name in ('second', 'grad_second'):
      a, b = (getattr(m[path], name) for m in (got, want))
      if b is None:
        assert a is None
        continue
      # Of gradients, the backward pass has its own rounding.
      least = rtol * (1 + 9 * (name == 'grad_second')) * np.abs(b).max()
      np.testing.assert_allclose(a, b, rtol=0, atol=least)


@pytest.mark.parametrize('name', forms.FORMS)
def test_every_form_has_its_gradients(name, monkeypatch):
  form = forms.FORMS[name]
  params, x = form.params(0), form.inputs(0)
  # Outputs of some forms have no axis of examples.
  loss = lambda y, x: jnp.full(len(x), (y**2).sum() / len(x))
  run = lambda: collect(form.fn, params, [x], loss=loss, mesh=one_device())
  got = run()
  for moment in got.values():
    m = moment.layout.matrix_shape[1]
    shapes = [p.shape[-2:] for p in moment.grad_panels]
    assert shapes == gram.panel_shapes(m)
  monkeypatch.undo()
  assert_equal(got, run())


@pytest.mark.parametrize('accumulate', ['float32', 'compensated', 'float64'])
def test_batches_of_any_size_add_up_on_all_devices(accumulate):
  data, tree = batches([8, 8, 3]), wide()
  run = functools.partial(collect, sharded.run, tree, loss=mean_square)
  want = run([np.concatenate(data)], mesh=one_device())
  got = run(data, accumulate=accumulate)
  assert len(got['stack'].sums.panels) == len(got['stack'].grad_panels) == 3
  assert_equal(got, want)


def test_passes_and_masks():
  data, fn, tree = batches([8, 8, 3]), sharded.run, wide()
  want = ur.capture(fn)(tree, np.concatenate(data))[1]
  assert_equal(collect(fn, tree, data, memory_limit=10**9), want)
  real = [np.arange(len(x)) < len(x) - 1 for x in data]
  masked = [{'x': x, 'real': r} for x, r in zip(data, real, strict=True)]
  got = collect(lambda p, b: fn(p, b['x']), tree, masked, mask='real')
  kept = np.concatenate([x[:-1] for x in data])
  assert_equal(got, ur.capture(fn)(tree, kept)[1])


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize('layout', sharded.LAYOUTS)
def test_parameters_may_be_spread(layout, kind):
  data, tree = batches([8, 8]), wide()
  want = collect(sharded.run, tree, data, loss=mean_square)
  mesh, placed = sharded.spread(tree, layout, kind)
  got = collect(
    sharded.model(layout, kind), placed, data, mesh=mesh, loss=mean_square
  )
  assert len(got['stack'].sums.panels) == len(got['stack'].grad_panels) == 3
  assert_equal(got, want)


def test_an_interrupted_collection_goes_on(tmp_path):
  data, tree = batches([4] * 5), wide()
  options = {
    'loss': mean_square,
    'checkpoint_dir': tmp_path / 'sums',
    'checkpoint_every': 2,
  }

  def until(stop):
    yield from data[:stop]
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    collect(sharded.run, tree, until(3), **options)
  got = collect(sharded.run, tree, data, **options)
  want = collect(sharded.run, tree, data, loss=mean_square)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_nothing_but_panels_is_held():
  """Neither between batches nor in a step is there a whole matrix."""
  tree, (x,) = wide(), batches([8])
  names = sorted(tree)
  measure = lambda values, x: count(
    sharded.run, EVERY, dict(zip(names, values, strict=True)), x
  )
  where = Devices([tree[n] for n in names], jax.local_devices()[:1])
  run = running_sums.RunningSums(measure, where)
  state = run.zeros(x)
  held = {a.shape[-2:] for a in jax.tree.leaves(state[0].sums)}
  assert {(16, 40), (16, 24), (8, 8)} <= held
  assert not {(40, 40), (12, 12)} & held
  text = run.step().lower(state, where.params, x).compile().as_text()
  # `stack` is a parameter of that shape, and one of its members another.
  sums = [t for t in text.split() if t.startswith('f32[1,3,40,40]')]
  assert not sums


def test_older_files_are_read(tmp_path, monkeypatch):
  """0.1 wrote whole matrices."""
  tree, data = wide(), batches([6])
  moments = collect(sharded.run, tree, data, loss=mean_square)

  def older(tree, where):
    arrays, structure = encode(tree, where)
    for i, sums in enumerate(moments.sums):
      del arrays[str(i)]['panels']
      arrays[str(i)]['second'] = sums.second
    for i, path in enumerate(moments):
      arrays['grads'][str(i)] = moments[path].grad
    return arrays, structure

  encode = encoding.encode
  monkeypatch.setattr(encoding, 'encode', older)
  ur.save(tmp_path / 'old', moments)
  monkeypatch.undo()
  monkeypatch.setattr(gram, '_LEAST_WIDTH', 9)
  old = ur.load(tmp_path / 'old')
  assert_equal(old, moments, 0)
  twice = jax.tree.map(lambda a: 2 * a, moments)
  assert_equal(ur.merge_moments(old, moments), twice, 0)


@pytest.mark.parametrize('method', ['output', 'loss'])
def test_factors_are_those_of_whole_matrices(method):
  tree, data = wide(), batches([64])
  got = collect(sharded.run, tree, data, loss=mean_square)
  whole = ur.Moments(
    got.table,
    tuple(Sums(s.count, s.total, (s.second,)) for s in got.sums),
    tuple((moment.grad,) for moment in got.values()),
    got.examples,
  )
  ranks = {'in': 4, 'stack': 6, 'out': 3}
  small = [
    ur.factorize(tree, m, ranks, method=method, progress=False)
    for m in (got, whole)
  ]
  for a, b in zip(*map(jax.tree.leaves, small), strict=True):
    np.testing.assert_array_equal(a, b)
