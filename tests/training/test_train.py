"""Training: exact resumption, detection of NaN, exact evaluation."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utilized_rank.losses.logits import cross_entropy
from utilized_rank.losses.logits import distillation
from utilized_rank.storage import resume
from utilized_rank.training import optimizers
from utilized_rank.training import train

# When one of orbax's parallel reads of a damaged file fails, the others may
# report to an event loop that is closed already.
pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning'),
]

CONFIG = train.TrainConfig(
  steps=8,
  batch_size=16,
  learning_rate=3e-2,
  warmup_steps=2,
  weight_decay=0.1,
  label_smoothing=0.1,
  seed=3,
  checkpoint_every=2,
  log_every=2,
)


class Interrupted(Exception):
  pass


def forward(params, images, *, train, rng):
  x = images.reshape(len(images), -1)
  x = jnp.tanh(x @ params['one']['kernel'] + params['one']['bias'])
  if train:
    x = x * jax.random.bernoulli(rng, 0.9, x.shape)
  return x @ params['two']['kernel']


@pytest.fixture
def params():
  rng = np.random.default_rng(0)
  return {
    'one': {
      'kernel': jnp.asarray(rng.normal(size=(4, 8)), jnp.float32),
      'bias': jnp.zeros(8),
    },
    'two': {'kernel': jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)},
  }


def batch(step):
  """Three noisy classes on the plane of the first two pixels."""
  rng = np.random.default_rng(step)
  labels = rng.integers(0, 3, 16).astype(np.int32)
  images = rng.normal(scale=0.3, size=(16, 2, 2, 1)).astype(np.float32)
  images[:, 0, 0, 0] += labels
  images[:, 0, 1, 0] -= labels == 1
  return {'image': images, 'label': labels}


def batches(start):
  return map(batch, itertools.count(start))


def interrupted(at):
  def stream(start):
    for step in itertools.count(start):
      if step == at:
        raise Interrupted
      yield batch(step)

  return stream


def assert_identical(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def records(directory):
  lines = (directory / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  for row in rows:
    assert row.pop('examples_per_second') > 0
  return rows


@pytest.mark.parametrize('at', [2, 5])
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(params, tmp_path, at):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  expected = train.fit(forward, params, batches, CONFIG, directory=whole)
  with pytest.raises(Interrupted):
    train.fit(forward, params, interrupted(at), CONFIG, directory=parts)
  actual = train.fit(forward, params, batches, CONFIG, directory=parts)
  assert_identical(actual, expected)
  assert records(parts) == records(whole)
  assert [row['step'] for row in records(whole)] == [2, 4, 6, 8]
  # And a third start has nothing left to do.
  done = train.fit(forward, params, interrupted(8), CONFIG, directory=parts)
  assert_identical(done, expected)
  assert records(parts) == records(whole)


def test_params_stay_the_callers(params):
  before = jax.tree.map(np.array, params)
  train.fit(forward, params, batches, CONFIG)
  assert_identical(jax.tree.map(np.array, params), before)


def test_loss_decreases(params):
  config = dataclasses.replace(CONFIG, steps=60)
  trained = train.fit(forward, params, batches, config)
  held_out = [batch(1000), batch(1001)]
  before = train.evaluate(forward, params, held_out)
  after = train.evaluate(forward, trained, held_out)
  assert after['cross_entropy'] < 0.5 * before['cross_entropy']
  assert after['accuracy'] > before['accuracy']


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_divergence_stops_and_names_the_steps(params, tmp_path, bad):
  def poisoned(start):
    for step in itertools.count(start):
      values = batch(step)
      if step == 4:
        values['image'][3] = bad
      yield values

  config = dataclasses.replace(CONFIG, checkpoint_every=0, log_every=3)
  with pytest.raises(
    train.DivergedError, match='loss is nan at step 5, seen in steps 4 to 6'
  ):
    train.fit(forward, params, poisoned, config, directory=tmp_path)
  # Nothing that is not finite was kept.
  with resume.Checkpoints(tmp_path, {}) as checkpoints:
    assert checkpoints.restore(params) is None


def test_damaged_checkpoint(params, tmp_path):
  train.fit(forward, params, batches, CONFIG, directory=tmp_path)
  files = [p for p in tmp_path.rglob('*') if p.is_file()]
  newest = [p for p in files if '8' in p.relative_to(tmp_path).parts[0]]
  for path in newest:
    if path.parent.name == 'd':
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(ValueError, match='checkpoint of step 8.*is damaged'):
    train.fit(forward, params, batches, CONFIG, directory=tmp_path)


def test_damaged_metadata(params, tmp_path):
  train.fit(forward, params, batches, CONFIG, directory=tmp_path)
  for path in tmp_path.rglob('*METADATA*'):
    path.write_text('{')
  with pytest.raises(ValueError, match='is damaged .*delete that step to go'):
    train.fit(forward, params, batches, CONFIG, directory=tmp_path)


def test_flipped_bit(params, tmp_path, monkeypatch):
  state = {'w': np.arange(64, dtype=np.float32)}
  with resume.Checkpoints(tmp_path, {}) as checkpoints:
    # orbax stores the wrong number, and reads it back without a word.
    monkeypatch.setattr(resume, '_crc32', lambda array: 1)
    checkpoints.save(1, state)
    monkeypatch.undo()
  with (
    resume.Checkpoints(tmp_path, {}) as checkpoints,
    pytest.raises(ValueError, match='wrong checksum of w'),
  ):
    checkpoints.restore(state)


def test_checkpoint_of_another_run(params, tmp_path):
  train.fit(forward, params, batches, CONFIG, directory=tmp_path)
  other = dataclasses.replace(CONFIG, learning_rate=0.5)
  with pytest.raises(ValueError, match="learning_rate='0.03'; this run has"):
    train.fit(forward, params, batches, other, directory=tmp_path)
  wide = {**params, 'two': {'kernel': jnp.zeros((8, 5))}}
  with pytest.raises(ValueError, match=r'two/kernel as float32\[8, 3\]'):
    train.fit(forward, wide, batches, CONFIG, directory=tmp_path)
  more = {**params, 'three': jnp.zeros(2)}
  with pytest.raises(ValueError, match='another tree'):
    train.fit(forward, more, batches, CONFIG, directory=tmp_path)


def test_checkpoints_keep_types_and_nodes(tmp_path):
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass
  class Pair:
    a: jax.Array
    b: jax.Array

  state = {
    'x/y': Pair(jnp.ones((2, 3), jnp.bfloat16), jnp.arange(3)),
    'z': (jnp.float32(2.5), [jnp.zeros(1, bool)]),
  }
  with resume.Checkpoints(tmp_path, {'k': 1}) as checkpoints:
    assert checkpoints.restore(state) is None
    for step in (1, 2, 3):
      checkpoints.save(step, state)
  with resume.Checkpoints(tmp_path, {'k': 1}) as checkpoints:
    step, restored = checkpoints.restore(state)
  assert step == 3
  assert_identical(restored, state)
  assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(
    lambda x: x.dtype, state
  )


def test_weight_decay_takes_kernels_and_factors_only():
  leaf, vector = jnp.ones((2, 2)), jnp.ones(2)
  names = {
    'kernel': leaf,
    'bias': vector,
    # Biases of attention and of stacked layers have two axes.
    'query/bias': leaf,
    'query/kernel/a': leaf,
    'query/kernel/b': leaf,
    'query/kernel/c': leaf,
    # B' of a pair with an identity block has its order's digest in its key.
    'value/kernel/b_3fa9c21e': leaf,
    'value/kernel/b_a': vector,
    'cls': leaf,
  }
  decayed = optimizers._decayed(CONFIG.decay_rule, set(), names)
  assert [name for name, is_decayed in decayed.items() if is_decayed] == [
    'kernel',
    'query/kernel/a',
    'query/kernel/b',
    'value/kernel/b_3fa9c21e',
  ]


def test_distillation_gradient_against_numpy():
  rng = np.random.default_rng(0)
  z, t = rng.normal(size=(2, 5, 7))
  temperature = 3.0

  def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)

  expected = temperature * (softmax(z / temperature) - softmax(t / temperature))
  grad = jax.grad(lambda z, t: distillation(z, t, temperature).sum(), (0, 1))(
    z.astype(np.float32), t.astype(np.float32)
  )
  np.testing.assert_allclose(grad[0], expected, atol=1e-6)
  assert not grad[1].any()
  same = distillation(jnp.asarray(z), jnp.asarray(z), temperature)
  np.testing.assert_allclose(same, 0, atol=1e-5)


def test_cross_entropy_against_numpy():
  rng = np.random.default_rng(0)
  z, y = rng.normal(size=(5, 4)), np.array([0, 1, 2, 3, 3])
  log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
  target = 0.8 * np.eye(4)[y] + 0.2 / 4
  np.testing.assert_allclose(
    cross_entropy(jnp.asarray(z), jnp.asarray(y), 0.2),
    -(target * log_p).sum(axis=-1),
    rtol=1e-5,
  )


def test_evaluate_is_exact_with_a_ragged_batch(params):
  whole = batch(0)
  parts = [
    {key: value[i:j] for key, value in whole.items()}
    for i, j in ((0, 7), (7, 14), (14, 16))
  ]
  logits = np.asarray(
    forward(params, whole['image'], train=False, rng=None), np.float64
  )
  log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  result = train.evaluate(forward, params, parts)
  assert result['count'] == 16
  assert result['accuracy'] == np.mean(logits.argmax(-1) == whole['label'])
  np.testing.assert_allclose(
    result['cross_entropy'],
    -log_p[np.arange(16), whole['label']].mean(),
    rtol=1e-6,
  )
  # A larger batch after a smaller one changes the padding, not the result.
  again = train.evaluate(forward, params, parts[::-1])
  assert again['accuracy'] == result['accuracy']


@pytest.mark.parametrize('classes', [3, 9])
def test_evaluate_counts_the_five_best(classes):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(50, classes)).astype(np.float32)
  labels = rng.integers(0, classes, 50)
  best = np.argsort(-logits, axis=1)
  table = lambda params, images, *, train, rng: params[images[:, 0, 0, 0]]
  images = np.arange(50).reshape(50, 1, 1, 1)
  result = train.evaluate(
    table, jnp.asarray(logits), [{'image': images, 'label': labels}]
  )
  for name, count in (('correct', 1), ('top5_correct', 5)):
    expected = (best[:, :count] == labels[:, None]).any(axis=1).sum()
    assert result[name] == expected
  assert result['top5_accuracy'] == result['top5_correct'] / 50


def test_evaluate_ignores_what_padding_gives(params):
  def fragile(params, images, *, train, rng):
    # Zero images, as the padding is, give NaN.
    return (
      images.reshape(len(images), -1)[:, :3] / images.sum((1, 2, 3))[:, None]
    )

  whole = batch(0)
  parts = [whole, {key: value[:3] for key, value in whole.items()}]
  assert np.isfinite(train.evaluate(fragile, params, parts)['cross_entropy'])


def test_evaluate_refuses_nothing(params):
  with pytest.raises(ValueError, match='no example'):
    train.evaluate(forward, params, [])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'steps': 0}, 'steps=0; it must be at least 1'),
    ({'warmup_steps': 8}, r'warmup_steps=8; it must be in \[0, steps=8\)'),
    ({'label_smoothing': 1.0}, 'label_smoothing=1.0'),
    ({'learning_rte': 1.0}, "unknown key 'learning_rte'.*'learning_rate'"),
    ({'decay_rule': 'w.*'}, "decay_rule='w.*' matches no leaf"),
  ],
)
def test_bad_options(params, change, message):
  config = {**dataclasses.asdict(CONFIG), **change}
  with pytest.raises(ValueError, match=message):
    train.fit(forward, params, batches, config)
