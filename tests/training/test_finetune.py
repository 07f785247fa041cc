"""Fine-tuning: what it converges to, and that how it runs changes nothing."""

import dataclasses
import itertools
import json
import sys
import types

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import utilized_rank as ur
from utilized_rank.training import train

pytestmark = pytest.mark.slow
D, F, M = 6, 8, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, D)).astype(np.float32)
Y = RNG.integers(0, M, 32).astype(np.int32)
DATA = [{'x': X[i : i + 8], 'y': Y[i : i + 8]} for i in range(0, 32, 8)]
SGD = optax.sgd(0.05, momentum=0.9)


def fn(params, batch):
  h = jnp.tanh(batch['x'] @ params['up'] + params['bias'])
  return h @ params['down']


def train_fn(params, batch, rng):
  keep = jax.random.bernoulli(rng, 0.9, batch['x'].shape)
  return fn(params, {'x': batch['x'] * keep})


def labels(outputs, batch):
  return optax.softmax_cross_entropy_with_integer_labels(outputs, batch['y'])


@pytest.fixture(scope='module')
def dense():
  draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
  return {'up': draw(D, F), 'bias': draw(F), 'down': draw(F, M)}


@pytest.fixture(scope='module')
def small(dense):
  return compressed(dense)


def compressed(dense, gauge='identity'):
  moments = ur.collect(fn, dense, DATA, progress=False)
  ranks = {'up': 3, 'down': 2}
  return ur.factorize(dense, moments, ranks, gauge=gauge, progress=False)


def tuned(small, dense, batches=DATA, **how):
  how = {'steps': 6, 'optimizer': SGD, 'loss': labels} | how
  return ur.finetune(fn, small, dense, batches, progress=False, **how)


def assert_identical(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, rtol=1e-5):
  # The same sums of float32 in another order, over a few steps.
  assert jax.tree.structure(a) == jax.tree.structure(b)
  near = lambda v, w: np.testing.assert_allclose(v, w, rtol=rtol, atol=1e-5)
  jax.tree.map(near, a, b)


def logged(folder):
  text = (folder / 'metrics.jsonl').read_text('utf-8')
  return [json.loads(line) for line in text.splitlines()]


def test_a_linear_network_converges_to_the_closed_form():
  """The best A B for |X W - X A B| is the truncated SVD of S^1/2 W."""
  rng = np.random.default_rng(1)
  x = rng.normal(size=(64, 5)) * [2, 1.5, 1, 0.7, 0.5]
  w = rng.normal(size=(5, 4))
  u, s, v = np.linalg.svd(x @ w, full_matrices=False)
  best = (u[:, :2] * s[:2]) @ v[:2]
  linear = lambda params, batch: batch @ params['w']
  dense = {'w': w.astype(np.float32)}
  layout = ur.Layout.of((5, 4), inputs=(0,), outputs=(1,))
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32) / 2
  start = {'w': ur.LowRank(draw(5, 2), draw(2, 4), None, layout)}
  batch = x.astype(np.float32)
  result = ur.finetune(
    linear, start, dense, [batch], steps=1500,
    optimizer=ur.FactorOptimizer(learning_rate=0.02), progress=False,
  )  # fmt: skip
  found = ur.low_rank(linear)(result, batch)
  # Adam's steps vanish with the schedule; what is left is second order.
  np.testing.assert_allclose(found, best, atol=2e-3 * np.abs(best).max())


