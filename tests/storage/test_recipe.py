"""A recipe rebuilds the compressed tree's shapes without data or weights."""

import json
import os

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

import utilized_rank as ur
from utilized_rank.storage import recipe as recipe_lib

RNG = np.random.default_rng(0)


def draw(*shape):
  return jnp.asarray(RNG.normal(size=shape) / 3, jnp.float32)


def fn(p, x):
  q = jnp.einsum('bd,dhe->bhe', x, p['att']['q']).reshape(len(x), -1)
  y = q * (x @ p['att']['k']) + p['att']['bias']
  y, _ = lax.scan(lambda y, w: (y + jnp.tanh(y @ w), None), y, p['stack'])
  return y @ p['list'][0] + p['list'][1].astype(y.dtype)


@pytest.fixture(scope='module')
def problem():
  params = {
    'att': {'q': draw(6, 2, 4), 'k': draw(6, 8), 'bias': draw(8)},
    'stack': draw(2, 8, 8),
    'list': [draw(8, 5), jnp.zeros(5, jnp.bfloat16)],
  }
  x = draw(60, 6) + 0.5
  moments = ur.collect(fn, params, [x], progress=False)
  return params, moments, x


OPTIONS = {
  'plain': ({'att/q': 3, 'stack': (2, 5), 'list/0': 4}, {}),
  'no constants': ({'att/k': 3, 'stack': 4}, {'compensate_mean': False}),
  'identity block': (
    {'att/q': 3, 'stack': (2, 5), 'list/0': 5},
    {'gauge': 'identity'},
  ),
  'shared': ({('att/q', 'att/k'): 5, 'list/0': 2}, {'method': 'weight'}),
}


def made(problem, name):
  params, moments, _ = problem
  ranks, options = OPTIONS[name]
  small = ur.factorize(params, moments, ranks, **options)
  known = {k: v for k, v in options.items() if k != 'gauge'}
  return small, ur.Recipe.of(small, moments, ranks, **known)


def shapes(tree):
  return jax.eval_shape(lambda t: t, tree)


@pytest.mark.parametrize('name', OPTIONS)
def test_the_tree_is_rebuilt_from_the_file_alone(problem, name, tmp_path):
  params, moments, x = problem
  small, recipe = made(problem, name)
  recipe.save(tmp_path / 'recipe.json')
  again = ur.Recipe.load(tmp_path / 'recipe.json')
  assert again == recipe
  assert again.ranks == OPTIONS[name][0]
  assert again.gauge == OPTIONS[name][1].get('gauge')
  abstract = again.abstract(shapes(params))
  assert jax.tree.structure(abstract) == jax.tree.structure(small)
  assert jax.tree.leaves(abstract) == jax.tree.leaves(shapes(small))
  # Arrays do as well as shapes.
  assert jax.tree.leaves(again.abstract(params)) == jax.tree.leaves(abstract)


def test_orbax_restores_into_it_and_steps_compile_before_it(problem, tmp_path):
  params, _, x = problem
  compiled = {}
  for name in ('identity block', 'shared'):
    small, recipe = made(problem, name)
    abstract = recipe.abstract(shapes(params))
    run = jax.jit(ur.low_rank(fn)).lower(abstract, x).compile()
    ocp.save(str(tmp_path / name), small)
    again = ocp.load(str(tmp_path / name), abstract)
    assert jax.tree.structure(again) == jax.tree.structure(small)
    jax.tree.map(np.testing.assert_array_equal, again, small)
    np.testing.assert_array_equal(run(again, x), run(small, x))
    compiled[name] = run
  assert len(compiled) == 2


def test_what_was_computed_from_is_on_record(problem, tmp_path):
  params, moments, x = problem
  _, recipe = made(problem, 'plain')
  assert recipe.calibration == recipe_lib.fingerprint(moments)
  ur.save(tmp_path / 'm', moments)
  assert recipe.calibration == recipe_lib.fingerprint(ur.load(tmp_path / 'm'))
  other = ur.collect(fn, params, [x[:-1]], progress=False)
  assert recipe.calibration != recipe_lib.fingerprint(other)
  assert recipe.versions == {
    'utilized_rank': ur.__version__,
    'jax': jax.__version__,
    'numpy': np.__version__,
  }
  recipe.save(tmp_path / 'r.json')
  record = json.loads((tmp_path / 'r.json').read_text())
  assert (record['method'], record['damping']) == ('output', 0.01)
  assert {'paths': ['stack'], 'rank': [2, 5]} in record['ranks']
  assert sorted(os.listdir(tmp_path)) == ['m', 'r.json']


def test_other_parameters_are_one_clear_error(problem):
  params, moments, _ = problem
  small, recipe = made(problem, 'plain')
  att = {k: v for k, v in params['att'].items() if k != 'q'}
  for other, message in [
    ({**params, 'att': att}, "these lack 'att/q'"),
    ({**params, 'stack': params['stack'][:1]}, r"'stack' of shape \(2, 8, 8\)"),
    (small, "a dense 'att/q'"),
    ({**params, 'stack': 3}, "dense 'stack'.* int of shape None"),
  ]:
    with pytest.raises(ValueError, match=f'of other parameters.*{message}'):
      recipe.abstract(other)
  for ranks, message in [
    ({'att/q': 3, 'stack': (2, 5)}, "'list/0' has rank 4 .* and None in"),
    (OPTIONS['plain'][0] | {'stack': 4}, "'stack' has rank 5 .* and 4 in"),
    (OPTIONS['plain'][0] | {'att/k': 4}, "'att/k' has rank None .* and 4 in"),
  ]:
    with pytest.raises(ValueError, match=message):
      ur.Recipe.of(small, moments, ranks)
  with pytest.raises(ValueError, match="unknown method 'best'"):
    ur.Recipe.of(small, moments, OPTIONS['plain'][0], method='best')


def test_a_file_that_holds_no_recipe_is_named(problem, tmp_path):
  _, recipe = made(problem, 'plain')
  path = tmp_path / 'r.json'
  with pytest.raises(FileNotFoundError):
    ur.Recipe.load(path)
  recipe.save(path)
  text = path.read_text()
  for damaged in (
    text[:-20],
    '[]',
    '{}',
    text.replace('"format": 1', '"format": 2'),
    text.replace('"leaves"', '"leafs"'),
  ):
    path.write_text(damaged)
    with pytest.raises(ValueError, match=r'r\.json.* holds no recipe'):
      ur.Recipe.load(path)


def test_a_recipe_of_another_format_is_named(problem):
  _, recipe = made(problem, 'plain')
  for change in ({'format': 2}, {'kind': 'report'}):
    with pytest.raises(ValueError, match='it holds .*, not '):
      ur.Recipe.from_json({**recipe.json(), **change})
