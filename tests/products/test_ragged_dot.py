"""Kernels that each row chooses from: `ragged_dot` as a product."""

import dataclasses
import functools

import evaluate
from experts import check
from experts import draw
import forms
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest
import wrappers

import utilized_rank as ur
from utilized_rank.products import gauge
from utilized_rank.products import tiles
from utilized_rank.tree.layout import Layout
from utilized_rank.walk import cost
from utilized_rank.walk.interpret import UnsupportedError

f64 = functools.partial(np.asarray, dtype=np.float64)


@pytest.mark.parametrize(
  'sizes',
  [[3, 5, 2], [0, 4, 0], [0, 0, 0], [12, 0, 0], [0, 0, 12], [9, 9, 9]],
  ids=str,
)
def test_rows_of_no_kernel_do_not_count(sizes):
  x, w = draw(0, 12, 4), draw(1, 3, 4, 5)
  fn = lambda p, x: lax.ragged_dot(x, p['w'], jnp.array(sizes))
  _, moments = ur.capture(fn)({'w': w}, x)
  ends = np.minimum(np.cumsum(sizes), 12)
  starts = np.concatenate([[0], ends[:-1]])
  check(moments, 'w', [f64(x)[a:b] for a, b in zip(starts, ends)])


@pytest.mark.parametrize('n, g, seed', [(700, 3, 0), (257, 40, 1), (33, 2, 2)])
def test_tiles_hold_every_row_once(n, g, seed):
  rng = np.random.default_rng(seed)
  stop = np.sort(rng.integers(0, n + 1, g))
  start = np.concatenate([[0], stop[:-1]])
  made = tiles.tiles_of(
    jnp.asarray(start), jnp.asarray(stop), np.arange(g), (g,), n
  )
  whose = np.full(n, -1)
  size = tiles.rows_of_tile(n, g)
  for a, b, e in zip(*map(np.asarray, (made.start, made.stop, made.member))):
    assert b - a <= size and (whose[a:b] == -1).all()
    whose[a:b] = e
  assert [*whose[: stop[-1]]] == [*np.repeat(np.arange(g), stop - start)]
  assert (whose[stop[-1] :] == -1).all()
  # Little more than the rows are read, however many kernels there are.
  assert len(made) * size <= n + g * size


# --- all ways to write one ---


@dataclasses.dataclass(frozen=True)
class Way:
  """x and W by letters; `sizes` of shape letters; m is the ragged axis."""

  x: str
  w: str
  sizes: str
  out: str


SIZES = dict(b=2, p=3, m=11, y=2, k=4, l=3, g=3, n=5, o=2)
WAYS = {
  'group last': Way('mk', 'kng', 'g', 'mn'),
  'rows last': Way('km', 'gkn', 'g', 'mn'),
  'transposed kernels': Way('mk', 'gnk', 'g', 'mn'),
  'two inputs': Way('mkl', 'glkn', 'g', 'mn'),
  'two outputs': Way('mk', 'ngko', 'g', 'mno'),
  'rows inside': Way('myk', 'gkn', 'g', 'myn'),
  'sizes outside': Way('pmk', 'gkn', 'pg', 'pmn'),
  'one size for all': Way('pmk', 'gkn', 'g', 'pmn'),
  'batch': Way('bmk', 'gbkn', 'bg', 'bmn'),
  'batch behind': Way('mkb', 'bkgn', 'bg', 'bmn'),
  'all': Way('lypmkb', 'kbolgn', 'bypg', 'bypmon'),
}


def run_way(way, w, x, sizes):
  dims = lambda letters, where: tuple(where.index(a) for a in letters)
  contract = [a for a in way.x if a in way.w and a != 'b']
  batch = [a for a in way.x if a == 'b']
  numbers = lax.RaggedDotDimensionNumbers(
    (
      (dims(contract, way.x), dims(contract, way.w)),
      (dims(batch, way.x), dims(batch, way.w)),
    ),
    dims('m', way.x),
    dims('g', way.w),
  )
  return lax.ragged_dot_general(x, w, sizes, numbers)


def way_arrays(way):
  shape = lambda letters: [SIZES[a] for a in letters]
  rng = np.random.default_rng(forms.seed_of(way.x + way.w))
  sizes = rng.integers(0, 6, shape(way.sizes))
  return draw(1, *shape(way.w)), draw(2, *shape(way.x)), sizes.astype(np.int32)


