"""Derivative rules around kernels are kept: cotangents are the rule's."""

import jax
from jax.experimental.ode import odeint
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur

RNG = np.random.default_rng(0)
normal = lambda *s: RNG.normal(size=s).astype('f')
X = normal(40, 6) + np.float32(0.2)
P = {'a': normal(6, 8) / 2, 'w': normal(8, 8) / 3, 'o': normal(8, 3)}


@jax.custom_vjp
def on_grid(x, w):
  """Activations on a grid, straight through."""
  return (jnp.round(x * 16) / 16) @ w


on_grid.defvjp(
  lambda x, w: (on_grid(x, w), (x, w)),
  lambda r, g: (g @ r[1].T, r[0].T @ g),
)


@jax.custom_vjp
def clipped(x, w, bound):
  """Cotangents are clipped; an operand is an integer."""
  return jnp.sin(x @ w) + bound * 0


clipped.defvjp(
  lambda x, w, bound: (clipped(x, w, bound), (x, w, bound)),
  lambda r, g: (
    jnp.clip(g, -0.1, 0.1) @ r[1].T,
    r[0].T @ jnp.clip(g, -0.1, 0.1),
    None,
  ),
)


@jax.custom_vjp
def reversed_(x, w):
  """Gradient reversal."""
  return jnp.tanh(x @ w)


def _reversed_backward(r, g):
  _, back = jax.vjp(lambda x, w: jnp.tanh(x @ w), *r)
  return jax.tree.map(jnp.negative, back(g))


reversed_.defvjp(lambda x, w: (reversed_(x, w), (x, w)), _reversed_backward)


def adjoint(x, w):
  field = lambda y, t, w: jnp.tanh(y @ w)
  return odeint(field, x, jnp.array([0.0, 0.5]), w)[-1]


def scanned(x, w):
  return jax.lax.scan(lambda c, _: (on_grid(c, w), None), x, None, 2)[0]


RULES = {
  'on_grid': on_grid,
  'clipped': lambda x, w: clipped(x, w, jnp.int32(3)),
  'reversed': reversed_,
  'odeint': adjoint,
  'scanned': scanned,
  'jitted': jax.jit(reversed_),
  'remat': jax.checkpoint(on_grid),
}


def model(rule):
  return lambda p, x: rule(jnp.tanh(x @ p['a']), p['w']) @ p['o']


def loss(y, x):
  return (y**2).sum(-1)


@pytest.mark.parametrize('name', [n for n in RULES if n != 'odeint'])
def test_gradient_moments_before_a_rule_are_the_rules(name):
  rule = RULES[name]
  found = ur.collect(
    model(rule), P, [X[:20], X[20:]], loss=loss, progress=False
  )

  def one(e, v):
    y = rule(jnp.tanh(v @ P['a'] + e)[None], P['w']) @ P['o']
    return (y**2).sum()

  g = jax.vmap(jax.grad(one), (None, 0))(jnp.zeros(8), X)
  g = np.asarray(g, np.float64)
  assert np.abs(g).max() > 0
  # float32 sums of forty rows
  np.testing.assert_allclose(
    found['a'].grad_second,
    g.T @ g / len(g),
    rtol=1e-4,
    atol=1e-4 * g.std() ** 2,
  )
  assert np.trace(found['w'].grad_second) > 0


@pytest.mark.parametrize('name', RULES)
def test_gradients_through_factors_are_the_rules(name):
  fn = model(RULES[name])
  moments = ur.capture(fn)(P, X)[1]
  small = ur.factorize(
    P, moments, {'a': 3, 'w': 4}, compensate_mean=False, progress=False
  )
  total = lambda run: lambda t: (run(t) ** 2).sum()
  with_rule = total(lambda t: fn(ur.merge(t), X))
  factored = total(lambda t: ur.low_rank(fn)(t, X))
  np.testing.assert_allclose(factored(small), with_rule(small), rtol=1e-4)
  got, want = (jax.jit(jax.grad(f))(small) for f in (factored, with_rule))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    # The grid may put an activation on its other side: float32.
    np.testing.assert_allclose(a, b, atol=2e-3 * np.abs(b).max())


def test_the_forward_pass_stays_factored():
  fn = model(on_grid)
  moments = ur.capture(fn)(P, X)[1]
  small = ur.factorize(P, moments, {'w': 2}, progress=False)
  text = str(jax.make_jaxpr(ur.low_rank(fn))(small, X))
  assert 'f32[8,8]' not in text  # W is not multiplied out
