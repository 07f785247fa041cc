"""Every kind of wrapper that a product may stand in."""

from collections.abc import Callable
import dataclasses
import functools
import os

import forms
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np

import utilized_rank as ur
from utilized_rank.tree import paths

FORMS = forms.FORMS
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Wrapper:
  """How a form's function is run.

  Attributes:
    wrap: from `f(params, x)` to a function of the arguments below.
    stacks: whether params are `copies` stacked, or one.
    copies: number of inputs, stacked where there is more than one.
  """

  wrap: Callable[[Callable], Callable]
  copies: int = 1
  stacks: bool = False
  lead: tuple[int, ...] = ()


WRAPPERS: dict[str, Wrapper] = {}


def wrapper(copies=1, stacks=False, lead=None):
  def register(fn):
    WRAPPERS[fn.__name__] = Wrapper(
      fn, copies, stacks, lead or (() if copies == 1 else (copies,))
    )
    return fn

  return register


@wrapper()
def plain(f):
  return f


@wrapper()
def jit(f):
  return jax.jit(lambda p, x: jax.jit(f)(p, x))


@wrapper()
def remat(f):
  return jax.checkpoint(f)


@wrapper()
def remat_policy(f):
  return jax.checkpoint(
    f, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False
  )


@wrapper(3, stacks=True)
def scan_stacked(f):
  return lambda p, x: lax.scan(lambda c, px: (c + 1, f(*px)), 0, (p, x))[1]


@wrapper(3, stacks=True)
def scan_reversed_unrolled(f):
  return lambda p, x: lax.scan(
    lambda c, px: (c + 1, f(*px)), 0, (p, x), reverse=True, unroll=2
  )[1]


@wrapper(2, stacks=True)
def scan_remat(f):
  return lambda p, x: lax.scan(
    lambda c, px: (c + 1, jax.checkpoint(f)(*px)), 0, (p, x)
  )[1]


@wrapper(4, stacks=True, lead=(2, 2))
def scan_nested(f):
  inner = lambda c, px: (c + 1, f(*px))
  return lambda p, x: lax.scan(lambda c, px: lax.scan(inner, c, px), 0, (p, x))[
    1
  ]


@wrapper(2)
def scan_tied(f):
  return lambda p, x: lax.scan(lambda c, x: (c + 1, f(p, x)), 0, x)[1]


@wrapper(2)
def scan_carried(f):
  return lambda p, x: lax.scan(lambda p, x: (p, f(p, x)), p, x)[1]


def room(copies, f, *args):
  return jax.tree.map(
    lambda s: jnp.zeros((copies, *s.shape), s.dtype), jax.eval_shape(f, *args)
  )


def put(tree, i, new):
  return jax.tree.map(lambda v, n: v.at[i].set(n), tree, new)


def at(tree, i):
  return jax.tree.map(lambda v: v[i], tree)


@wrapper(2)
def fori_loop(f):
  def run(p, x):
    body = lambda i, y: put(y, i, f(p, at(x, i)))
    return lax.fori_loop(0, 2, body, room(2, f, p, at(x, 0)))

  return run


@wrapper(2, stacks=True)
def fori_loop_indexed(f):
  def run(p, x):
    p, x = jax.tree.map(jnp.asarray, (p, x))
    body = lambda i, y: put(y, i, f(at(p, i), at(x, i)))
    return lax.fori_loop(0, 2, body, room(2, f, at(p, 0), at(x, 0)))

  return run


@wrapper(2)
def while_loop(f):
  def run(p, x):
    def body(state):
      i, y = state
      return i + 1, put(y, i, f(p, at(x, i)))

    stop = jnp.argmax(jnp.ones(3)) + 2  # not known when tracing
    return lax.while_loop(
      lambda s: s[0] < stop, body, (0, room(2, f, p, at(x, 0)))
    )[1]

  return run


@wrapper()
def cond(f):
  def run(p, x):
    score = jnp.max(x['matmul'])
    zero = lambda p, x: jax.tree.map(
      jnp.zeros_like, f(p, jax.tree.map(lambda v: v - v, x))
    )
    taken = lax.cond(score > -9, f, zero, p, x)
    return lax.cond(score < -9, f, lambda p, x: taken, p, x)

  return run


