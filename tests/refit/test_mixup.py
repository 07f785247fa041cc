"""Mixtures of examples, and what a tree learns from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.refit.mixup import can_mix
from utilized_rank.refit.mixup import mixed


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


def test_few_examples_go_further():
  """On examples that were not there: 48 of them train 24 features."""
  random = np.random.default_rng(0)
  draw = lambda *shape: random.normal(size=shape).astype(np.float32)
  params = {'w': draw(24, 48) / 5, 'v': draw(48, 6) / 7}
  fn = lambda p, x: jnp.tanh(x @ p['w']) @ p['v']
  few, others = draw(60, 24), draw(512, 24)
  moments = ur.collect(fn, params, [few], progress=False)
  ranks = ur.uniform_ranks(params, moments, params_fraction=0.5)
  small = ur.factorize(params, moments, ranks, progress=False)

  def far(mixup):
    tree = ur.distill(
      fn, params, small, [few], steps=400, learning_rate=0.02, mixup=mixup,
      progress=False,
    )  # fmt: skip
    error = ur.low_rank(fn)(tree, others) - fn(params, others)
    return float(jnp.sum(error**2))

  assert far(True) < far(False)