@pytest.mark.parametrize(
  'how',
  [
    {'optimizer': ur.FactorOptimizer(), 'ema': 0.9, 'train_fn': train_fn},
    {'validation': DATA[:2], 'validate_every': 1},
  ],
)
def test_a_resumed_run_is_bit_for_bit_the_whole_one(
  small, dense, tmp_path, how
):
  def interrupted(start):
    for step in itertools.count(start):
      if step == 5:
        raise KeyboardInterrupt
      yield DATA[step % 4]

  how = {'checkpoint_every': 2, 'log_every': 2, **how}
  whole = tuned(small, dense, directory=tmp_path / 'whole', **how)
  with pytest.raises(KeyboardInterrupt):
    tuned(small, dense, interrupted, directory=tmp_path / 'parts', **how)
  # The list has no place to go to: four batches are read again.
  again = tuned(small, dense, directory=tmp_path / 'parts', **how)
  assert_identical(again, whole)
  lines = [logged(tmp_path / name) for name in ('whole', 'parts')]
  for line in itertools.chain(*lines):
    line.pop('examples_per_second', None)
  assert lines[0] == lines[1]
  with pytest.raises(ValueError, match='saved with steps='):
    tuned(small, dense, directory=tmp_path / 'parts', **how, steps=7)


def test_parts_of_a_batch_give_the_steps_of_the_whole(small, dense):
  whole = tuned(small, dense)
  assert_close(tuned(small, dense, accumulate=4), whole)
  with pytest.raises(ValueError, match='8 examples, which do not divide'):
    tuned(small, dense, accumulate=3)


def test_what_is_trained_is_not_the_callers(small, dense):
  before = jax.tree.map(np.array, small)
  after = tuned(small, dense)
  assert_identical(jax.tree.map(np.array, small), before)
  changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
  assert all(jax.tree.leaves(changed))


def test_average_against_float64(small, dense):
  states = [tuned(small, dense, steps=n) for n in range(1, 5)]
  # Constant rates, so that a shorter run is the beginning of a longer one.
  wide = lambda v: np.asarray(v, np.float64)
  average = jax.tree.map(wide, small)
  for state in states:
    average = jax.tree.map(lambda m, v: 0.8 * m + 0.2 * wide(v), average, state)
  assert_close(tuned(small, dense, steps=4, ema=0.8), average)


def score(tree, batches, metric):
  values = [metric(ur.low_rank(fn)(tree, b), b) for b in batches]
  return float(np.mean(np.concatenate(values)))


def test_the_best_on_validation_is_returned(small, dense, tmp_path):
  """Labels that the training contradicts: it is best at the first."""
  wrong = [{**b, 'y': (b['y'] + 1) % M} for b in DATA]
  how = {'validation': wrong, 'metric': labels, 'validate_every': 1}
  best = tuned(small, dense, **how, directory=tmp_path)
  lines = logged(tmp_path)
  scores = {v['step']: v['validation'] for v in lines if 'validation' in v}
  assert sorted(scores) == [0, 1, 2, 3, 4, 5, 6]
  found = score(best, wrong, labels)
  np.testing.assert_allclose(found, min(scores.values()), rtol=1e-5)
  at = min(scores, key=scores.get)
  assert at < 6  # or nothing was chosen
  assert_close(best, tuned(small, dense, steps=at) if at else small)


def test_it_stops_where_validation_gets_no_better(small, dense, tmp_path):
  seen = []

  def batches(start):
    for step in itertools.count(start):
      seen.append(step)
      yield DATA[step % 4]

  wrong = [{**b, 'y': (b['y'] + 1) % M} for b in DATA]
  how = {'validation': wrong, 'validate_every': 1, 'patience': 2, 'steps': 50}
  first = tuned(small, dense, batches, **how, directory=tmp_path)
  assert len(seen) < 50
  stopped = len(seen)
  again = tuned(small, dense, batches, **how, directory=tmp_path)
  assert len(seen) == stopped
  assert_identical(again, first)