@wrapper()
def switch(f):
  def run(p, x):
    index = jnp.argmax(x['matmul']) * 0 + 1
    twice = lambda p, x: jax.tree.map(lambda y: y * 2, f(p, x))
    return lax.switch(index, [twice, f, twice], p, x)

  return run


@wrapper()
def custom_jvp(f):
  g = jax.custom_jvp(f)
  g.defjvps(None, None)
  return g


@wrapper()
def custom_vjp(f):
  g = jax.custom_vjp(f)
  g.defvjp(lambda p, x: (f(p, x), (p, x)), lambda res, ct: res)
  return g


@wrapper(2, stacks=True)
def vmap_ensemble(f):
  return jax.vmap(f)


@wrapper(2)
def vmap_batch(f):
  return jax.vmap(f, (None, 0))


def more(tree):
  return jax.tree.map(lambda v: v[None], tree)


def mesh():
  return jax.make_mesh((2,), ('d',), axis_types=(AxisType.Auto,))


@wrapper(2)
def shard_map(f):
  local = lambda p, x: more(f(p, at(x, 0)))
  return jax.shard_map(
    local, mesh=mesh(), in_specs=(P(), P('d')), out_specs=P('d')
  )


@wrapper(2, stacks=True)
def shard_map_spread(f):
  local = lambda p, x: more(f(at(p, 0), at(x, 0)))
  return jax.shard_map(
    local, mesh=mesh(), in_specs=(P('d'), P('d')), out_specs=P('d')
  )


def together(params, x):
  """Every form, so that a wrapper compiles once for all its cells."""
  return {name: form.fn(params[name], x[name]) for name, form in FORMS.items()}


def cell(form, wrap, seed):
  """(params, x, expected moments by path) of a cell."""
  copies = range(seed, seed + wrap.copies)
  xs = [form.inputs(s) for s in copies]
  ps = [form.params(s) for s in (copies if wrap.stacks else [seed])]
  stack = lambda vs: jax.tree.map(
    lambda *v: np.stack(v).reshape(*wrap.lead, *v[0].shape), *vs
  )
  params = stack(ps) if wrap.stacks else ps[0]
  x = stack(xs) if wrap.copies > 1 else xs[0]
  rows = [
    form.rows(p, x)
    for p, x in zip(ps if wrap.stacks else ps * wrap.copies, xs, strict=True)
  ]
  expected = {}
  for path in rows[0]:
    each = [r[path] for r in rows]
    joined = (
      np.stack(each).reshape(*wrap.lead, *each[0].shape)
      if wrap.stacks
      else np.concatenate(each, -2)
    )
    expected[path] = forms.moments_of(joined)
  return params, x, expected


def full_rank(params, table):
  """Kernels as pairs whose product is the kernel."""
  named, treedef = paths.flatten(params)
  for entry in table:
    layout = entry.layout
    matrices = np.asarray(layout.to_matrices(f64(named[entry.path])))
    d, _ = layout.matrix_shape
    if FORMS[entry.path.split('/')[0]].exact:
      a, b = np.broadcast_to(np.eye(d), (*layout.group_shape, d, d)), matrices
    else:
      u, s, b = np.linalg.svd(matrices, full_matrices=False)
      a = u * s[..., None, :]
    named[entry.path] = ur.LowRank(
      np.float32(a).reshape(*layout.group_shape, *layout.input_shape, -1),
      np.float32(b).reshape(
        *layout.group_shape, b.shape[-2], *layout.output_shape
      ),
      None,
      layout,
    )
  return paths.unflatten(treedef, named)


f64 = functools.partial(np.asarray, dtype=np.float64)


def close(got, want, what):
  got, want = f64(got), f64(want)
  assert got.shape == want.shape, (what, got.shape, want.shape)
  scale = np.abs(want).max(initial=1e-3)
  error = np.abs(got - want).max(initial=0) / scale
  assert error < TOLERANCE, (what, error)


# What XLA makes of the others adds minutes and no walker's code.
COMPILED = (
  'jit',
  'scan_stacked',
  'while_loop',
  'cond',
  'shard_map',
  'shard_map_spread',
  'vmap_ensemble',
  'vmap_batch',
)
if os.environ.get('UTILIZED_RANK_COMPILE'):
  COMPILED = tuple(WRAPPERS)
