"""Power iterations are no uses of a kernel; learnt queries are.

Every function reads the batch X (n, d) with its kernel 'w' (d, m), times one
over a number that products of 'w' with parameters estimate. What the kernel
reads is X, whatever is done to estimate that.
"""

from flax import linen as nn
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.refit import blocks
from utilized_rank.walk.rescaling import BY_ITSELF
from utilized_rank.walk.rescaling import RESCALES

N, D, M = 6, 4, 3
RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
X = draw(N, D) + 0.5
PARAMS = {'w': draw(D, M), 'u': draw(M), 'v': draw(D)}


def unit(a):
  return a / jnp.linalg.norm(a)


def step(w, u):
  return unit(unit(u @ w.T) @ w)


def sigma(w, u):
  return u @ (unit(u @ w.T) @ w)


def unrolled(p):
  u = step(p['w'], step(p['w'], p['u']))
  return lax.stop_gradient(sigma(p['w'], u))


def fori(p):
  u = lax.fori_loop(0, 3, lambda i, u: step(p['w'], u), p['u'])
  return sigma(p['w'], u)


def scan(p):
  u, sizes = lax.scan(
    lambda u, _: (step(p['w'], u), sigma(p['w'], u)), p['u'], length=3
  )
  return sizes[-1] + 0 * u[0]


def until_it_stays(p):
  return lax.while_loop(
    lambda s: (s[1] > 1e-3) & (s[2] < 5),
    lambda s: (step(p['w'], s[0]), sigma(p['w'], s[0]), s[2] + 1),
    (p['u'], jnp.float32(1), 0),
  )[1]


def branch(p):
  training = p['u'][0] > -9
  return lax.cond(training, unrolled, lambda p: jnp.float32(1), p)


def rule(p):
  size = jax.custom_vjp(sigma)
  size.defvjp(lambda w, u: (sigma(w, u), (w, u)), lambda r, g: (r[0], r[1]))
  return size(p['w'], p['u'])


ESTIMATES = {
  'unrolled': unrolled,
  'fori': fori,
  'scan': scan,
  'while': until_it_stays,
  'branch': branch,
  'jit': jax.jit(unrolled),
  'remat': jax.checkpoint(unrolled),
  'custom_vjp': rule,
  'einsum': lambda p: jnp.einsum('i,ij,j', p['v'], p['w'], p['u']),
  'constants': lambda p: sigma(p['w'], jnp.ones(M)),
  'largest': lambda p: jnp.maximum(1.0, jnp.abs(unrolled(p))),
}


def divided(estimate):
  """x W / s, which divides what the batch and W made."""
  return lambda p, x: jnp.tanh(x @ p['w'] / estimate(p))


def is_of_the_batch(fn, params=PARAMS, path='w'):
  sites = ur.find_sites(fn, params, X)
  assert set(sites) == {path}, str(sites)
  assert (sites[path].rows, sites[path].uses) == (N, 1)
  return sites


@pytest.mark.parametrize('name', ESTIMATES)
def test_power_iterations_are_no_uses(name):
  sites = is_of_the_batch(divided(ESTIMATES[name]))
  # A rule for derivatives is kept where no kernel is inside.
  also = 'custom_vjp_call' if name == 'custom_vjp' else RESCALES
  assert also in sites['w'].also
  # Whatever of the parameters is looked at.
  found = ur.find_sites(
    divided(ESTIMATES[name]), PARAMS, X, select=[('w', True), ('.*', False)]
  )
  assert found['w'].rows == N


@pytest.mark.parametrize('name', ['unrolled', 'scan', 'branch'])
def test_moments_are_of_the_batch(name):
  _, moments = jax.jit(ur.capture(divided(ESTIMATES[name])))(PARAMS, X)
  rows = X.astype(np.float64)
  assert int(moments['w'].count) == N
  # Sums of six float32 numbers.
  np.testing.assert_allclose(
    moments['w'].second, rows.T @ rows / N, rtol=1e-6, atol=1e-6
  )


def test_state_that_is_returned():
  def fn(p, x):
    u = step(p['w'], p['u'])
    size = sigma(p['w'], u)
    return x @ p['w'] / size, {'u': u, 'sigma': size}

  is_of_the_batch(fn)


def test_layers_of_a_scan():
  def fn(p, x):
    layer = lambda x, q: (jnp.tanh(x @ q['w'] / unrolled(q)), None)
    return lax.scan(layer, x, p)[0]

  stack = {'w': draw(2, D, D), 'u': draw(2, D)}
  sites = is_of_the_batch(fn, stack)
  assert sites['w'].layout.group_shape == (2,)


