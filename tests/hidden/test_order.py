"""Units in their order, and what is read from them, against plain numpy."""

import numpy as np
import pytest

from utilized_rank.hidden import order

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)


def problem(units, size, rows=400, outputs=3):
  """(rows of h, W2): correlated features, outputs that look at few of them."""
  d = units * size
  mix = RNG.standard_normal((d, d)) * np.geomspace(1, 0.05, d)
  h = RNG.standard_normal((rows, d)) @ mix
  return h, RNG.standard_normal((d, outputs))


def features(units, size):
  return [u * size + w for u in units for w in range(size)]


def lost(h, w, units, size):
  """Mean square error at the outputs, the others being read by lstsq."""
  at = features(units, size)
  read, *_ = np.linalg.lstsq(h[:, at], h, rcond=None)
  return np.mean(np.sum(((h - h[:, at] @ read) @ w) ** 2, -1))


def greedy(h, w, size):
  """The unit that leaves the least, again and again, on the rows themselves."""
  units = h.shape[1] // size
  picked = []
  while len(picked) < units:
    left = [u for u in range(units) if u not in picked]
    picked.append(min(left, key=lambda u: lost(h, w, [*picked, u], size)))
  return picked


@pytest.mark.parametrize('units, size', [(9, 1), (5, 3)])
def test_pivots_are_the_greedy_choice(units, size):
  h, w = problem(units, size)
  found = order.pivots(h.T @ h / len(h), w @ w.T, size).tolist()
  # The last ones leave nothing that could tell them apart.
  enough = -(-w.shape[1] // size)
  assert sorted(found) == list(range(units))
  assert found[: units - enough] == greedy(h, w, size)[: units - enough]


def test_many_pivots_are_those_of_one_at_a_time(monkeypatch):
  h, w = problem(40, 1, outputs=50)
  second, cost = h.T @ h / len(h), w @ w.T
  found = order.pivots(second, cost)
  monkeypatch.setattr(order, '_PANEL', 1)
  np.testing.assert_array_equal(found, order.pivots(second, cost))
  monkeypatch.setattr(order, '_PANEL', 7)
  np.testing.assert_array_equal(found, order.pivots(second, cost))


@pytest.mark.parametrize('units, size', [(9, 1), (5, 3)])
def test_damages_are_the_errors(units, size):
  h, w = problem(units, size)
  second, cost = h.T @ h / len(h), w @ w.T
  of = order.pivots(second, cost, size)
  damages = order.damages(second, cost, of, size)
  assert damages.shape == (units + 1,)
  errors = [lost(h, w, of[:k], size) for k in range(1, units + 1)]
  # The ridge is a millionth of the mean variance.
  slack = 1e-4 * damages[0]
  np.testing.assert_allclose(damages[1:], errors, rtol=1e-3, atol=slack)
  np.testing.assert_allclose(damages[0], np.mean(np.sum((h @ w) ** 2, -1)))


def test_damages_never_grow_and_end_at_nothing():
  for units, rows in ((30, 400), (30, 10)):  # of full rank, and not
    h, w = problem(units, 1, rows)
    second, cost = h.T @ h / rows, w @ w.T
    damages = order.damages(second, cost, order.pivots(second, cost))
    assert np.all(np.diff(damages) <= 0) and damages[-1] == 0


@pytest.mark.parametrize('size', [1, 3])
def test_refit_is_least_squares_with_a_constant(size):
  h, w = problem(6, size)
  h = h + RNG.standard_normal(h.shape[1])
  mean = h.mean(0)
  second = h.T @ h / len(h) - np.outer(mean, mean)
  kept = np.array([4, 0, 3])
  found = order.refit(second, mean, w, kept, size)
  np.testing.assert_array_equal(found.kept, [0, 3, 4])
  at = features(found.kept, size)
  rows = np.hstack([h[:, at], np.ones((len(h), 1))])
  best, *_ = np.linalg.lstsq(rows, h @ w, rcond=None)
  # The ridge is a millionth of the mean variance.
  close = dict(rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(found.w[at], best[:-1], **close)
  np.testing.assert_allclose(found.constant, best[-1], **close)
  gone = np.setdiff1d(np.arange(len(w)), at)
  assert not np.any(found.w[gone])


def test_dead_units_and_copies_cost_nothing():
  h, w = problem(4, 1)
  h[:, 2] = 0
  h = np.hstack([h, h[:, :1] * 2, h[:, :1] - h[:, 1:2]])
  w = np.vstack([w, RNG.standard_normal((2, 3))])
  second, cost = h.T @ h / len(h), w @ w.T
  of = order.pivots(second, cost)
  damages = order.damages(second, cost, of)
  assert damages[3] < 1e-5 * damages[0] < damages[2]
  assert 2 in of[3:]


def test_moments_of_no_rows_keep_units_in_order():
  zeros = np.zeros((5, 5))
  assert sorted(order.pivots(zeros, zeros)) == list(range(5))
  assert not np.any(order.damages(zeros, zeros, np.arange(5)))


@pytest.mark.parametrize('size', [1, 2])
def test_rounding_of_large_means_is_no_data(size):
  """Ten rows, float32 sums, means a hundred times what is about them."""
  d = 12 * size
  h = RNG.standard_normal((10, d)) + 300
  w = RNG.standard_normal((d, 3))
  mean = h.mean(0)
  exact = (h - mean).T @ (h - mean) / len(h)
  sums = (h.T @ h).astype(np.float32).astype(np.float64)
  rounded = sums / len(h) - np.outer(mean, mean)
  with pytest.raises(np.linalg.LinAlgError):
    np.linalg.cholesky(order.ridged(rounded)[0])
  second, cost = order.resolved(rounded), w @ w.T
  of = order.pivots(second, cost, size)
  assert sorted(of) == list(range(12))
  found = order.damages(second, cost, of, size)
  # Float32 has rounded sums of 10 * 300**2 by up to 2**-5 in every entry.
  error = 2**-5 / len(h) * d
  loss = lambda c: np.sum(c * cost)
  assert abs(found[0] - loss(exact)) <= error * np.trace(cost)
  assert np.all(np.isfinite(found)) and np.all(np.diff(found) <= 0)
  assert order.resolved(exact) is exact
