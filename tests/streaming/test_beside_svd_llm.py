"""Streamed factors beside SVD-LLM's, of the same ranks and covariances."""

import llamas
import numpy as np
import pytest

from benchmarks.shared import svd_llm
import utilized_rank as ur
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.models.importing import load_checkpoint
from utilized_rank.tree import paths

pytestmark = [
  pytest.mark.slow,
  # Rows are few here.
  pytest.mark.filterwarnings('ignore:.* rows for'),
]

QUIET = {'progress': False}


def kernels(folder, out, batches):
  """Of each kernel (dense W, streamed W', rank, sum of x x^T) in float64."""
  model, params, _ = load_checkpoint(str(folder))
  recipe = ur.compress_checkpoint(
    folder,
    out,
    batches,
    params_fraction=0.5,
    uniform=True,
    anchored=False,  # whose factors are not of these covariances
    **QUIET,
  )
  rules = [(path, True) for path in recipe.ranks] + [('.*', False)]
  moments = ur.collect(model.apply, params, batches, select=rules, **QUIET)
  dense, _ = paths.flatten(params)
  small, _ = paths.flatten(load_checkpoint(str(out))[1], is_low_rank)
  for path, rank in recipe.ranks.items():
    matrix = lambda leaf: np.asarray(leaf, np.float64).reshape(
      moments[path].layout.matrix_shape  # noqa: B023 (used before the next)
    )
    second = np.asarray(moments[path].sums.second, np.float64)
    yield matrix(dense[path]), matrix(small[path].dense()), rank, second


@pytest.mark.parametrize('shape', [(4, 4, 12), (1, 1, 9), (1, 1, 4)], ids=str)
def test_error_at_outputs_is_never_above(shape, tmp_path):
  llamas.write(tmp_path / 'in')
  batches = list(np.random.default_rng(1).integers(0, 19, shape))
  deficient = np.prod(shape) < 16  # rows; inputs have 16 features, or 24
  eps = float(np.finfo(np.float32).eps)
  count = 0
  for w, streamed, rank, second in kernels(
    tmp_path / 'in', tmp_path / 'out', batches
  ):
    white = svd_llm.whitening(second)
    assert (white.jitter > 0) == deficient
    a, b = svd_llm.factors(w, white, rank)
    theirs = svd_llm.error(w, a @ b, second)
    energy = svd_llm.error(w, 0, second)
    if not deficient:  # the reference is what it should be: the optimum
      singular = np.linalg.svd(white.factor.T @ w, compute_uv=False)
      np.testing.assert_allclose(theirs, np.sum(singular[rank:] ** 2), 1e-8)
    # Both are the optimum of S. Ours are stored in float32, and read sums of
    # float32 that were added in another order; at the optimum that counts
    # squared (found: 4e-8). The sums know nothing below eps of the outputs'
    # energy: with as few rows as ranks no error is left but theirs.
    ours = svd_llm.error(w, streamed, second)
    assert ours <= theirs + 1e-6 * abs(theirs) + 1e-3 * eps * energy
    # No other factors would do: of as many numbers, those of W alone.
    u, s, v = np.linalg.svd(w, full_matrices=False)
    plain = svd_llm.error(w, u[:, :rank] * s[:rank] @ v[:rank], second)
    assert ours < 0.98 * plain
    count += 1
  assert count == 21
