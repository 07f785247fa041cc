"""Random functions built of the pieces, against sums taken beside them.

A program is a list of steps, run twice: by JAX under `capture`, with whatever
control flow the step asks for; and by plain float64 numpy loops, which note
the rows that each kernel reads. Some programs are compiled by `collect` on a
mesh that the caller has set; of some the derivatives through factors are held
to those of the merged kernels, so that a rule around a kernel is kept.

500 programs by default, and a twentieth of that in each of the other two tests.
The long run, 20,000 and 1,000 each; or in parts, each with its own random
programs by UTILIZED_RANK_SEED:

  UTILIZED_RANK_EXAMPLES=20000 pytest tests/properties/test_hypothesis.py
"""

import functools
import os
import warnings

import evaluate
import hypothesis
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest
from steps import NO_KERNEL
from steps import STEPS

import utilized_rank as ur

EXAMPLES = int(os.environ.get('UTILIZED_RANK_EXAMPLES', '500'))
SEED = os.environ.get('UTILIZED_RANK_SEED')


# Each wrapper has a JAX side, and a list of layers for numpy: which of a
# stack's kernels run, one after the other; or, of a loop of each row's own,
# whether it goes on.
def _chain(f):
  return lambda w, x: jnp.sin(f(w, x))


def _scan(reverse, unroll, inner=lambda f: f):
  return lambda f: (
    lambda w, x: lax.scan(
      lambda x, w: (inner(_chain(f))(w, x), None),
      x,
      w,
      reverse=reverse,
      unroll=unroll,
    )[0]
  )


def _while(f):
  def run(w, x):
    stop = jnp.argmax(jnp.zeros(2)) + 2
    return lax.while_loop(
      lambda s: s[0] < stop, lambda s: (s[0] + 1, _chain(f)(w, s[1])), (0, x)
    )[1]

  return run


def _rule(f):
  g = jax.custom_vjp(_chain(f))
  g.defvjp(lambda w, x: (g(w, x), None), lambda _, t: (None, t))
  return g


def _indexed(f):
  return lambda w, x: lax.fori_loop(0, 2, lambda i, x: _chain(f)(w[i], x), x)


def _nested(f):
  step = lambda x, w: (_chain(f)(w, x), None)
  twice = lambda x, w: (lax.scan(lambda x, _: step(x, w), x, None, 2)[0], None)
  return lambda w, x: lax.scan(twice, x, w)[0]


def _of_each_row(goes_on):
  def wrap(f):
    def one(w, first):
      step = lambda s: (s[0] + 1, _chain(f)(w, s[1][None])[0])
      test = lambda s: goes_on(s[0], first, s[1])
      return lax.while_loop(test, step, (0, first))[1]

    return jax.vmap(one, (None, 0))

  return wrap


def _counted(i, first, row):
  """Three steps, one, or none."""
  return i < 1 + 2 * (first[0] > 0) - (first[1] > 0.5)


def _adaptive(i, first, row):
  return (i < 3) & (row.sum() > -0.5)


WRAPS = {
  'plain': (False, _chain, [0]),
  'jit': (False, lambda f: jax.jit(_chain(f)), [0]),
  'remat': (False, lambda f: jax.checkpoint(_chain(f)), [0]),
  'custom_vjp': (False, _rule, [0]),
  'cond': (
    False,
    lambda f: (
      lambda w, x: lax.cond(
        x[0, 0] < 99, _chain(f), lambda w, x: f(w, x + 1), w, x
      )
    ),
    [0],
  ),
  'switch': (
    False,
    lambda f: lambda w, x: lax.switch(1, [f, _chain(f)], w, x),
    [0],
  ),
  'tied': (
    False,
    lambda f: lambda w, x: lax.fori_loop(0, 2, lambda _, x: _chain(f)(w, x), x),
    [0, 0],
  ),
  'while': (False, _while, [0, 0]),
  'counted': (False, _of_each_row(_counted), _counted),
  'adaptive': (False, _of_each_row(_adaptive), _adaptive),
  'scan': (True, _scan(False, 1), [0, 1]),
  'reversed': (True, _scan(True, 1), [1, 0]),
  'unrolled': (True, _scan(False, 2), [0, 1]),
  'scan_remat': (True, _scan(False, 1, jax.checkpoint), [0, 1]),
  'nested': (True, _nested, [0, 0, 1, 1]),
  'indexed': (True, _indexed, [0, 1]),
}
EACH_ROW = {'counted', 'adaptive'}