def whose(way, sizes):
  """For every index of (b, p, y, m), 1 where the row is kernel g's."""
  prefix = [a for a in way.x if a in 'bpy' and f'{a}' in way.sizes]
  prefix = sorted(prefix, key='byp'.index)
  sizes = np.broadcast_to(sizes, [SIZES[a] for a in prefix] + [SIZES['g']])
  ends = np.minimum(np.cumsum(sizes, -1), SIZES['m'])[..., None, :]
  starts = np.concatenate([0 * ends[..., :1], ends[..., :-1]], -1)
  m = np.arange(SIZES['m'])[:, None]
  return ''.join(prefix) + 'mg', ((m >= starts) & (m < ends)).astype(float)


@pytest.mark.parametrize('name', WAYS)
def test_dimension_numbers(name):
  way = WAYS[name]
  w, x, sizes = way_arrays(way)
  letters, one = whose(way, sizes)
  fn = lambda p, x: run_way(way, p['w'], *x)
  want = np.einsum(f'{way.x},{way.w},{letters}->{way.out}', f64(x), f64(w), one)
  out, moments = jax.jit(ur.capture(fn))({'w': w}, (x, sizes))
  wrappers.close(out, want, 'outputs')
  groups = [a for a in way.w if a in 'bg']
  inputs = [a for a in way.w if a in way.x and a != 'b']
  rows = [a for a in way.x if a not in (*inputs, *groups)]
  flat = np.einsum(
    f'{way.x},{letters}->{"".join(groups + rows + inputs)}', f64(x), one
  )
  lead = [SIZES[a] for a in groups]
  d = np.prod([SIZES[a] for a in inputs])
  flat = flat.reshape(*lead, -1, d)
  counts = np.einsum(
    f'{letters},{"".join(rows)}->{"".join(groups)}',
    one,
    np.ones([SIZES[a] for a in rows]),
  )
  if 'b' in groups and 'b' not in letters:
    counts = np.broadcast_to(counts, lead)
  moment = moments['w']
  np.testing.assert_array_equal(moment.count, counts)
  scale = np.maximum(counts, 1)[..., None]
  wrappers.close(moment.mean, flat.sum(-2) / scale, 'mean')
  second = np.einsum('...nd,...ne->...de', flat, flat) / scale[..., None]
  wrappers.close(moment.second, second, 'second')
  for columns in (None, 2):
    _factors_agree(fn, {'w': w}, (x, sizes), moments, columns, want)


def _factors_agree(fn, params, x, moments, rank, want):
  """A pair with a constant for each kernel against its product, dense."""
  layout = moments['w'].layout
  matrices = f64(layout.to_matrices(f64(params['w'])))
  u, s, v = np.linalg.svd(matrices, full_matrices=False)
  leaf = ur.LowRank(
    np.float32(u * s[..., None, :])[..., :rank].reshape(
      *layout.group_shape, *layout.input_shape, -1
    ),
    np.float32(v)[..., :rank, :].reshape(
      *layout.group_shape, -1, *layout.output_shape
    ),
    None,
    layout,
  )
  got = jax.jit(ur.low_rank(fn))({'w': leaf}, x)
  if rank is not None:
    want = fn({'w': ur.merge({'w': leaf})['w']}, x)
  wrappers.close(got, want, 'low rank')


def test_constants_and_orders_are_each_kernels_own():
  x, sizes = draw(0, 12, 5), np.array([4, 0, 5])  # 3 rows of none
  layout = Layout.of((3, 5, 6), (0,), (1,), (2,))
  order = np.stack([np.random.default_rng(i).permutation(6) for i in range(3)])
  a, b, c = draw(1, 3, 5, 2), draw(2, 3, 2, 4), draw(3, 3, 6)
  leaf = ur.LowRank(a, b, c, layout, gauge.Order(order))
  fn = lambda p, x: lax.ragged_dot(x, p['w'], jnp.asarray(sizes))
  got = ur.low_rank(fn)({'w': leaf}, x)
  want, at = np.zeros((12, 6)), 0
  for e, size in enumerate(sizes):
    z = f64(x)[at : at + size] @ f64(a)[e]
    both = np.concatenate([z, z @ f64(b)[e]], -1)
    want[at : at + size] = both[:, order[e]] + f64(c)[e]
    at += size
  wrappers.close(got, want, 'outputs')


def parts_of(w, rows, sizes):
  return [lax.ragged_dot(rows, part, sizes) for part in jnp.split(w, 2, -1)]


