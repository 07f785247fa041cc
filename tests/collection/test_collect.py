"""Streaming collection: exact sums, any split, many devices, interruption."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import references

import utilized_rank as ur
from utilized_rank.collection import running_sums
from utilized_rank.collection.devices import Devices
from utilized_rank.collection.devices import local_copy
from utilized_rank.collection.pmapped import Pmapped
from utilized_rank.moments.capture import count
from utilized_rank.moments.counting import EVERY


def model(params, x):
  h = jnp.tanh(x @ params['first'])
  return h @ params['second'], h @ params['third']


SHAPES = {'first': (6, 10), 'second': (10, 4), 'third': (10, 3)}


@pytest.fixture(scope='module')
def params():
  keys = jax.random.split(jax.random.key(0), 3)
  return {
    name: jax.random.normal(k, shape)
    for k, (name, shape) in zip(keys, SHAPES.items(), strict=True)
  }


@pytest.fixture(scope='module')
def rows():
  return np.random.default_rng(0).normal(size=(97, 6)).astype(np.float32) + 1


def split(rows, sizes):
  return np.split(rows, np.cumsum(sizes)[:-1])


def assert_equal_moments(a, b, rtol):
  assert list(a) == list(b)
  for path in a:
    np.testing.assert_array_equal(a[path].count, b[path].count)
    for name in ('mean', 'second'):
      want = np.asarray(getattr(b[path], name))
      np.testing.assert_allclose(
        getattr(a[path], name), want, atol=rtol * np.abs(want).max()
      )


collect = functools.partial(ur.collect, progress=False)


def test_moments_equal_the_reference(params, rows):
  moments = collect(model, params, split(rows, [40, 40, 17]))
  hidden = np.tanh(rows.astype(np.float64) @ np.asarray(params['first'], 'd'))
  for path, x in [('first', rows), ('second', hidden), ('third', hidden)]:
    assert moments[path].count == 97
    np.testing.assert_allclose(moments[path].mean, x.mean(0), atol=1e-5)
    want = references.second_moment(x)
    # float32 sums: 1e-7 relative per addition, 97 rows.
    np.testing.assert_allclose(
      moments[path].second, want, atol=1e-5 * np.abs(want).max()
    )
    np.testing.assert_allclose(
      moments[path].covariance,
      np.cov(np.asarray(x, 'd').T, bias=True),
      atol=1e-5 * np.abs(want).max(),
    )
  assert moments['second'].sums is moments['third'].sums


@pytest.mark.parametrize('sizes', [[97], [1, 96], [50, 47], [3] * 32 + [1]])
def test_any_split_gives_the_same_moments(params, rows, sizes):
  whole = collect(model, params, [rows])
  # Sums in another order: float32 rounding of up to 97 rows.
  assert_equal_moments(collect(model, params, split(rows, sizes)), whole, 1e-6)


def test_any_order_gives_the_same_moments(params, rows):
  shuffled = np.random.default_rng(1).permutation(rows)
  assert_equal_moments(
    collect(model, params, [shuffled]), collect(model, params, [rows]), 1e-6
  )


@pytest.mark.quick
def test_merging_is_collecting_both(params, rows):
  parts = split(rows, [60, 37])
  merged = ur.merge_moments(*(collect(model, params, [p]) for p in parts))
  assert_equal_moments(merged, collect(model, params, parts), 1e-6)


def test_moments_of_different_functions_do_not_merge(params, rows):
  a = collect(model, params, [rows])
  b = collect(model, params, [rows], select=[('first', True)])
  with pytest.raises(ValueError, match="'second' are in the first argument"):
    ur.merge_moments(a, b)
  wide = {**params, 'second': jnp.ones((10, 5))}
  with pytest.raises(ValueError, match=r"'second' are over \(10, 4\)"):
    ur.merge_moments(a, collect(model, wide, [rows]))


@pytest.mark.parametrize('devices', [1, 2, 4])
def test_devices_share_the_work(params, rows, devices):
  """Uneven last batches, and a batch smaller than the number of devices."""
  mesh = jax.make_mesh(
    (devices,),
    ('x',),
    devices=jax.local_devices()[:devices],
    axis_types=(jax.sharding.AxisType.Auto,),
  )
  batches = split(rows, [40, 37, 18, 2])
  moments = collect(model, params, batches, mesh=mesh)
  assert_equal_moments(moments, collect(model, params, [rows]), 1e-6)


def test_capture_inside_pmap_and_shard_map(params, rows):
  """The pure transform, reduced by the caller."""
  n = 4
  x = rows[:96].reshape(n, 24, 6)
  want = collect(model, params, [rows[:96]])

  def reduced(params, x):
    return jax.lax.psum(ur.capture(model)(params, x)[1], 'data')

  pmapped = jax.pmap(reduced, axis_name='data', in_axes=(None, 0))(params, x)
  assert_equal_moments(jax.tree.map(lambda a: a[0], pmapped), want, 1e-6)
  mesh = jax.make_mesh(
    (n,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  sharded = jax.jit(
    jax.shard_map(
      reduced,
      mesh=mesh,
      in_specs=(P(), P('data')),
      out_specs=P(),
    )
  )(params, rows[:96])
  assert_equal_moments(sharded, want, 1e-6)


def run_of(spread):
  measure = lambda params, x: count(
    model, EVERY, dict(zip(sorted(SHAPES), params)), x
  )
  return running_sums.RunningSums(measure, spread)


def reductions(text):
  return [line for line in text.splitlines() if ' all-reduce(' in line]


@pytest.mark.parametrize('kind', ['shard_map', 'pmap'])
def test_devices_reduce_once_at_the_end(params, rows, kind):
  """No collective in the programs that run for a batch; one in the last."""
  arrays = [params[name] for name in sorted(SHAPES)]
  devices = jax.local_devices()
  if kind == 'pmap':
    arrays = [np.stack([a] * 4) for a in arrays]
    run = run_of(Pmapped(arrays, devices, 'i'))
    parts = run.spread.split(rows[:96].reshape(4, 24, 6))
  else:
    run = run_of(Devices(arrays, devices))
    parts = run.spread.split(rows)
    assert [whole for _, whole in parts] == [False, True]
  for part, whole in parts:
    state = run.zeros(part)
    step = run.step(whole).lower(state, run.spread.params, part)
    text = step.compile().as_text()
    assert 'f32[1,10,10]' in text
    for word in ('all-reduce', 'all-gather', 'collective', 'all-to-all'):
      assert word not in text
  last = run.spread.reducer(state).lower(state).compile().as_text()
  assert len(reductions(last)) == 1


def test_pmap_gives_the_same_moments(params, rows):
  """Replicated parameters, and a function that knows the axis's name."""
  want = collect(model, params, [rows[:96]], loss=squares)
  copies = jax.tree.map(lambda a: np.stack([a] * 4), params)

  def fn(params, x):
    total = jax.lax.psum(1, 'data')
    return model(params, x * (total / 4))

  batches = [b.reshape(4, -1, 6) for b in split(rows[:96], [48, 40, 8])]
  moments = collect(fn, copies, batches, pmap_axis='data', loss=squares)
  assert_equal_moments(moments, want, 1e-6)
  for path in want:
    np.testing.assert_allclose(
      moments[path].grad_second, want[path].grad_second, rtol=1e-5
    )


