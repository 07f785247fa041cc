"""Runs a traced function with Python loops.

XLA compiles every loop anew; of a thousand small programs that would be most
of the time, and what the library makes is the jaxpr.
"""

import jax
import numpy as np

from utilized_rank.walk import compat


def call(fn, *args):
  """`fn(*args)`, traced once, each primitive run by itself."""
  jaxpr, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
  flat = evaluate(jaxpr, *jax.tree.leaves(args))
  return jax.tree.unflatten(jax.tree.structure(shape), flat)


def evaluate(jaxpr, *args):
  """Evaluates a jaxpr, entering everything that holds another."""
  jaxpr, consts = compat.open_jaxpr(jaxpr)
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
  read = lambda a: a.val if isinstance(a, compat.Literal) else env[a]
  for eqn in jaxpr.eqns:
    values, p = [read(a) for a in eqn.invars], eqn.params
    rule = LOOPS.get(eqn.primitive.name)
    out = rule(p, values) if rule else compat.bind(eqn, values)
    env.update(zip(eqn.outvars, out))
  return [read(a) for a in jaxpr.outvars]


def _evaluate_scan(p, values):
  nc, nk = compat.scan_split(p)
  consts, carry, xs = values[:nc], values[nc : nc + nk], values[nc + nk :]
  ys = [None] * p['length']
  steps = range(p['length'])
  for i in reversed(steps) if p['reverse'] else steps:
    out = evaluate(p['jaxpr'], *consts, *carry, *(x[i] for x in xs))
    carry, ys[i] = out[:nk], out[nk:]
  return carry + [np.stack(y) for y in zip(*ys)]


def _evaluate_while(p, values):
  nt, nb = p['cond_nconsts'], p['body_nconsts']
  test, body, state = values[:nt], values[nt : nt + nb], values[nt + nb :]
  while evaluate(p['cond_jaxpr'], *test, *state)[0]:
    state = evaluate(p['body_jaxpr'], *body, *state)
  return state


LOOPS = {
  'scan': _evaluate_scan,
  'while': _evaluate_while,
  'cond': lambda p, v: evaluate(p['branches'][int(v[0])], *v[1:]),
  'jit': lambda p, v: evaluate(p['jaxpr'], *v),
  'remat2': lambda p, v: evaluate(p['jaxpr'], *v),
  'custom_jvp_call': lambda p, v: evaluate(p['call_jaxpr'], *v),
  'custom_vjp_call': lambda p, v: evaluate(p['call_jaxpr'], *v),
}
