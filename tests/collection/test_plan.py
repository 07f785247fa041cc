"""What a collection will cost, and collections that have to fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.walk import cost

RNG = np.random.default_rng(0)
SHAPES = {'q': (64, 32), 'k': (64, 32), 'up': (32, 160), 'down': (160, 64)}
PARAMS = {p: RNG.normal(size=s).astype(np.float32) for p, s in SHAPES.items()}
BATCHES = [RNG.normal(size=(10, 64)).astype(np.float32) for _ in range(3)]


def model(params, x):
  h = jnp.tanh(x @ params['q'] + x @ params['k'])
  return jnp.tanh(h @ params['up']) @ params['down']


def test_a_plan_counts_by_hand():
  shapes = {p: jax.ShapeDtypeStruct(s, 'f4') for p, s in SHAPES.items()}
  costs = ur.plan(model, shapes, jax.ShapeDtypeStruct((10, 64), jnp.float32))
  sums = lambda d: 4 * (d * d + d + 1)
  assert [k.sums_bytes for k in costs.kernels.values()] == [
    sums(64),
    0,  # k reads what q reads
    sums(32),
    sums(160),
  ]
  assert costs.sums_bytes == sums(64) + sums(32) + sums(160)
  assert costs.forward_flops == 20 * sum(d * m for d, m in SHAPES.values())
  least = 10 * sum(d * (d + 1) for d in (64, 32, 160))
  assert costs.floor == 1 + least / costs.forward_flops
  assert costs.passes == (('q', 'k', 'up', 'down'),)
  text = str(costs)
  assert 'shared' in text and '1 pass (no limit)' in text
  with_loss = ur.plan(model, PARAMS, BATCHES[0], loss=mean_square)
  assert with_loss.kernels['up'].grad_bytes == 4 * 160 * 160
  # Cotangents go back through what has kernels before it.
  rows = len(BATCHES[0])
  back = sum(d * m for d, m in (SHAPES['up'], SHAPES['down']))
  assert with_loss.backward_flops == 2 * rows * back
  of_gradients = sum(2 * rows * m * m for _, m in SHAPES.values())
  assert with_loss.gram_flops == of_gradients + 2 * rows * (
    64**2 + 32**2 + 160**2
  )


def mean_square(outputs, batch):
  del batch
  return jnp.mean(outputs**2, axis=1)


def test_products_are_counted_inside_everything():
  w, x = jnp.ones((4, 4)), jnp.ones((2, 4))
  one = 2 * 2 * 4 * 4
  scanned = lambda w, x: jax.lax.scan(
    lambda c, _: (jax.jit(jnp.matmul)(c, w), None), x, length=5
  )[0]
  branched = lambda w, x: jax.lax.cond(
    x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x
  )
  assert cost.forward_flops(scanned, w, x) == 5 * one
  assert cost.forward_flops(branched, w, x) == 2 * one
  grouped = lambda w, x: jax.lax.conv_general_dilated(
    x, w, (1,), 'VALID', feature_group_count=2
  )
  kernel, image = jnp.ones((6, 2, 3)), jnp.ones((5, 4, 10))
  got = cost.forward_flops(grouped, kernel, image)
  assert got == 2 * (5 * 6 * 8) * (2 * 3)


def test_the_prediction_is_what_the_step_needs():
  costs = ur.plan(model, PARAMS, BATCHES[0])
  arrays = costs.arguments_bytes + costs.sums_bytes
  assert costs.forward_bytes > costs.arguments_bytes
  # The sums in place, and at most one batch's own beside them.
  assert arrays < costs.peak_bytes < arrays + costs.sums_bytes + 2e5


@pytest.mark.parametrize('loss', [None, mean_square])
def test_passes_give_the_same_moments(loss):
  whole = ur.plan(model, PARAMS, BATCHES[0], loss=loss)
  limit = int(whole.peak_bytes * 0.9)
  split = ur.plan(model, PARAMS, BATCHES[0], loss=loss, memory_limit=limit)
  assert len(split.passes) > 1 and split.peak_bytes <= limit
  assert sorted(sum(split.passes, ())) == sorted(SHAPES)
  one = ur.collect(model, PARAMS, BATCHES, loss=loss, progress=False)
  many = ur.collect(
    model, PARAMS, BATCHES, loss=loss, memory_limit=limit, progress=False
  )
  assert many.table == one.table
  for path in one:
    np.testing.assert_allclose(
      many[path].second, one[path].second, rtol=1e-5, atol=1e-6
    )
    if loss is not None:
      np.testing.assert_allclose(many[path].grad, one[path].grad, rtol=1e-5)


def test_what_does_not_fit_is_refused():
  limit = int(ur.plan(model, PARAMS, BATCHES[0]).peak_bytes * 0.9)
  run = lambda batches, limit, **kwargs: ur.collect(
    model, PARAMS, batches, memory_limit=limit, progress=False, **kwargs
  )
  with pytest.raises(ValueError, match='passes .* list_iterator that ends'):
    run(iter(BATCHES), limit)
  with pytest.raises(ValueError, match=r"\['down'\] need .* memory_limit is"):
    run(BATCHES, 1000)
  with pytest.raises(ValueError, match='no kernel'):
    ur.plan(lambda p, x: x + p, jnp.ones(3), jnp.ones((2, 3)))

  class Shrinking:
    starts = 0

    def __iter__(self):
      self.starts += 1
      return iter(BATCHES[: 4 - self.starts])

  with pytest.raises(ValueError, match='must yield the same batches'):
    run(Shrinking(), limit, loss=mean_square)


class Interrupted(Exception):
  pass


class Cut:
  """Batches that start anew, and end early when `left` have been read."""

  def __init__(self, left):
    self.left = left

  def __iter__(self):
    for batch in BATCHES:
      if not self.left:
        raise Interrupted
      self.left -= 1
      yield batch


# All of them are read in each of two passes.
@pytest.mark.parametrize('stop', [2, 3, 5])
def test_passes_that_are_interrupted_go_on(tmp_path, stop):
  limit = int(ur.plan(model, PARAMS, BATCHES[0]).peak_bytes * 0.9)
  run = functools.partial(
    ur.collect,
    model,
    params=PARAMS,
    memory_limit=limit,
    checkpoint_dir=tmp_path / 'sums',
    checkpoint_every=1,
    progress=False,
  )
  with pytest.raises(Interrupted):
    run(batches=Cut(stop))
  done = {path.name for path in (tmp_path / 'sums').glob('*.npz')}
  assert len(done) == (stop >= 3)
  with pytest.raises(ValueError, match='no running sums'):
    run(batches=BATCHES, memory_limit=None)
  if done:
    q, k, up = (PARAMS[p] for p in ('q', 'k', 'up'))
    other = {**PARAMS, 'q': q[:, :31], 'k': k[:, :31], 'up': up[:31]}
    with pytest.raises(ValueError, match='is of other kernels'):
      run(batches=BATCHES, params=other)
  got = run(batches=BATCHES)
  assert not (tmp_path / 'sums').exists()
  want = ur.collect(model, PARAMS, BATCHES, memory_limit=limit, progress=False)
  assert got.table == want.table and {e.number for e in got.table} == {0, 1}
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_folder_of_something_else_is_no_passes(tmp_path):
  limit = int(ur.plan(model, PARAMS, BATCHES[0]).peak_bytes * 0.9)
  (tmp_path / 'process-0-of-1').mkdir()
  with pytest.raises(ValueError, match="in 2 passes by 1 .* 'process-0-of-1'"):
    ur.collect(
      model,
      PARAMS,
      BATCHES,
      memory_limit=limit,
      checkpoint_dir=tmp_path,
      progress=False,
    )
