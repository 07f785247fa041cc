"""A mixture of experts of `ragged_dot`, through all of the library."""

import functools
import warnings

import experts
from experts import check
from experts import dense_moe
from experts import f64
from experts import moe
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import pytest
import wrappers

import utilized_rank as ur
from utilized_rank.axes.flow import Flow
from utilized_rank.axes.where import EXAMPLE
from utilized_rank.axes.where import batch_array
from utilized_rank.axes.where import plain
from utilized_rank.walk.interpret import UnsupportedError

pytestmark = pytest.mark.slow

collect = functools.partial(ur.collect, progress=False)


@pytest.fixture(scope='module')
def params():
  return experts.parameters()


@pytest.fixture(scope='module')
def x():
  return experts.inputs()


@pytest.fixture(scope='module')
def moments(params, x):
  return collect(moe, params, [x])


def loss(outputs, batch):
  del batch
  return (outputs**2).sum(-1) + outputs[:, 0]


def test_moments_are_those_of_a_loop_over_experts(params, x, moments):
  wrappers.close(moe(params, x), dense_moe(params, x), 'outputs')
  assert list(moments) == ['router', *experts.KERNELS]
  for path, rows in experts.reference_rows(params, x).items():
    check(moments, path, rows)
  # One value and one routing: one set of sums.
  assert moments['gate'].entry.index == moments['up'].entry.index
  assert moments['router'].entry.bias == 'bias'


def test_an_expert_without_rows_has_none(params, x):
  params = params | {'bias': np.array([0, 0, -1e4, 0], np.float32)}
  _, moments = jax.jit(ur.capture(moe))(params, x)
  assert int(moments['up'].count[2]) == 0
  for path, rows in experts.reference_rows(params, x).items():
    check(moments, path, rows)


def test_batches_add_up_and_devices_agree(params, x, moments):
  mesh = Mesh(jax.devices()[:2], 'd')
  for other in (
    collect(moe, params, [x[:32], x[32:]]),
    collect(moe, params, [x], mesh=mesh),
  ):
    for path in moments:
      np.testing.assert_array_equal(other[path].count, moments[path].count)
      wrappers.close(other[path].second, moments[path].second, path)


def test_gradient_moments(params, x):
  found = collect(moe, params, [x], loss=loss, fisher_rows=True)
  chosen = np.asarray(experts.choose(params, x)[0])
  sizes = (experts.H, experts.H, experts.D)
  zeros = tuple(jnp.zeros((len(x), experts.E, m)) for m in sizes)
  total = lambda taps: loss(dense_moe(params, x, taps), x).sum()
  for path, g in zip(experts.KERNELS, jax.grad(total)(zeros), strict=True):
    for e in range(experts.E):
      mine = f64(g)[(chosen == e).any(1), e]
      want = mine.T @ mine / len(mine)
      wrappers.close(found[path].grad_second[e], want, f'gradient of {path}')
  alone = lambda p, x: loss(dense_moe(p, x[None]), x[None])[0]
  each = jax.vmap(jax.grad(alone), (None, 0))(params, x)
  for path in experts.KERNELS:
    want = (f64(each[path]) ** 2).mean(0).sum(-1)
    wrappers.close(found[path].row_fisher, want, f'rows of {path}')


def pairs_of(params, moments, rank, **kwargs):
  ranks = {path: rank for path in experts.KERNELS}
  return ur.factorize(params, moments, ranks, progress=False, **kwargs)


@pytest.mark.parametrize('gauge', [None, 'identity'])
@pytest.mark.parametrize('rank', [3, experts.D])
def test_pairs_run_and_train_as_the_kernels_they_make(
  params, x, moments, gauge, rank
):
  tree = pairs_of(params, moments, rank, gauge=gauge)
  run = jax.jit(ur.low_rank(moe))

  def with_constants(params, x):
    """The dense network with kernels A B, and each expert's constant."""
    merged = params | {
      name: jnp.einsum('edr,erm->edm', params[name].a, whole(params[name]))
      for name in experts.KERNELS
    }
    taps = [
      0.0 if v.c is None else v.c for v in map(params.get, experts.KERNELS)
    ]
    return dense_moe(merged, x, taps)

  def whole(leaf):
    if leaf.order is None:
      return leaf.b
    eye = jnp.eye(leaf.b.shape[1])
    both = [
      jnp.concatenate([eye, b], 1)[:, o]
      for b, o in zip(leaf.b, leaf.order.array)
    ]
    return jnp.stack(both)

  wrappers.close(run(tree, x), with_constants(tree, x), 'outputs')
  if rank == experts.D:
    wrappers.close(run(tree, x), moe(params, x), 'full rank')
  slope = lambda fn: jax.grad(lambda t: (fn(t, x) ** 2).sum())(tree)
  got, want = slope(ur.low_rank(moe)), slope(with_constants)
  jax.tree.map(lambda a, b: wrappers.close(a, b, 'gradient'), got, want)


def test_gate_and_up_share_their_left_factor(params, x, moments):
  together = {('gate', 'up'): 3}
  tree = ur.factorize(params, moments, together, progress=False)
  made = jax.make_jaxpr(ur.low_rank(moe))(tree, x)
  # x A once, (x A) B twice, and `down` whole.
  assert str(made).count('ragged_dot_general[') == 4


