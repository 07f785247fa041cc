"""What is compiled for a function is found again, and ends with it."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.host.kept import kept
from utilized_rank.ranks.trials import divergences

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
PARAMS = {
  name: RNG.normal(size=shape).astype(np.float32) / 3
  for name, shape in (('w', (12, 20)), ('b', 20), ('v', (20, 10)), ('c', 10))
}
BATCHES = [RNG.normal(size=(64, 12)).astype(np.float32) for _ in range(3)]
LOSS = ur.sampled_cross_entropy()


def network(act=jax.nn.relu):
  return lambda p, x: act(x @ p['w'] + p['b']) @ p['v'] + p['c']


@pytest.fixture
def programs():
  """Names of the programs that are compiled, as they are."""
  found = []

  def listen(event, seconds, **kwargs):
    if event == '/jax/core/compile/backend_compile_duration':
      found.append(kwargs.get('fun_name'))

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield found
  jax.monitoring.clear_event_listeners()


def test_a_second_call_compiles_nothing(programs):
  fn, quiet = network(), {'progress': False}
  collect = lambda: ur.collect(fn, PARAMS, BATCHES, loss=LOSS, **quiet)
  moments = collect()
  tune = lambda: ur.tune_ranks(
    fn,
    PARAMS,
    moments,
    BATCHES,
    divergence=ur.kl_divergence(),
    params_fraction=0.5,
    **quiet,
  )
  ranks = tune()
  anchor = lambda: ur.anchor(
    fn, PARAMS, BATCHES, {'w': 4, 'v': 3}, moments=moments, **quiet
  )
  small = anchor()
  judge = lambda: divergences(fn, PARAMS, small, BATCHES, ur.kl_divergence())
  each = judge()
  done = len(programs)
  again = collect()
  np.testing.assert_array_equal(again['w'].second, moments['w'].second)
  assert dict(tune()) == dict(ranks)
  jax.tree.map(np.testing.assert_array_equal, anchor(), small)
  np.testing.assert_array_equal(judge(), each)
  assert programs[done:] == []


def test_another_share_compiles_nothing(programs):
  fn = network()
  moments = ur.collect(fn, PARAMS, BATCHES, loss=LOSS, progress=False)
  share = lambda fraction, **options: ur.compress(
    fn,
    PARAMS,
    BATCHES,
    moments=moments,
    loss=ur.sampled_cross_entropy(),
    params_fraction=fraction,
    progress=False,
    **options,
  )
  share(0.6)
  # Two kernels: sums, trials, and training.
  assert len(programs) <= 12, programs
  pairs = {'layers': False, 'refine': 0}
  share(0.6, **pairs)
  done = len(programs)
  share(0.4, **pairs)
  assert programs[done:] == []
  # Narrow layers and trained factors have shapes of their own at each share: a
  # glance at the former; start, looks and updates of the latter.
  share(0.4)
  assert len(programs[done:]) <= 4, programs[done:]
  done = len(programs)
  share(0.4)
  share(0.6)
  assert programs[done:] == []


def test_functions_are_not_kept_alive_nor_taken_for_each_other():
  fns = [network(act) for act in (jax.nn.relu, jnp.tanh)]
  found = []
  for fn in fns:
    moments = ur.collect(fn, PARAMS, BATCHES, loss=LOSS, progress=False)
    small, _ = ur.compress(
      fn,
      PARAMS,
      BATCHES,
      moments=moments,
      loss=LOSS,
      params_fraction=0.5,
      progress=False,
    )
    (each,) = {
      tuple(divergences(fn, PARAMS, small, BATCHES, ur.kl_divergence()))
    }
    low = ur.low_rank(fn)
    want = [
      ur.kl_divergence()(fn(PARAMS, x), low(small, x), x) for x in BATCHES
    ]
    # Of float32 logits, multiplied out and in pairs.
    np.testing.assert_allclose(each, np.concatenate(want), rtol=2e-3, atol=1e-6)
    found.append(np.mean(each))
  assert found[0] != found[1]
  alive = [weakref.ref(fn) for fn in fns]
  del fn, fns, low
  gc.collect()
  assert [ref() for ref in alive] == [None, None]


@pytest.mark.quick
def test_methods_are_known_by_their_object():
  class Model:
    def apply(self, x):
      return x + 1

  model, made = Model(), []
  make = lambda fn: made.append(1) or (lambda x: fn(x))
  one = kept([model.apply], 'test', make)
  assert kept([model.apply], 'test', make) is one and one(1) == 2
  assert kept([Model().apply], 'test', make) is not one
  assert kept([model.apply], 'other', make) is not one
  assert len(made) == 3
  ref = weakref.ref(model)
  del model
  gc.collect()
  assert ref() is None
  with pytest.raises(AssertionError, match='dropped'):
    one(1)