def mesh_of(kind=AxisType.Auto):
  return jax.make_mesh((4,), ('data',), axis_types=(kind,))


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_mesh_gives_what_one_device_does(small, dense, accumulate):
  want = tuned(small, dense, validation=DATA[:3], validate_every=2)
  got = tuned(
    small, dense, validation=DATA[:3], validate_every=2,
    mesh=mesh_of(), accumulate=accumulate,
  )  # fmt: skip
  assert_close(got, want)
  assert all(len(v.devices()) == 4 for v in jax.tree.leaves(got))
  few = [{k: v[:6] for k, v in DATA[0].items()}]
  with pytest.raises(ValueError, match='6 examples, which do not divide'):
    tuned(small, dense, few, mesh=mesh_of())


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_sharded_leaves_stay_where_they_are(dense, kind, tmp_path):
  """FSDP by the leaves' own shardings, and restored onto them."""
  plain = compressed(dense, gauge=None)
  mesh = mesh_of(kind)
  spread = lambda v: jax.device_put(v, NamedSharding(mesh, P()))
  there = jax.tree.map(spread, plain)
  b = jax.device_put(plain['up'].b, NamedSharding(mesh, P(None, 'data')))
  there['up'] = dataclasses.replace(there['up'], b=b)
  on_mesh = jax.tree.map(spread, dense)
  how = {'optimizer': ur.FactorOptimizer(), 'checkpoint_every': 3}
  if kind == AxisType.Explicit:
    # Types of the data and of the factor cannot both be along 'data'.
    how['batch_axes'] = ()
  first = tuned(there, on_mesh, **how, directory=tmp_path)
  assert first['up'].b.sharding.spec == P(None, 'data')
  assert_close(first, tuned(plain, dense, **how | {'batch_axes': None}))
  again = tuned(there, on_mesh, **how, directory=tmp_path)
  assert_identical(again, first)
  assert again['up'].b.sharding.spec == P(None, 'data')


def test_distilled_without_labels(small, dense):
  unlabelled = [{'x': b['x']} for b in DATA]
  kl = ur.kl_divergence()
  far = lambda tree: score(tree, DATA, lambda z, b: kl(fn(dense, b), z, b))
  for how in ({}, {'divergence': kl}, {'loss': ur.sampled_cross_entropy(),
                                       'distill_weight': 1.0}):  # fmt: skip
    how = {'loss': None, 'steps': 60, **how}
    after = tuned(small, dense, unlabelled, **how)
    assert far(after) < 0.8 * far(small)


def test_both_is_the_weighted_sum(small, dense):
  """One step of plain descent, against the gradients of the two."""
  kl = ur.kl_divergence()
  run = ur.low_rank(fn)

  def of(tree):
    outputs, batch = run(tree, DATA[0]), DATA[0]
    two = kl(fn(dense, batch), outputs, batch)
    return jnp.mean(0.25 * labels(outputs, batch) + 0.75 * two)

  want = jax.tree.map(lambda v, g: v - 0.1 * g, small, jax.grad(of)(small))
  how = {'divergence': kl, 'distill_weight': 0.75, 'optimizer': optax.sgd(0.1)}
  assert_close(tuned(small, dense, steps=1, **how), want)


def test_rules_say_what_is_trained(small, dense):
  after = tuned(small, dense, trainable=[('bias|up', False)])
  assert_identical(after['up'], small['up'])
  np.testing.assert_array_equal(after['bias'], small['bias'])
  assert not np.array_equal(after['down'].a, small['down'].a)
  with pytest.raises(ValueError, match="rule 'upp' matched no leaf"):
    tuned(small, dense, trainable=[('upp', False)])
  with pytest.raises(ValueError, match='no floating leaf is to be trained'):
    tuned(small, dense, trainable=[('.*', False)])


def test_half_precision_inside_float32_factors(small, dense):
  seen = []

  def spied(params, batch):
    outputs = fn(params, batch)
    seen.append((outputs.dtype, params['up'].dtype))
    return outputs

  after = ur.finetune(
    spied, small, dense, DATA, loss=labels, steps=6, optimizer=SGD,
    compute_dtype=jnp.bfloat16, progress=False,
  )  # fmt: skip
  assert set(seen) == {(jnp.dtype('bfloat16'),) * 2}
  assert {v.dtype for v in jax.tree.leaves(after)} == {np.dtype('float32')}
  # bfloat16 has 8 bits: gradients are right to about a percent.
  for a, b, c in zip(
    *map(jax.tree.leaves, (after, tuned(small, dense), small)), strict=True
  ):
    step = np.linalg.norm(b - c)
    assert np.linalg.norm(a - b) < 0.05 * step