def test_a_stack_of_layers(params, x):
  stack = jax.tree.map(lambda v: np.stack([v, v[::-1]]), params)

  def network(stack, x):
    block = jax.checkpoint(lambda x, p: (x + moe(p, x), None))
    return lax.scan(block, x, stack)[0]

  _, moments = jax.jit(ur.capture(network))(stack, x)
  h = x
  for i in range(2):
    layer = {name: v[i] for name, v in stack.items()}
    for path, rows in experts.reference_rows(layer, h).items():
      counts = [len(r) for r in rows]
      np.testing.assert_array_equal(moments[path].count[i], counts)
      for e, mine in enumerate(rows):
        got = np.asarray(moments[path].second[i, e]) * len(mine)
        wrappers.close(got, mine.T @ mine, path)
    h = h + dense_moe(layer, h)
  ranks = dict.fromkeys(experts.KERNELS, experts.D)
  tree = ur.factorize(stack, moments, ranks, progress=False)
  want = network(stack, x)
  wrappers.close(jax.jit(ur.low_rank(network))(tree, x), want, 'full rank')


# --- masks ---


def test_a_mask_is_refused_where_rows_are_sorted_over_examples(params, x):
  mask = np.arange(len(x)) < 50
  with pytest.raises(ValueError, match="'gate' mixes them"):
    collect(moe, params, [x], mask=lambda batch: mask)
  select = [(name, False) for name in experts.KERNELS] + [('router', True)]
  found = collect(moe, params, [x], mask=lambda batch: mask, select=select)
  assert int(found['router'].count) == 50


def by_example(params, batch):
  """Each example sorts its own tokens."""
  x, chosen = batch['x'], batch['chosen']
  order = jnp.argsort(chosen, axis=1)
  sizes = jax.nn.one_hot(chosen, 3, dtype=jnp.int32).sum(1)
  rows = jnp.take_along_axis(x, order[..., None], axis=1)
  numbers = lax.RaggedDotDimensionNumbers((((2,), (1,)), ((), ())), (1,), (0,))
  y = lax.ragged_dot_general(rows, params['w'], sizes, numbers)
  return jnp.take_along_axis(y, jnp.argsort(order, 1)[..., None], axis=1)


BATCH = {
  'x': experts.draw(1, 6, 8, 4),
  'chosen': np.random.default_rng(0).integers(0, 3, (6, 8)),
}


def test_a_mask_of_examples_whose_rows_stay_theirs():
  real = np.array([1, 0, 1, 1, 0, 1], bool)
  w = {'w': experts.draw(0, 3, 4, 5)}
  found = collect(by_example, w, [BATCH], mask=lambda batch: real)
  x, chosen = f64(BATCH['x'])[real], BATCH['chosen'][real]
  check(found, 'w', [x[chosen == e] for e in range(3)])


def test_a_mask_of_tokens_that_were_sorted_is_refused():
  mask, w = np.ones((6, 8), bool), {'w': experts.draw(0, 3, 4, 5)}
  with pytest.raises(ValueError, match="rows of 'w' could not be followed"):
    collect(by_example, w, [BATCH], mask=lambda batch: mask)


@pytest.mark.parametrize(
  'name, x, sizes, is_apart',
  [
    ('sizes that are given', 'example', 'plain', True),
    ('sizes of the batch', 'example', 'example', False),
    ('rows of none', 'plain', 'plain', None),
  ],
)
def test_flow(name, x, sizes, is_apart):
  del name
  of = lambda kind, shape: (
    batch_array(shape, None) if kind == 'example' else plain(shape)
  )
  traced = jax.make_jaxpr(lax.ragged_dot)(
    jnp.zeros((6, 4)), jnp.zeros((6, 4, 5)), jnp.ones(6, int)
  )
  ins = [of(x, (6, 4)), plain((6, 4, 5)), of(sizes, (6,))]
  (out,) = Flow(6).run(traced.jaxpr, ins)
  if is_apart is None:
    assert not out.mixed and not out.has(EXAMPLE)
  else:
    assert out.has(EXAMPLE) == is_apart and bool(out.mixed) != is_apart


# --- the verbs ---


def test_compress_is_no_worse_than_uniform_ranks(params):
  rng = np.random.default_rng(5)
  data = [
    np.float32(rng.normal(size=(192, 3)) @ experts.draw(6, 3, experts.D) + 0.2)
    for _ in range(3)
  ]
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', '.*rows for.*')
    tree, _ = ur.compress(
      moe, params, data[:2], params_fraction=0.5, progress=False
    )
    moments = collect(moe, params, data[:2])
    ranks = ur.uniform_ranks(params, moments, params_fraction=0.5)
    uniform = ur.factorize(params, moments, ranks, progress=False)
  assert ur.count_params(tree) <= 0.5 * ur.count_params(params)
  want, run = moe(params, data[2]), jax.jit(ur.low_rank(moe))
  error = lambda tree: float(((run(tree, data[2]) - want) ** 2).sum())
  assert error(tree) <= error(uniform)


def test_rows_of_two_runs_cannot_be_paired(params, x):
  with pytest.raises(UnsupportedError, match="'gate'.*data say whose rows"):
    ur.anchor(moe, params, [x], {'gate': 3}, progress=False)


def test_experts_are_no_pair_of_attention(params, x):
  found = ur.find_attention(moe, params, x)
  assert not len(found)
