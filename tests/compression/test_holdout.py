"""With few data the nearest on other data is taken, and said to be so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.compression import factor_pairs
from utilized_rank.compression import holdout
from utilized_rank.compression.problem import Budget
from utilized_rank.compression.problem import Problem

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
PARAMS = {'w': draw(24, 16)}


def fn(params, x):
  return (x @ params['w']).sum(1)


def compressed(x, **options):
  # What is chosen, not trained.
  given = {'params_fraction': 0.5, 'refine': 0, 'progress': False}
  return ur.compress(fn, PARAMS, [x], **given, **options)


def test_positions_that_are_alike_leave_the_truncated_svd():
  """12 examples of 20 equal rows: 10 rows for a feature, and half a one."""
  x = jnp.repeat(draw(12, 1, 24), 20, axis=1)
  _, report = compressed(x)
  assert report.recipe.method == 'weight'
  first, *others = report.choice.contenders
  assert (first.name, first.judged) == (
    'hold-out: truncated SVD',
    'examples held out',
  )
  assert len(others) >= 2 and not any(one.chosen for one in others)
  assert report.choice.divergence == first.divergence
  assert [stage.name for stage in report.choice.stages] == [
    'collect', 'measure', 'hold-out', 'compress'
  ]  # fmt: skip
  # Who knows better says so.
  _, report = compressed(x, few=False)
  assert report.recipe.method == 'output'
  varied = draw(12, 20, 24)
  assert compressed(varied)[1].choice.stages[2].name == 'ranks'
  assert compressed(varied, few=True)[1].choice.stages[2].name == 'hold-out'


@pytest.mark.parametrize(
  'sizes', [[1], [2], [3], [9], [4, 4], [5, 3], [2, 2, 2], [1] * 4, [2] * 9]
)
def test_every_example_is_in_one_part(sizes):
  batches = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
  parts = holdout._parts(batches)
  assert len(parts) == min(4, sum(sizes)) or len(sizes) in (2, 3)
  assert 1 <= len(parts) <= 6 and all(parts)
  every = np.concatenate([batch for part in parts for batch in part])
  assert sorted(every.tolist()) == list(range(sum(sizes)))


def problem(x):
  batches = jnp.split(x, 4)
  return Problem(
    fn=fn,
    params=PARAMS,
    start=PARAMS,
    moments=ur.collect(fn, PARAMS, batches, progress=False),
    batches=batches,
    training=batches,
    budget=Budget(params_fraction=0.5),
    divergence=ur.squared_error,
    loss=None,
    anchored=True,
    progress=False,
  )


def test_who_judges_has_made_nothing():
  """Against moments in numpy of the three other parts."""
  whole = problem(draw(16, 2, 24))
  turns = holdout._turns(whole, holdout._parts(whole.batches))
  for judge, (part, judging) in zip((3, 0), turns, strict=True):
    rest = [b for i, b in enumerate(whole.batches) if i != judge]
    rows = np.concatenate(rest).reshape(-1, 24).astype(np.float64)
    got = np.asarray(part.moments['w'].second, np.float64)
    # Sums of 24 rows in float32.
    np.testing.assert_allclose(got, rows.T @ rows / len(rows), atol=1e-5)
    (own,) = judging
    np.testing.assert_array_equal(own, whole.batches[judge])
    assert len(part.batches) == 3


def test_what_is_taken_is_made_of_all_examples():
  """Inputs of two dimensions: closed form is exact, nothing beats it."""
  x = draw(12, 1, 2) @ draw(2, 24)
  whole = problem(x)
  best = holdout.nearest_unsearched(whole)
  assert best.name == factor_pairs.CLOSED_FORM
  want = factor_pairs.closed_form(whole)
  jax.tree.map(np.testing.assert_array_equal, best.tree, want.tree)
  ranks = ur.budget_ranks(
    PARAMS, whole.moments, params_fraction=0.5, progress=False
  )
  assert want.ranks == ranks