def squares(outputs, batch):
  del batch
  return sum(jnp.sum(y**2, axis=-1) for y in outputs)


def test_what_pmap_cannot_take_is_named(params, rows):
  copies = jax.tree.map(lambda a: np.stack([a] * 4), params)
  with pytest.raises(ValueError, match='every parameter leads.*4 devices'):
    collect(model, params, [rows], pmap_axis='i')
  with pytest.raises(ValueError, match=r'leading axes \[\(97,\)\]'):
    collect(model, copies, [rows], pmap_axis='i')
  with pytest.raises(ValueError, match='axes of a mesh; pass mesh= as well'):
    collect(model, copies, [rows], pmap_axis='i', batch_axes=('a',))


def test_bfloat16_activations_are_summed_in_float32():
  """1,000 equal rows: a bfloat16 sum stops at 256."""
  w = jnp.ones((4, 2), jnp.bfloat16)
  x = jnp.ones((1000, 4), jnp.bfloat16)
  moments = collect(lambda p, x: x @ p['w'], {'w': w}, [x, x])
  assert moments['w'].second.dtype == np.float32
  np.testing.assert_array_equal(moments['w'].second, np.ones((4, 4)))
  np.testing.assert_array_equal(moments['w'].sums.total, np.full(4, 2000.0))