def _runs(piece):
  """JAX has no rule for a vmapped ragged_dot of kernels that all rows share."""
  step, wrap, _ = piece
  return not (step.startswith('ragged') and wrap in EACH_ROW)


PIECES = st.tuples(
  st.sampled_from(sorted(STEPS)),
  st.sampled_from(sorted(WRAPS)),
  # Which of two kernels of that kind, and at which of its two places.
  st.tuples(st.integers(0, 1), st.booleans()),
).filter(_runs)
PROGRAMS = st.lists(PIECES, min_size=1, max_size=4)
# A convolution over the rows is no function of an example; devices have some.
DIVISIBLE = st.lists(
  PIECES.filter(lambda piece: piece[0] != 'conv'), min_size=1, max_size=4
)
# Two factors that are cast are not their product that is cast.
DERIVABLE = PIECES.filter(
  lambda piece: (
    piece[0] not in (*NO_KERNEL, 'cast')
    and piece[1] not in ('while', *EACH_ROW)
  )
)
SEEDS = st.integers(0, 2**16)


def kernel_of(step, wrap, number):
  return f'{step}_{"stack" if WRAPS[wrap][0] else "one"}_{number}'


def place_of(step, wrap, which):
  number, again = which
  return kernel_of(step, wrap, number) + '_again' * again


def draw(program, seed):
  """Kernels, the places of each in the tree, and inputs."""
  rng = np.random.default_rng(seed)
  kernels, places = {}, {}
  for step, wrap, which in program:
    shape = (2,) * WRAPS[wrap][0] + STEPS[step].shape
    name = kernel_of(step, wrap, which[0])
    if name not in kernels:
      # Numbers of float32, so that the cast to bfloat16 rounds once.
      kernels[name] = np.float64(np.float32(rng.normal(size=shape) * 0.7))
    places[place_of(step, wrap, which)] = name
  return kernels, places, rng.normal(size=(3 + seed % 2, 4))


def run(program, params, x):
  for step, wrap, which in program:
    wrapper = WRAPS[wrap][1]
    x = wrapper(STEPS[step].run)(params[place_of(step, wrap, which)], x)
  return x


def steps_of(step, wrap, w, x):
  """One piece by numpy: outputs, and (layer, rows) of every step."""
  stacked, _, layers = WRAPS[wrap]
  read = []

  def once(layer, x):
    y, rows = STEPS[step].plain(w[layer] if stacked else w, x)
    read.append((layer, rows))
    return np.sin(y)

  if not callable(layers):
    return functools.reduce(lambda x, layer: once(layer, x), layers, x), read
  ends = []
  for row in x:
    i, first = 0, row
    while layers(i, first, row):
      i, row = i + 1, once(0, row[None])[0]
    ends.append(row)
  return np.stack(ends), read


def sums_of(reads):
  """n, sum x and sum x x^T of what a kernel, or each of a list, reads."""
  if not reads:
    return 0, 0.0, 0.0
  if getattr(reads[0], 'ndim', 0) == 2:
    rows = np.concatenate(reads)
    return len(rows), rows.sum(0), rows.T @ rows
  return tuple(map(np.stack, zip(*map(sums_of, zip(*reads)))))


def reference(program, kernels, x):
  """Outputs, sums of each kernel, and what is no kernel, in float64."""
  reads: dict = {}
  unseen = set()
  for step, wrap, (number, _) in program:
    name = kernel_of(step, wrap, number)
    x, read = steps_of(step, wrap, kernels[name], x)
    if name.startswith(NO_KERNEL):
      unseen.add(name)
      continue
    layers = reads.setdefault(name, [[] for _ in range(1 + WRAPS[wrap][0])])
    for layer, rows in read:
      layers[layer].append(rows)
  sums = {
    name: tuple(map(np.stack, zip(*map(sums_of, layers))))
    if '_stack_' in name
    else sums_of(*layers)
    for name, layers in reads.items()
  }
  return x, sums, unseen