def test_layers_whose_sizes_are_made_beside_the_scan():
  def fn(p, x):
    sizes = jax.vmap(sigma)(p['w'], p['u'])
    layer = lambda x, q: (jnp.tanh(x @ q[0] / q[1]), None)
    return lax.scan(layer, x, (p['w'], sizes))[0]

  is_of_the_batch(fn, {'w': draw(2, D, D), 'u': draw(2, D)})


def test_one_body_for_two_kernels():
  size = jax.jit(sigma)

  def fn(p, x):
    x = jnp.tanh(x @ p['w'] / size(p['w'], p['u']))
    return x @ p['o'] / size(p['o'], p['t'])

  sites = ur.find_sites(fn, PARAMS | {'o': draw(M, M), 't': draw(M)}, X)
  assert {path: s.rows for path, s in sites.items()} == {'w': N, 'o': N}


# --- a kernel that is changed by itself ---


def standardised(p, x):
  w = p['w']
  return x @ ((w - w.mean(0)) / jnp.sqrt(w.var(0) + 1e-5))


def weight_norm(p, x):
  return x @ (p['u'] * p['w'] / jnp.linalg.norm(p['w'], axis=0))


def deflated(p, x):
  v = unit(p['w'] @ p['u'])
  return x @ (p['w'] - v[:, None] * (v @ p['w']))


def orthonormal(p, x):
  w = p['w']
  return x @ (w - 0.5 * w @ jnp.exp(w.T @ w))


@pytest.mark.parametrize(
  'fn', [standardised, weight_norm, deflated, orthonormal]
)
def test_kernels_changed_by_themselves_say_so(fn):
  sites = ur.find_sites(fn, PARAMS, X)
  assert not sites
  assert BY_ITSELF in sites.unseen['w'] and 'w' not in sites.holes
  assert (RESCALES in sites.unseen['w']) == (fn in (deflated, orthonormal))


# --- layers of frameworks ---


class Spectral(nn.Module):
  steps: int = 1
  update: bool = False

  @nn.compact
  def __call__(self, x):
    layer = nn.SpectralNorm(nn.Dense(M, use_bias=False), n_steps=self.steps)
    return layer(x, update_stats=self.update)


@pytest.mark.parametrize('steps, update', [(1, False), (3, True)])
def test_linen(steps, update):
  net = Spectral(steps, update)
  variables = Spectral(steps).init(jax.random.key(0), X)
  fn = lambda v, x: net.apply(v, x, mutable=['batch_stats'])
  is_of_the_batch(fn, variables, path='params/Dense_0/kernel')


@pytest.mark.parametrize('update', [False, True])
def test_nnx(update):
  rngs = nnx.Rngs(0)
  layer = nnx.SpectralNorm(nnx.Linear(D, M, rngs=rngs), n_steps=2, rngs=rngs)
  graph, state = nnx.split(layer)

  def fn(state, x):
    layer = nnx.merge(graph, state)
    return layer(x, update_stats=update), nnx.state(layer, nnx.BatchStat)

  is_of_the_batch(fn, state, path='layer_instance/kernel/value')


@pytest.mark.parametrize('inference', [False, True])
def test_equinox(inference):
  eqx = pytest.importorskip('equinox')
  one, two = jax.random.split(jax.random.key(0))
  conv = eqx.nn.Conv1d(2, M, 2, key=one)
  layer = eqx.nn.SpectralNorm(conv, 'weight', inference=inference, key=two)
  state = eqx.nn.State(layer)
  fn = lambda p, x: jax.vmap(lambda r: p[0](r.reshape(2, 2), p[1])[0])(x)
  is_of_the_batch(fn, (layer, state), path='0/layer/weight')


# --- what is a use, though no data is in it ---


def queries(p, x):
  q, k = jnp.tanh(p['v2'] @ p['w']), x @ p['k']
  return jax.nn.softmax(q @ k.T) @ x


def class_token(p, x):
  return jnp.concatenate([jnp.tanh(p['v2'] @ p['w']), x[:, :M]])


def normed_latents(p, x):
  q = p['v2'] @ p['w']
  return (x @ p['k']) @ (q / jnp.linalg.norm(q)).T


def positions(p, x):
  place = jnp.sin(jnp.arange(2 * D, dtype=jnp.float32)).reshape(2, D)
  return x[:2, :M] + place @ p['w']


