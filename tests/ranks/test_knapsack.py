"""The allocation is the optimum: against every combination."""

import itertools

import numpy as np
import pytest

from utilized_rank.ranks.knapsack import Choices
from utilized_rank.ranks.knapsack import allocate


def brute_force(layers, budget):
  best = np.inf
  for picks in itertools.product(*(range(len(y.costs)) for y in layers)):
    cost = sum(y.costs[i] for y, i in zip(layers, picks))
    damage = sum(y.damages[i] for y, i in zip(layers, picks))
    if cost <= budget:
      best = min(best, damage)
  return best


def random_layers(rng, count, ranks, convex):
  layers = []
  for _ in range(count):
    step = int(rng.integers(1, 30))
    values = np.sort(rng.exponential(size=ranks) ** 3)[::-1]
    tail = np.r_[values.sum() - np.cumsum(values)]
    costs = step * np.arange(1, ranks + 1)
    dense = int(costs[-1] * rng.uniform(0.6, 1.4))
    damages = tail if convex else rng.permutation(tail)
    order = np.argsort(np.r_[costs, dense], kind='stable')
    layers.append(
      Choices(
        np.r_[costs, dense][order], np.r_[np.maximum(damages, 0), 0.0][order]
      )
    )
  return layers


@pytest.mark.parametrize('convex', [True, False])
@pytest.mark.parametrize('seed', range(40))
def test_equals_brute_force(seed, convex):
  rng = np.random.default_rng(seed)
  layers = random_layers(rng, int(rng.integers(1, 5)), 6, convex)
  least = sum(int(y.costs.min()) for y in layers)
  most = sum(int(y.costs.max()) for y in layers)
  budget = int(rng.integers(least, most + 1))
  found = allocate(layers, budget)
  assert found.cost <= budget
  assert found.gap == 0
  np.testing.assert_allclose(
    found.damage, brute_force(layers, budget), rtol=1e-9, atol=1e-12
  )
  assert found.damage == pytest.approx(
    sum(y.damages[i] for y, i in zip(layers, found.picks)), abs=1e-12
  )


def test_more_budget_never_hurts():
  layers = random_layers(np.random.default_rng(0), 12, 40, True)
  least = sum(int(y.costs.min()) for y in layers)
  most = sum(int(y.costs.max()) for y in layers)
  budgets = np.linspace(least, most, 25, dtype=int)
  damages = [allocate(layers, b).damage for b in budgets]
  assert damages == sorted(damages, reverse=True)
  assert damages[-1] == 0


def test_the_size_of_a_vision_transformer_is_solved_to_the_optimum():
  """72 kernels, up to 768 ranks each, damages over eight decades."""
  rng = np.random.default_rng(0)
  layers = []
  for d, m in [(768, 768)] * 48 + [(768, 3072)] * 24:
    values = np.exp(-np.arange(d) / rng.uniform(20, 200)) * rng.lognormal(
      sigma=2
    )
    ranks = np.arange(1, d)
    tail = values.sum() - np.cumsum(values)
    costs = np.r_[ranks * (d + m), d * m]
    damages = np.r_[np.maximum(tail[:-1], 0), 0]
    order = np.argsort(costs, kind='stable')
    layers.append(Choices(costs[order], damages[order]))
  budget = sum(int(d * m) for d, m in [(768, 768)] * 48 + [(768, 3072)] * 24)
  for fraction in (0.5, 0.25):
    found = allocate(layers, int(fraction * budget))
    assert found.cost <= fraction * budget
    assert found.gap <= 1e-4 * found.damage


def test_an_impossible_budget_is_refused():
  layer = Choices(np.array([5, 9]), np.array([1.0, 0.0]))
  with pytest.raises(ValueError, match='budget is 9, but the cheapest .* 10'):
    allocate([layer, layer], 9)