def assert_sums(moments, sums, places, **tolerance):
  """Moments, each by the first of the kernel's places, against sums."""
  first = lambda name: min(p for p, kernel in places.items() if kernel == name)
  assert set(moments) == set(map(first, sums))
  for name, (count, total, second) in sums.items():
    found = moments[first(name)].sums
    np.testing.assert_array_equal(found.count, count, name)
    close = functools.partial(np.testing.assert_allclose, err_msg=name)
    close(found.total, total, **tolerance)
    close(found.second, second, **tolerance)


def examples(share, programs=PROGRAMS):
  """Runs `test(program, seed)` for random programs."""
  chosen = settings(
    max_examples=-(-EXAMPLES // share),
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
  )
  # `--hypothesis-seed` moves nothing that is derandomized.
  seeded = hypothesis.seed(int(SEED)) if SEED else lambda test: test
  return lambda test: seeded(chosen(given(programs, SEEDS)(test)))


def tree_of(kernels, places):
  """One array at each of its kernel's places: they are tied."""
  return {place: kernels[name] for place, name in places.items()}


def captured(fn, kernels, places, x):
  """By `capture`; the tree is made inside, as a trace unties what is given."""
  run = lambda kernels, x: ur.capture(fn)(tree_of(kernels, places), x)
  return evaluate.call(run, kernels, x)


@examples(1)
def test_moments_of_random_programs(program, seed):
  kernels, places, x = draw(program, seed)
  want, sums, unseen = reference(program, kernels, x)
  fn = functools.partial(run, program)
  # In float64: a chain of a dozen layers amplifies what float32 rounds.
  with jax.enable_x64(True):
    out, moments = captured(fn, kernels, places, x)
    moments = jax.tree.map(np.asarray, moments)
    if unseen:
      sites = ur.find_sites(fn, tree_of(kernels, places), x)
      assert {places[path] for path in sites.unseen} == unseen
      assert all(why.startswith('used by') for why in sites.unseen.values())
  np.testing.assert_allclose(out, want, rtol=1e-7, atol=1e-9)
  assert_sums(moments, sums, places, rtol=1e-7, atol=1e-8)


@examples(20, st.lists(DERIVABLE, min_size=1, max_size=4))
def test_derivatives_through_factors_are_those_of_the_kernel(program, seed):
  kernels, places, x = draw(program, seed)
  fn = functools.partial(run, program)
  merged = lambda small, x: fn(ur.merge(small), x)
  grad = lambda f: jax.grad(lambda *args: jnp.cos(f(*args)).sum(), (0, 1))
  with jax.enable_x64(True), warnings.catch_warnings():
    # The scale of a product that is made of the kernel.
    warnings.filterwarnings('ignore', '.* is low-rank but meets')
    tree = tree_of(kernels, places)
    _, moments = captured(fn, kernels, places, x)
    small = ur.factorize(
      tree,
      moments,
      dict.fromkeys(moments, 2),
      compensate_mean=False,
      progress=False,
    )
    want = evaluate.call(grad(merged), small, x)
    found = evaluate.call(grad(ur.low_rank(fn)), small, x)
  for a, b in zip(*map(jax.tree.leaves, (found, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


@examples(20, DIVISIBLE)
def test_moments_on_a_mesh_that_is_set(program, seed):
  kernels, places, x = draw(program, seed)
  _, sums, _ = reference(program, kernels, x)
  shape = (4,) if seed % 4 < 2 else (2, 2)
  names = ('data', 'model')[: len(shape)]
  mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
  collect = functools.partial(
    ur.collect,
    functools.partial(run, program),
    tree_of(kernels, places),
    [x],
    accumulate='float64',
    progress=False,
  )
  with jax.enable_x64(True), jax.set_mesh(mesh), warnings.catch_warnings():
    # Of some programs most is no kernel.
    warnings.filterwarnings('ignore', 'most is not measured')
    if not sums:
      with pytest.raises(ValueError, match='the function has no kernel'):
        collect()
      return
    moments = collect()
  assert_sums(moments, sums, places, rtol=1e-7, atol=1e-8)