def test_leaves_of_half_precision_train_in_float32(dense):
  half = jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16), dense)
  after = tuned(half, dense, steps=300, optimizer=optax.sgd(1e-4))
  assert {v.dtype for v in jax.tree.leaves(after)} == {jnp.dtype('bfloat16')}
  # Steps too small for bfloat16 add up.
  assert not np.array_equal(after['bias'], half['bias'])


def test_balanced_pairs_are_the_same_function(small, dense):
  """Also where they are stored with an identity block afterwards."""
  nothing = tuned(small, dense, steps=1, optimizer=optax.sgd(0.0), balance=True)
  for b in DATA:
    one, two = (ur.low_rank(fn)(t, b) for t in (small, nothing))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
  after = tuned(small, dense, balance=True)
  assert ur.count_params(after) == ur.count_params(small)
  assert after['up'].order is not None
  assert score(after, DATA, labels) < score(small, DATA, labels)


def normed(params, batch, train=False):
  h = batch['x'] @ params['up']
  stats = params['batch_stats']
  mean, var = stats['mean'], stats['var']
  if train:
    mean, var = h.mean(0), h.var(0)
  h = (h - mean) / jnp.sqrt(var + 1e-3) + params['bias']
  return jnp.tanh(h) @ params['down'], (mean, var)


def statistics(params, batch):
  _, found = normed(params, batch, train=True)
  old = params['batch_stats']
  new = {
    name: 0.9 * old[name] + 0.1 * value
    for name, value in zip(('mean', 'var'), found, strict=True)
  }
  return {**params, 'batch_stats': new}


@pytest.mark.parametrize('norms', ['frozen', 'trained', 'reestimated'])
def test_running_statistics(dense, norms):
  variables = {
    **dense,
    'batch_stats': {'mean': jnp.zeros(F), 'var': jnp.full(F, 4.0)},
  }
  run = lambda params, batch: normed(params, batch)[0]
  moments = ur.collect(run, variables, DATA, progress=False)
  small = ur.factorize(variables, moments, {'up': 3}, progress=False)
  how = {} if norms == 'frozen' else {'statistics': statistics}
  result = ur.finetune(
    run, small, variables, DATA, loss=labels, steps=4, norms=norms,
    optimizer=optax.sgd(0.0), progress=False,
    train_fn=lambda p, b, rng: normed(p, b, train=True)[0], **how,
  )  # fmt: skip
  count = {'frozen': 0, 'trained': 4, 'reestimated': 100}[norms]
  factor = np.asarray(small['up'].dense(), np.float64)
  # Mean compensation of the factors is in the running mean already.
  before = small['batch_stats'].items()
  want = {k: np.asarray(v, np.float64) for k, v in before}
  for i in range(count):
    h = DATA[i % 4]['x'] @ factor
    if (c := small['up'].c) is not None:
      h = h + np.asarray(c, np.float64)
    for name, value in (('mean', h.mean(0)), ('var', h.var(0))):
      want[name] = 0.9 * want[name] + 0.1 * value
  for name, value in want.items():
    np.testing.assert_allclose(
      result['batch_stats'][name], value, rtol=1e-4, atol=1e-5
    )