LEAVES = {
  'experts along two axes': (
    lambda w, *x: lax.ragged_dot(x[0], w.reshape(4, 4, 5), x[1]),
    (2, 2, 4, 5),
    lambda rows: rows,
  ),
  'transposed': (
    lambda w, *x: lax.ragged_dot(x[0], w.transpose(1, 2, 0), x[1]),
    (5, 4, 4),
    lambda rows: rows,
  ),
  'in another order': (
    lambda w, *x: lax.ragged_dot(
      x[0], w.transpose(1, 0, 2, 3).reshape(4, 4, 5), x[1]
    ),
    (2, 2, 4, 5),
    lambda rows: [rows[i] for i in (0, 2, 1, 3)],
  ),
  'one kernel for all': (
    lambda w, *x: lax.ragged_dot(x[0], jnp.broadcast_to(w, (4, 4, 5)), x[1]),
    (4, 5),
    lambda rows: [np.concatenate(rows)],
  ),
  'gate and up in one leaf': (
    lambda w, *x: parts_of(w, *x)[0] * parts_of(w, *x)[1],
    (4, 4, 10),
    lambda rows: rows,
  ),
  'layers in one leaf': (
    lambda w, *x: sum(lax.ragged_dot(x[0] + i, w[i], x[1]) for i in (0, 1)),
    (2, 4, 4, 5),
    lambda rows: [r + i for i in (0, 1) for r in rows],
  ),
  'picked by a computed index': (
    lambda w, *x: lax.ragged_dot(x[0], w[jnp.argmax(x[1]) // 3], x[1]),
    (2, 4, 4, 5),
    lambda rows: rows + [r[:0] for r in rows],
  ),
}


@pytest.mark.parametrize('name', LEAVES)
def test_how_kernels_stand_in_a_leaf(name):
  fn, shape, order = LEAVES[name]
  x, sizes = draw(0, 30, 4), np.array([3, 0, 20, 4])
  params = {'w': draw(1, *shape)}
  run = lambda p, x: fn(p['w'], *x)
  _, moments = jax.jit(ur.capture(run))(params, (x, sizes))
  ends = np.cumsum(sizes)
  rows = order([f64(x)[b - n : b] for b, n in zip(ends, sizes)])
  moment = moments['w']
  if name == 'gate and up in one leaf':  # two products, two sets of kernels
    assert moment.layout.group_shape == (4, 2)
    rows = [r for r in rows for _ in range(2)]
  counts = np.asarray(moment.count).reshape(-1)
  np.testing.assert_array_equal(counts, [len(r) for r in rows])
  seconds = np.asarray(moment.second).reshape(-1, 4, 4)
  for second, mine in zip(seconds, rows, strict=True):
    scale = max(len(mine), 1)
    wrappers.close(second, mine.T @ mine / scale, 'second moment')
  want = run(params, (x, sizes))
  _factors_agree(run, params, (x, sizes), moments, None, want)
  _factors_agree(run, params, (x, sizes), moments, 2, want)


# JAX has no batching rule for one whose operands are not all batched.
WRAPPED = [n for n in wrappers.WRAPPERS if not n.startswith('vmap')]


def chosen(params, x):
  """Rows 0 to 1, 2 to 3 and 4 to 5 meet a kernel each, row 6 meets none."""
  return lax.ragged_dot(x, params['w'], jnp.array([2, 2, 2]))


FORM = forms.Form(
  chosen,
  dict(w=(3, 4, 5)),
  (7, 4),
  lambda p, x: {'w': f64(x)[:6].reshape(3, 2, 4)},
)


@pytest.mark.parametrize('name', WRAPPED)
def test_inside_a_wrapper(name):
  wrap = wrappers.WRAPPERS[name]
  params, x, expected = wrappers.cell(FORM, wrap, 5)
  # Some wrappers look at an input of this name.
  params, x = {'matmul': params}, {'matmul': x}
  fn = wrap.wrap(lambda p, x: {'matmul': chosen(p['matmul'], x['matmul'])})
  run = lambda fn: functools.partial(evaluate.call, fn)
  if name in wrappers.COMPILED:
    run = jax.jit
  out, moments = run(ur.capture(fn))(params, x)
  want = run(fn)(params, x)['matmul']
  wrappers.close(out['matmul'], want, 'outputs')
  (count, mean, second), found = expected['w'], moments['matmul/w']
  np.testing.assert_array_equal(found.count, count)
  wrappers.close(found.mean, mean, 'mean')
  wrappers.close(found.second, second, 'second')
  layout = found.layout
  w = layout.to_matrices(f64(params['matmul']['w']))
  d = w.shape[-2]
  one = np.broadcast_to(np.eye(d), (*w.shape[:-2], d, d))
  leaf = ur.LowRank(
    np.float32(one).reshape(*layout.group_shape, *layout.input_shape, d),
    np.float32(w).reshape(*layout.group_shape, d, *layout.output_shape),
    None,
    layout,
  )
  got = run(ur.low_rank(fn))({'matmul': {'w': leaf}}, x)['matmul']
  wrappers.close(got, want, 'low rank')


# --- what is no product of a row and a kernel ---

CONTRACTED = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
BATCH = lax.RaggedDotDimensionNumbers((((2,), (1,)), ((0,), (0,))), (0,), ())
SIZES_OF = jnp.array([2, 3])
OTHERS = {
  'rows of a kernel': (
    lambda p, x: lax.ragged_dot_general(x, p['w'], SIZES_OF, CONTRACTED),
    (5, 4),
    (5, 3),
  ),
  'rows of a kernel, left': (
    lambda p, x: lax.ragged_dot_general(p['w'], x, SIZES_OF, CONTRACTED),
    (5, 4),
    (5, 3),
  ),
  'a ragged batch': (
    lambda p, x: lax.ragged_dot_general(x, p['w'], SIZES_OF, BATCH),
    (5, 2, 4),
    (5, 4, 3),
  ),
  'a kernel of rows': (
    lambda p, x: lax.ragged_dot(p['w'], x, SIZES_OF),
    (2, 4, 3),
    (5, 4),
  ),
}


@pytest.mark.parametrize('name', OTHERS)
def test_other_modes_are_named(name):
  fn, x, w = OTHERS[name]
  p, x = {'w': draw(0, *w), 'v': draw(1, x[-1], 3)}, draw(2, *x)
  both = lambda p, x: (fn(p, x), x @ p['v'])
  with pytest.raises(UnsupportedError, match="'w'.*'ragged_dot_general'"):
    ur.capture(both)(p, x)
  sites = ur.find_sites(both, p, x, on_opaque='report')
  assert sites.holes == {'w': 'ragged_dot_general'} and list(sites) == ['v']
  _, moments = ur.capture(both, select=[('w', False), ('.*', True)])(p, x)
  assert list(moments) == ['v']


def test_two_parameters_and_group_sizes_of_the_tree():
  fn = lambda p, x: x * lax.ragged_dot(p['rows'], p['w'], p['sizes'])
  p = {'rows': draw(0, 5, 4), 'w': draw(1, 2, 4, 3), 'sizes': SIZES_OF}
  x = draw(2, 5, 3)
  assert not ur.find_sites(fn, p, x)
  _, moments = ur.capture(fn, select=[('w', True)])(p, x)
  check(moments, 'w', [f64(p['rows'])[:2], f64(p['rows'])[2:]])


# --- what else looks at products ---


def test_wide_inputs_and_outputs():
  n, sizes = 40, jnp.array([14, 0, 26])
  w, x = draw(0, 3, 16, 3), draw(1, n, 16)
  fn = lambda p, x: lax.ragged_dot(x, p['w'], sizes)
  parts = [f64(x)[:14], f64(x)[:0], f64(x)[14:]]
  _, outputs = ur.capture(fn, from_outputs=[('w', True)])({'w': w}, x)
  _, sketched = ur.capture(fn, sketch=[('w', 4)])({'w': w}, x)
  np.testing.assert_array_equal(outputs['w'].count, [14, 0, 26])
  for e in (0, 2):
    y = parts[e] @ f64(w)[e]
    wrappers.close(outputs['w'].output_second[e], y.T @ y / len(y), 'outputs')
    wrappers.close(outputs['w'].mean[e], parts[e].mean(0), 'mean')
    diagonal = (parts[e] ** 2).mean(0)
    sums = np.asarray(sketched['w'].sums.panels.diagonal)[e]
    wrappers.close(sums / len(parts[e]), diagonal, 'sketch')


def test_narrow_dtypes_accumulate_in_float32():
  bf16 = lambda a: jnp.asarray(np.round(a * 4) / 4, jnp.bfloat16)
  w, x = bf16(draw(0, 2, 4, 3)), bf16(4 * draw(1, 600, 4))
  fn = lambda p, x: lax.ragged_dot(
    x, p['w'], jnp.array([550, 50]), preferred_element_type=jnp.float32
  )
  out, moments = jax.jit(ur.capture(fn))({'w': w}, x)
  assert out.dtype == jnp.float32
  check(moments, 'w', [f64(x)[:550], f64(x)[550:]])


def test_rows_count_once_in_flops_and_sites():
  w, x = draw(0, 4, 6, 5), draw(1, 12, 6)
  fn = lambda p, x: lax.ragged_dot(x, p['w'], jnp.array([3, 3, 3, 3]))
  assert cost.forward_flops(fn, {'w': w}, x) == 2 * 12 * 6 * 5
  grad = lambda p, x: jax.grad(lambda p: (fn(p, x) ** 2).sum())(p)
  assert cost.forward_flops(grad, {'w': w}, x) == 2 * 2 * 12 * 6 * 5
  (site,) = ur.find_sites(fn, {'w': w}, x).values()
  assert site.kind == 'ragged_dot' and site.layout.group_shape == (4,)
  assert site.rows == 3  # of each, on average