def test_overflowing_counts_move_to_the_host(params, rows, monkeypatch):
  batches = split(rows, [33, 33, 31])
  want = collect(model, params, batches)
  monkeypatch.setattr(running_sums, '_MOST_ROWS', 10)
  moments = collect(model, params, batches)
  assert moments['first'].count.dtype == np.int64
  assert moments['first'].second.dtype == np.float64
  assert_equal_moments(moments, want, 1e-6)


class Interrupted(Exception):
  pass


def stop_after(batches, n):
  yield from batches[:n]
  raise Interrupted


@pytest.mark.parametrize('overflow', [False, True])
@pytest.mark.parametrize('stop', [1, 3, 6])
def test_an_interrupted_collection_gives_the_same_numbers(
  params, rows, tmp_path, stop, overflow, monkeypatch
):
  if overflow:
    monkeypatch.setattr(running_sums, '_MOST_ROWS', 30)
  batches = split(rows, [14] * 6 + [13])
  folder = tmp_path / 'sums'
  again = functools.partial(
    collect, model, params, checkpoint_dir=folder, checkpoint_every=2
  )
  with pytest.raises(Interrupted):
    again(stop_after(batches, stop))
  assert folder.is_dir() == (stop >= 2)
  moments = again(batches)
  want = collect(model, params, batches)
  for path in want:
    np.testing.assert_array_equal(moments[path].second, want[path].second)
    np.testing.assert_array_equal(moments[path].count, want[path].count)
  assert not folder.exists()


def test_sums_of_another_collection_are_refused(params, rows, tmp_path):
  folder = tmp_path / 'sums'
  with pytest.raises(Interrupted):
    collect(
      model,
      params,
      stop_after([rows] * 3, 2),
      checkpoint_dir=folder,
      checkpoint_every=1,
    )
  with pytest.raises(ValueError, match='sums of another collection'):
    collect(
      model, params, [rows], checkpoint_dir=folder, select=[('first', True)]
    )
  ur.save(folder, params, overwrite=True)
  with pytest.raises(ValueError, match='no running sums'):
    collect(model, params, [rows], checkpoint_dir=folder)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('where', [0, 1, 3])
def test_non_finite_activations_name_kernel_and_batch(params, rows, bad, where):
  batches = [b.copy() for b in split(rows, [24, 24, 24, 25])]
  batches[where][5, 2] = bad
  with pytest.raises(FloatingPointError) as error:
    collect(model, params, batches)
  assert f'batch {where}' in str(error.value)
  assert "['first']" in str(error.value)


def test_bad_batches_are_named(params, rows):
  fn = lambda p, b: model(p, b['x'])
  for batch, message in [
    ({'x': rows, 'y': rows[:5]}, 'disagree in their leading axis'),
    ({'x': rows[:0]}, 'batch 1 is empty'),
    ({'x': rows, 'key': np.float32(1)}, 'lead with the batch axis'),
    ({}, 'lead with the batch axis'),
  ]:
    with pytest.raises(ValueError, match=message):
      collect(fn, params, [{'x': rows}, batch])
  with pytest.raises(ValueError, match='at least one batch'):
    collect(fn, params, [])


def test_parameters_of_another_function_are_named(params, rows):
  with pytest.raises(ValueError) as error:
    collect(model, {**params, 'second': jnp.ones((9, 4))}, [rows])
  assert 'does not accept these parameters' in str(error.value)
  assert '(10,)' in str(error.value) or '10' in str(error.value)


def test_a_function_without_kernels_is_refused(rows):
  with pytest.raises(ValueError, match='no kernel'):
    collect(lambda p, x: x * p['scale'], {'scale': jnp.ones(6)}, [rows])


def test_few_rows_warn_with_the_number_needed(params, rows):
  moments = collect(model, params, [rows[:4]])
  with pytest.warns(
    UserWarning, match=r"'second' was measured on 4 rows for 10 input"
  ):
    report = ur.measure(params, moments)
  assert all(layer.rank <= 4 for layer in report.layers)
  with pytest.warns(UserWarning, match='4 rows for 10'):
    small = ur.factorize(params, moments, {'second': 3})
  assert np.all(np.isfinite(small['second'].dense()))