def test_reestimated_statistics_must_not_be_worse(dense):
  variables = {
    **dense, 'batch_stats': {'mean': jnp.zeros(F), 'var': jnp.ones(F)},
  }  # fmt: skip
  spoil = lambda params, batch: {
    **params, 'batch_stats': {'mean': jnp.full(F, 9.0), 'var': jnp.ones(F)},
  }  # fmt: skip
  run = lambda params, batch: normed(params, batch)[0]
  result = ur.finetune(
    run, variables, variables, DATA, steps=1, norms='reestimated',
    optimizer=SGD, statistics=spoil, validation=DATA, progress=False,
  )  # fmt: skip
  np.testing.assert_array_equal(result['batch_stats']['mean'], 0)


def test_events_for_tensorboard(small, dense, tmp_path, monkeypatch):
  with pytest.raises(ImportError, match='needs the package tensorboardX'):
    monkeypatch.setitem(sys.modules, 'tensorboardX', None)
    tuned(small, dense, directory=tmp_path / 'a', tensorboard=True)
  written = []

  class Writer:
    def __init__(self, folder, purge_step):
      written.append((folder, purge_step))

    def add_scalar(self, name, value, step):
      written.append((name, step))

    def close(self):
      written.append('closed')

  fake = types.SimpleNamespace(SummaryWriter=Writer)
  monkeypatch.setitem(sys.modules, 'tensorboardX', fake)
  tuned(small, dense, directory=tmp_path / 'b', tensorboard=True, log_every=3)
  assert written[0] == (str(tmp_path / 'b'), 1)
  assert {('loss', 3), ('loss', 6), ('grad_norm', 6)} < set(written[1:])
  assert written[-1] == 'closed'
  with pytest.raises(ValueError, match='writes into directory='):
    tuned(small, dense, tensorboard=True)


def test_a_loss_that_is_not_finite_names_its_step(small, dense):
  def poisoned(start):
    for step in itertools.count(start):
      x = np.full_like(X[:8], np.nan) if step == 3 else X[:8]
      yield {'x': x, 'y': Y[:8]}

  with pytest.raises(train.DivergedError, match='at step 4'):
    tuned(small, dense, poisoned)


@pytest.mark.parametrize(
  ('how', 'message'),
  [
    ({'loss': None, 'distill_weight': 0.5}, 'leaves 0.5 to a loss of labels'),
    ({'distill_weight': 1.5}, r'must be in \[0, 1\]'),
    ({'norms': 'thawed'}, "norms='thawed'"),
    ({'norms': 'trained'}, "norms='trained' and no statistics="),
    ({'patience': 3}, 'are of validation='),
    ({'steps': 0}, 'steps=0; it must be at least 1'),
    ({'ema': 1.0}, 'ema=1.0'),
    ({'batch_axes': ('data',)}, 'pass mesh= as well'),
    (
      {'batch_axes': ('b',), 'mesh': jax.make_mesh((2,), ('a',))},
      r"batch_axes has \['b'\]; the mesh has \['a'\]",
    ),
    ({'loss': lambda z, b: labels(z, b).mean()}, r'loss gives \(\)'),
    ({'validation': iter(DATA)}, 'validation is an iterator'),
    ({'validation': []}, 'validation has no batches'),
  ],
)
def test_wrong_options(small, dense, how, message):
  with pytest.raises(ValueError, match=message):
    tuned(small, dense, **how)


def test_a_validation_that_is_not_finite_names_its_step(small, dense):
  never = lambda outputs, batch: labels(outputs, batch) * jnp.nan
  with pytest.raises(train.DivergedError, match='after step 0 gives nan'):
    tuned(small, dense, validation=DATA, metric=never, validate_every=2)


def test_several_processes_are_refused(small, dense, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 3)
  with pytest.raises(ValueError, match='in a single process.*there are 3'):
    tuned(small, dense)


def test_batches_that_end(small, dense):
  with pytest.raises(ValueError, match='batches end after 4 of 6 steps'):
    tuned(small, dense, iter(DATA))
  with pytest.raises(ValueError, match='batches end after 0'):
    tuned(small, dense, [])
  with pytest.raises(TypeError, match='optimizer is a str'):
    tuned(small, dense, optimizer='adam')
