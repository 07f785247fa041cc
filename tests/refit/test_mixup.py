"""Mixtures of examples, and what a tree learns from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.refit.mixup import can_mix
from utilized_rank.refit.mixup import can_splice
from utilized_rank.refit.mixup import mixed
from utilized_rank.refit.mixup import mixing
from utilized_rank.refit.mixup import spliced


def test_a_mixture_lies_between_two_examples():
  random = np.random.default_rng(0)
  x = random.normal(size=(64, 3)).astype(np.float32)
  y = np.arange(64)
  found = mixed({'x': x, 'y': y}, np.random.default_rng(1))
  np.testing.assert_array_equal(found['y'], y)
  is_same = (found['x'] == x).all(1)
  assert is_same.sum() < 8  # its own partner, by chance
  for i in np.flatnonzero(~is_same):
    by = found['x'][i] - x[i]
    way = x - x[i]  # towards one of the others, and no further
    length = np.linalg.norm(way, axis=1)
    cosine = way @ by / (np.maximum(length, 1e-9) * np.linalg.norm(by))
    to = np.argmax(cosine)
    assert cosine[to] > 1 - 1e-4  # float32 differences
    assert np.linalg.norm(by) <= length[to] * (1 + 1e-4)


@pytest.mark.parametrize('dtype', [np.float16, jnp.bfloat16, np.uint8])
def test_shapes_and_dtypes_stay(dtype):
  x = np.random.default_rng(0).integers(0, 255, (8, 4, 4, 3)).astype(dtype)
  found = mixed(x, np.random.default_rng(0))
  assert found.shape == x.shape and found.dtype == dtype
  assert np.any(found != x)
  assert found.min() >= x.min() and found.max() <= x.max()


@pytest.mark.parametrize(
  'batch',
  [
    np.zeros((4, 16), np.int32),
    np.zeros((4, 16), np.uint8),
    {'tokens': np.zeros((4, 16), np.int32), 'at': np.zeros((4, 16))},
    {'x': np.zeros((4, 16)), 'mask': np.ones((4, 16), bool)},
    {'label': np.zeros(4, np.int32)},
    jax.random.split(jax.random.key(0), 4),
  ],
)
def test_what_is_no_number_is_not_mixed(batch):
  assert not can_mix(batch)


TOKENS = {'tokens': np.arange(96).reshape(6, 16), 'label': np.arange(6)}


def test_one_sequence_goes_on_as_another():
  """Every position stays where it is, and all arrays change at one place."""
  batch = TOKENS | {
    'mask': np.arange(96).reshape(6, 16) % 5 > 1,
    'features': np.random.default_rng(0).normal(size=(6, 16, 3)),
  }
  places, partners = set(), set()
  for seed in range(20):
    found = spliced(batch, np.random.default_rng(seed))
    for name, value in batch.items():
      assert found[name].shape == value.shape
      assert found[name].dtype == value.dtype
    np.testing.assert_array_equal(found['label'], batch['label'])
    row, place = np.divmod(found['tokens'], 16)
    np.testing.assert_array_equal(place, np.tile(np.arange(16), (6, 1)))
    for name in ('mask', 'features'):
      np.testing.assert_array_equal(found[name], batch[name][row, place])
    for i, origin in enumerate(row):
      others = set(origin[origin != i])
      assert len(others) <= 1
      cut = int(np.sum(origin == i)) if others else 16
      # First its own, then the other's.
      assert (origin[:cut] == i).all() and (origin[cut:] != i).all()
      places.add(cut)
      partners |= {(i, other) for other in others}
  assert places == set(range(17))
  assert len(partners) == 30


@pytest.mark.parametrize(
  ('batches', 'way'),
  [
    ([TOKENS, TOKENS], spliced),
    ([{'x': np.zeros((4, 16))}], mixed),
    ([np.zeros((4, 8, 8, 3), np.uint8)], mixed),
    ([TOKENS | {'mask': np.ones((6, 16), bool)}], spliced),
    # Of other lengths: what it would be spliced with is not there.
    ([TOKENS | {'memory': np.zeros((6, 9, 4))}], None),
    ([TOKENS, {'tokens': np.zeros((6, 1), int), 'label': np.zeros(6, int)}],
     None),
    ([{'label': np.zeros(4, np.int32)}], None),
    ([{'tokens': np.zeros((4, 3), int),
       'key': jax.random.split(jax.random.key(0), 4)}], None),
  ],
)  # fmt: skip
def test_how_examples_are_mixed(batches, way):
  assert mixing(batches) is way
  # An image of bytes could be spliced as well: averages come first.
  assert way is mixed or can_splice(batches[-1]) == (way is spliced)


def assert_mixtures_help(fn, params, few, others, fraction, steps):
  """On examples that were not there, what is trained on mixtures is nearer."""
  moments = ur.collect(fn, params, [few], progress=False)
  ranks = ur.uniform_ranks(params, moments, params_fraction=fraction)
  small = ur.factorize(params, moments, ranks, progress=False)

  def far(mixup):
    tree = ur.distill(
      fn, params, small, [few], steps=steps, learning_rate=0.02, mixup=mixup,
      progress=False,
    )  # fmt: skip
    error = ur.low_rank(fn)(tree, others) - fn(params, others)
    return float(jnp.sum(error**2))

  assert far(True) < far(False)


def test_few_sequences_go_further():
  random = np.random.default_rng(0)
  draw = lambda *shape: random.normal(size=shape).astype(np.float32)
  params = {'table': draw(32, 24), 'w': draw(24, 48) / 5, 'v': draw(48, 6) / 7}

  def fn(p, x):
    h = p['table'][x]
    h = jnp.cumsum(h, 1) / jnp.arange(1, 9)[:, None]
    return jnp.tanh(h @ p['w']) @ p['v']

  few, others = (random.integers(0, 32, (n, 8)) for n in (40, 512))
  assert_mixtures_help(fn, params, few, others, 0.4, 300)


def test_few_examples_go_further():
  """48 of them train 24 features."""
  random = np.random.default_rng(0)
  draw = lambda *shape: random.normal(size=shape).astype(np.float32)
  params = {'w': draw(24, 48) / 5, 'v': draw(48, 6) / 7}
  fn = lambda p, x: jnp.tanh(x @ p['w']) @ p['v']
  assert_mixtures_help(fn, params, draw(60, 24), draw(512, 24), 0.5, 400)
