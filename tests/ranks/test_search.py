"""The paper's search: bisection, groups, sides, interruption."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.ranks.search import count_evaluations

pytestmark = pytest.mark.slow


def model(params, x):
  for name in ('a', 'b', 'c'):
    x = jnp.tanh(x @ params[name])
  return x


@pytest.fixture(scope='module')
def problem():
  rng = np.random.default_rng(0)
  params = {
    name: jnp.asarray(rng.normal(size=(24, 24)) / 4, jnp.float32)
    for name in 'abc'
  }
  scale = 0.7 ** np.arange(24)
  x = jnp.asarray(rng.normal(size=(300, 24)) * scale, jnp.float32)
  moments = ur.capture(model)(params, x)[1]
  target = model(params, x)
  compiles = []

  @jax.jit
  def agreement(p):
    compiles.append(1)
    error = jnp.sum((model(p, x) - target) ** 2) / jnp.sum(target**2)
    return 1.0 - error

  return params, moments, agreement, compiles


def search(problem, **kwargs):
  params, moments, evaluate, _ = problem
  return ur.search_ranks(evaluate, params, moments, progress=False, **kwargs)


def test_each_kernel_gets_the_lowest_energy_within_the_tolerance(problem):
  params, moments, evaluate, _ = problem
  tolerance = 1e-2
  found = search(problem, tolerance=tolerance, steps=14)
  assert found.baseline == 1.0
  for path, energies in found.energies.items():
    alone = ur.project(params, moments, energy={path: energies})
    assert float(evaluate(alone)) >= 1 - tolerance
    layer = ur.measure(params, moments, energy=energies[0])[path]
    if path in found:
      assert found[path] == layer.rank
    else:
      assert not layer.rank * 48 < 24 * 24
    # One direction fewer on the side that sets the rank is too few.
    lower = energies[0] - 3e-3
    fewer = ur.measure(params, moments, energy=lower)[path]
    if energies[0] > 0.8 and (fewer.k_in, fewer.k_out) != (
      layer.k_in,
      layer.k_out,
    ):
      less = ur.project(params, moments, energy={path: lower})
      assert float(evaluate(less)) < 1 - tolerance


def test_one_compilation_and_no_more_evaluations_than_announced(problem):
  _, _, _, compiles = problem
  before = len(compiles)
  found = search(problem, tolerance=1e-3)
  assert len(compiles) - before <= 1
  assert len(found.trials) + 1 <= count_evaluations(3)


def test_a_tolerance_that_allows_all_takes_the_lowest_energy_at_once(problem):
  found = search(problem, tolerance=1.0)
  assert set(found.energies.values()) == {(0.8, 0.8)}
  assert len(found.trials) == 3


def test_a_kernel_that_no_energy_spares_stays_dense(problem):
  found = search(problem, tolerance=0.0, energy_range=(0.1, 0.2))
  assert found == {}
  assert found.energies == {}


def test_sides_can_be_searched_separately(problem):
  params, moments, evaluate, _ = problem
  found = search(problem, tolerance=1e-2, separate=True)
  pairs = set(found.energies.values())
  assert any(e_s != e_t for e_s, e_t in pairs)
  for path, energies in found.energies.items():
    alone = ur.project(params, moments, energy={path: energies})
    assert float(evaluate(alone)) >= 1 - 1e-2


def test_groups_are_projected_together(problem):
  found = search(problem, tolerance=1e-2, group=lambda path: path < 'c')
  assert found.energies['a'] == found.energies['b']
  assert {t.paths for t in found.trials} == {('a', 'b'), ('c',)}


def test_an_interrupted_search_gives_the_same_result(problem, tmp_path):
  params, moments, evaluate, _ = problem
  file = tmp_path / 'search.json'
  calls = []

  def stops(p):
    calls.append(1)
    if len(calls) == 9:
      raise KeyboardInterrupt
    return evaluate(p)

  with pytest.raises(KeyboardInterrupt):
    ur.search_ranks(
      stops, params, moments, tolerance=1e-2, checkpoint=file, progress=False
    )
  done = len(calls) - 1
  again = ur.search_ranks(
    stops, params, moments, tolerance=1e-2, checkpoint=file, progress=False
  )
  want = search(problem, tolerance=1e-2)
  assert again == want
  assert again.trials == want.trials
  calls.clear()
  unsearched = {**params, 'bias': jnp.ones(2)}
  for other in ({**params, 'a': params['a'] * 2}, unsearched):
    with pytest.raises(ValueError, match='other parameters'):
      ur.search_ranks(stops, other, moments, checkpoint=file, progress=False)
  file.write_text(file.read_text()[:40])
  with pytest.raises(ValueError, match='damaged'):
    ur.search_ranks(stops, params, moments, checkpoint=file, progress=False)
  assert done == 8


def test_bad_arguments_are_named(problem):
  for kwargs in (
    {'energy_range': (0.9, 0.8)},
    {'steps': 1},
    {'tolerance': -1.0},
    {'energy_range': (0.5, 1.5)},
  ):
    with pytest.raises(ValueError, match='energy'):
      search(problem, **kwargs)
  params, moments, _, _ = problem
  with pytest.raises(ValueError, match='evaluate returned nan'):
    ur.search_ranks(lambda p: float('nan'), params, moments, progress=False)