def test_moments_for_other_shapes_are_refused(params, rows):
  moments = collect(model, params, [rows])
  other = {**params, 'second': jnp.ones((10, 5))}
  for call in (ur.measure, ur.project, ur.energy_ranks):
    with pytest.raises(ValueError, match=r"'second' has shape \(10, 5\)"):
      call(other, moments)
  missing = {k: v for k, v in params.items() if k != 'third'}
  with pytest.raises(ValueError, match="no parameter 'third'"):
    ur.measure(missing, moments)
  with pytest.raises(ValueError, match="'second' holds NaN"):
    ur.measure({**params, 'second': params['second'] * np.nan}, moments)
  small = ur.factorize(params, moments, {'second': 2})
  with pytest.raises(ValueError, match='low-rank already'):
    ur.measure(small, moments)


def test_unknown_paths_suggest_what_was_meant(params, rows):
  moments = collect(model, params, [rows])
  with pytest.raises(KeyError, match='did you mean'):
    moments['secnd']
  with pytest.raises(KeyError, match='did you mean'):
    ur.measure(params, moments)['frst']
  with pytest.raises(ValueError, match="unknown method 'svd'"):
    ur.factorize(params, moments, {'first': 2}, method='svd')


def test_opaque_computations_are_errors_or_named_holes(params, rows):
  def fn(p, x):
    hidden = jax.pure_callback(
      lambda w: np.asarray(w) * 2,
      jax.ShapeDtypeStruct((6, 10), np.float32),
      p['first'],
      vmap_method='sequential',
    )
    return (x @ hidden) @ p['second']

  two = {name: params[name] for name in ('first', 'second')}
  with pytest.raises(ur.UnsupportedError, match="'first'.*pure_callback"):
    collect(fn, two, [rows])
  with pytest.warns(UserWarning, match=r"leave out \['first'\]"):
    moments = collect(fn, two, [rows], on_opaque='report')
  assert list(moments) == ['second']


class Counter:
  """Batches of an iterator whose place can be told and set."""

  def __init__(self, batches, protocol, stop=None):
    self.batches, self.stop, self.at, self.read = batches, stop, 0, 0
    get, put = protocol
    setattr(self, get, lambda: {'at': self.at})
    setattr(self, put, self.go_to)

  def go_to(self, state):
    self.at = state['at']

  def __iter__(self):
    return self

  def __next__(self):
    if self.at == self.stop:
      raise Interrupted
    if self.at == len(self.batches):
      raise StopIteration
    self.at += 1
    self.read += 1
    return self.batches[self.at - 1]


@pytest.mark.parametrize(
  'protocol',
  [('get_state', 'set_state'), ('state_dict', 'load_state_dict')],
)
def test_iterators_go_on_where_they_were(params, rows, tmp_path, protocol):
  batches = split(rows, [14] * 6 + [13])
  again = functools.partial(
    collect, model, params, checkpoint_dir=tmp_path / 's', checkpoint_every=2
  )
  with pytest.raises(Interrupted):
    again(Counter(batches, protocol, stop=5))
  with pytest.raises(ValueError, match='has neither set_state nor'):
    again(batches)
  second = Counter(batches, protocol)
  moments = again(second)
  assert second.read == 1 + 3  # one to trace with, and what was left
  want = collect(model, params, batches)
  for path in want:
    np.testing.assert_array_equal(moments[path].second, want[path].second)


def test_states_of_iterators_that_cannot_be_saved_are_named(
  params, rows, tmp_path
):
  class Odd(Counter):
    def go_to(self, state):
      raise AssertionError

  odd = Odd([rows], ('get_state', 'set_state'))
  odd.get_state = lambda: {1, 2}
  with pytest.raises(TypeError, match="data iterator's state is a set"):
    collect(
      model,
      params,
      odd,
      checkpoint_dir=tmp_path / 's',
      checkpoint_every=1,
    )
  odd = Odd([rows] * 2, ('get_state', 'set_state'), stop=1)
  odd.get_state = lambda: b'\x00\xff'
  with pytest.raises(Interrupted):
    collect(
      model, params, odd, checkpoint_dir=tmp_path / 's', checkpoint_every=1
    )
  seen = []
  whole = Counter([rows] * 2, ('get_state', 'set_state'))
  whole.set_state = lambda state: seen.append(state)
  collect(model, params, whole, checkpoint_dir=tmp_path / 's')
  assert seen == [b'\x00\xff']


def test_parameters_of_several_processes_need_their_mesh():
  array = mock.create_autospec(jax.Array, instance=True)
  array.is_fully_addressable = array.is_fully_replicated = False
  with pytest.raises(ValueError, match='spread over processes .* as mesh='):
    local_copy(array)