def first_state(p, x):
  start = jnp.tanh(p['v2'] @ p['w'])
  return lax.scan(lambda h, r: (h + r[:M], None), start, x)[0]


def gate(p, x):
  return x * jnp.mean(jnp.tanh(p['v2'] @ p['w']))


def no_batch(p, x):
  return p['v2'] @ p['w'], x


LATENTS = {'w': draw(D, M), 'v2': draw(2, D), 'k': draw(D, M)}


@pytest.mark.parametrize(
  'fn',
  [queries, class_token, normed_latents, positions, first_state, gate]
  + [no_batch],
)
def test_learnt_queries_are_rows(fn):
  # A leaf is not a kernel and its rows at once: latents are an input here.
  params = dict(LATENTS)
  latents = params.pop('v2')
  of = lambda p: p | {'v2': jnp.tanh(latents)}
  sites = ur.find_sites(lambda p, x: fn(of(p), x), params, X)
  assert sites['w'].rows == 2
  assert RESCALES not in sites['w'].also


def test_rows_of_learnt_queries():
  select = [('w|k', True), ('.*', False)]
  _, moments = jax.jit(ur.capture(queries, select=select))(LATENTS, X)
  rows = LATENTS['v2'].astype(np.float64)
  np.testing.assert_allclose(
    moments['w'].second, rows.T @ rows / 2, rtol=1e-6, atol=1e-6
  )
  assert int(moments['k'].count) == N


def test_a_product_with_data_and_a_power_iteration_of_it():
  # A number that the batch makes is no scale of the kernel.
  fn = lambda p, x: x @ p['w'] / jnp.linalg.norm(jnp.mean(x, 0) @ p['w'])
  sites = ur.find_sites(fn, PARAMS, X)
  assert (sites['w'].rows, sites['w'].uses) == (N + 1, 2)


def test_a_recurrent_kernel_that_starts_at_zero():
  fn = lambda p, x: lax.scan(
    lambda h, r: (jnp.tanh(r + h @ p['w']) / (1 + jnp.sum(p['w'])), None),
    jnp.zeros(D),
    x,
  )[0]
  assert is_of_the_batch(fn, {'w': draw(D, D)})


# --- all that looks at products ---


def test_factors_run_without_their_constant_there():
  a, b, c = draw(D, 2), draw(2, M), draw(M)
  layout = ur.find_sites(divided(unrolled), PARAMS, X)['w'].layout
  small = PARAMS | {'w': ur.LowRank(a, b, c, layout)}
  with jax.default_matmul_precision('highest'):
    out = ur.low_rank(divided(unrolled))(small, X)
  a, b, c, u = (np.asarray(v, np.float64) for v in (a, b, c, PARAMS['u']))
  w = a @ b
  for _ in range(3):
    v = u @ w.T / np.linalg.norm(u @ w.T)
    last, u = u, v @ w / np.linalg.norm(v @ w)
  want = np.tanh((X.astype(np.float64) @ w + c) / (v @ w @ last))
  # tanh of a few float32 numbers, and a norm in the denominator.
  np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-6)


def test_gradients_are_those_of_the_batch():
  target = draw(N, M)

  def loss(y, batch):
    return jnp.sum(y * batch['t'], axis=-1)

  fn = lambda p, batch: batch['x'] @ p['w'] / unrolled(p)
  batch = {'x': X, 't': target}
  moments = ur.collect(fn, PARAMS, [batch], loss=loss, progress=False)
  size = float(unrolled(PARAMS))
  g = target.astype(np.float64) / size
  # `size` is a float32 number.
  np.testing.assert_allclose(
    moments['w'].grad_second, g.T @ g / N, rtol=1e-5, atol=1e-7
  )


def test_blocks_read_the_batch():
  fn = lambda p, x: divided(fori)(p, x) @ p['o']
  params = PARAMS | {'o': draw(M, M)}
  sites = ur.find_sites(fn, params, X)
  layouts = {path: site.layout for path, site in sites.items()}
  program = blocks.cut(fn, params, X, layouts)
  reads = [r for block in program.blocks for r in block.reads]
  assert [r.path for r in reads] == ['w', 'o']
  state = program.start(X)
  for block in program.blocks:
    values = blocks.needs_of(block, state)
    given, read = program.read(block, params, values, block.paths)
    state = blocks.after(block, state, given)
    if block.paths == ['w']:
      np.testing.assert_array_equal(read[0].rows(), X)
