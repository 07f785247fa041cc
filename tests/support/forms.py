"""Small functions, one per way of writing a product, with the rows that each
kernel reads worked out by hand in float64 numpy.

A reference shares no code with the library: it says which array is X, in the
kernel's own axis order, and `moments_of` sums it.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import itertools
import zlib

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Form:
  """A product: `fn(params, x)`, shapes, and `rows(params, x)`.

  `rows` maps each kernel's path to X of shape (*groups, n, d).
  """

  fn: Callable
  shapes: dict
  x: tuple
  rows: Callable
  ids: int = 0  # if not 0, x holds integers below it
  exact: bool = False  # factors that are exact in a narrow dtype

  def params(self, seed):
    rng = np.random.default_rng(seed)
    draw = lambda s: (
      rng.integers(-3, 4, s) / 4
      if self.exact
      else rng.normal(size=s) / np.sqrt(max(s[-2:-1] or (4,)))
    ).astype(np.float32)
    return jax.tree.map(draw, self.shapes, is_leaf=lambda s: type(s) is tuple)

  def inputs(self, seed):
    rng = np.random.default_rng(seed + 1000)
    if self.ids:
      return rng.integers(0, self.ids, self.x).astype(np.int32)
    if self.exact:
      return (rng.integers(-4, 5, self.x) / 4).astype(np.float32)
    return (rng.normal(size=self.x) + 0.5).astype(np.float32)


FORMS: dict[str, Form] = {}


def form(fn, shapes, x, rows, **kwargs):
  name = fn.__name__ if fn.__name__ != '<lambda>' else kwargs.pop('name')
  kwargs.pop('name', None)
  assert name not in FORMS
  FORMS[name] = Form(fn, shapes, x, rows, **kwargs)


def add(name, fn, shapes, x, rows, **kwargs):
  form(fn, shapes, x, rows, name=name, **kwargs)


f64 = lambda a: np.asarray(a, np.float64)
flat = lambda a, d: f64(a).reshape(-1, d)
just = lambda d: lambda p, x: {'w': flat(x, d)}

# --- matrix products ---

add('matmul', lambda p, x: x @ p['w'], dict(w=(4, 3)), (5, 4), just(4))
add(
  'bias',
  lambda p, x: x @ p['w'] + p['b'],
  dict(w=(4, 3), b=(3,)),
  (5, 4),
  just(4),
)
add('dot', lambda p, x: jnp.dot(x, p['w']), dict(w=(4, 3)), (2, 3, 4), just(4))
add('vector', lambda p, x: x @ p['w'], dict(w=(4,)), (5, 4), just(4))
add(
  'kernel_left',
  lambda p, x: p['w'] @ x,
  dict(w=(3, 4)),
  (4, 5),
  lambda p, x: {'w': f64(x).T},
)
add('transposed', lambda p, x: x @ p['w'].T, dict(w=(3, 4)), (5, 4), just(4))
add(
  'transposed_left',
  lambda p, x: p['w'].T @ x,
  dict(w=(4, 3)),
  (4, 5),
  lambda p, x: {'w': f64(x).T},
)
add(
  'einsum_1',
  lambda p, x: jnp.einsum('bsd,de->bse', x, p['w']),
  dict(w=(4, 3)),
  (2, 3, 4),
  just(4),
)
add(
  'einsum_1_left',
  lambda p, x: jnp.einsum('de,bsd->bse', p['w'], x),
  dict(w=(4, 3)),
  (2, 3, 4),
  just(4),
)
heads = lambda p, x: {'w': flat(x, 6)}
add(
  'einsum_2',
  lambda p, x: jnp.einsum('bshd,hde->bse', x, p['w']),
  dict(w=(2, 3, 5)),
  (2, 4, 2, 3),
  heads,
)
add(
  'einsum_2_left',
  lambda p, x: jnp.einsum('hde,bshd->bse', p['w'], x),
  dict(w=(2, 3, 5)),
  (2, 4, 2, 3),
  heads,
)
add(
  'einsum_2_swapped',
  lambda p, x: jnp.einsum('bsdh,hde->bse', x, p['w']),
  dict(w=(2, 3, 5)),
  (2, 4, 3, 2),
  lambda p, x: {'w': flat(np.swapaxes(x, -1, -2), 6)},
)
add(
  'einsum_3',
  lambda p, x: jnp.einsum('bxyz,zxye->be', x, p['w']),
  dict(w=(4, 2, 3, 5)),
  (6, 2, 3, 4),
  lambda p, x: {'w': flat(np.transpose(x, (0, 3, 1, 2)), 24)},
)
add(
  'einsum_3_left',
  lambda p, x: jnp.einsum('xeyz,bzyx->eb', p['w'], x),
  dict(w=(2, 5, 3, 4)),
  (6, 4, 3, 2),
  lambda p, x: {'w': flat(np.transpose(x, (0, 3, 2, 1)), 24)},
)
add(
  'einsum_outputs',
  lambda p, x: jnp.einsum('bd,hdk->bhk', x, p['w']),
  dict(w=(2, 4, 3)),
  (5, 4),
  just(4),
)
add(
  'bf16',
  lambda p, x: (x.astype(jnp.bfloat16) @ p['w'].astype(jnp.bfloat16)).astype(
    jnp.float32
  ),
  dict(w=(4, 3)),
  (5, 4),
  just(4),
  exact=True,
)
add(
  'reshaped',
  lambda p, x: x @ p['w'].reshape(6, 3),
  dict(w=(2, 3, 3)),
  (5, 6),
  just(6),
)
add(
  'unflattened',
  lambda p, x: x @ p['w'].reshape(4, 3),
  dict(w=(12,)),
  (5, 4),
  just(4),
)
add(
  'split_output',
  lambda p, x: jnp.concatenate(
    jnp.split(jnp.tanh(x @ p['w']), 3, -1)[::-1], -1
  ),
  dict(w=(4, 6)),
  (5, 4),
  just(4),
)
add(
  'shared',
  lambda p, x: jnp.tanh(x @ p['w']) @ p['w'],
  dict(w=(4, 4)),
  (5, 4),
  lambda p, x: {'w': np.concatenate([f64(x), np.tanh(f64(x) @ f64(p['w']))])},
)
add(
  'shared_transposed',
  lambda p, x: jnp.tanh(x @ p['w'] + p['b']) @ p['v'].T,
  dict(w=(4, 3), v=(5, 3), b=(3,)),
  (5, 4),
  lambda p, x: {'w': f64(x), 'v': np.tanh(f64(x) @ f64(p['w']) + f64(p['b']))},
)

# --- groups ---

experts = lambda p, x: {'w': f64(x)}
add(
  'experts',
  lambda p, x: jnp.einsum('ecd,edm->ecm', x, p['w']),
  dict(w=(2, 4, 3)),
  (2, 5, 4),
  experts,
)
add(
  'experts_last',
  lambda p, x: jnp.einsum('ecd,dme->cem', x, p['w']),
  dict(w=(4, 3, 2)),
  (2, 5, 4),
  experts,
)
add(
  'dot_general',
  lambda p, x: jax.lax.dot_general(p['w'], x, (((1,), (2,)), ((0,), (0,)))),
  dict(w=(2, 4, 3)),
  (2, 5, 4),
  experts,
)
add(
  'two_groups',
  lambda p, x: jnp.einsum('ghcd,hdgm->ghcm', x, p['w']),
  dict(w=(3, 4, 2, 5)),
  (2, 3, 5, 4),
  lambda p, x: {'w': np.swapaxes(f64(x), 0, 1)},
)


def moe(p, x):
  """Top-1 routing with two slots per expert; a slot left over stays zero."""
  gate = jax.nn.one_hot(jnp.argmax(x @ p['router'], -1), 3)
  place = (jnp.cumsum(gate, 0) - 1) * gate
  slot = jax.nn.one_hot(place.sum(-1).astype(int), 2) * gate.sum(
    -1, keepdims=True
  )
  send = gate[:, :, None] * slot[:, None, :]
  h = jnp.einsum('nec,nd->ecd', send, x)
  y = jnp.einsum('ecd,edm->ecm', h, p['w'])
  return jnp.einsum('nec,ecm->nm', send, y)


def moe_rows(p, x):
  slots = np.zeros((3, 2, 4))
  filled = [0, 0, 0]
  for row in f64(x):
    e = int(np.argmax(np.float32(row) @ p['router']))
    if filled[e] < 2:
      slots[e, filled[e]] = row
    filled[e] += 1
  return {'w': slots, 'router': f64(x)}


form(moe, dict(w=(3, 4, 5), router=(4, 3)), (6, 4), moe_rows)
add(
  'sliced',
  lambda p, x: (x @ p['w'][0]) * (x @ p['w'][1]),
  dict(w=(2, 4, 3)),
  (5, 4),
  lambda p, x: {'w': np.stack([f64(x)] * 2)},
)
add(
  'unstacked',
  lambda p, x: sum((i + x) @ w for i, w in enumerate(p['w'])),
  dict(w=(3, 4, 3)),
  (5, 4),
  lambda p, x: {'w': np.stack([f64(x), f64(x) + 1, f64(x) + 2])},
)
add(
  'split_kernel',
  lambda p, x: sum(
    jnp.sin((i + x) @ w) for i, w in enumerate(jnp.split(p['w'], 3, 1))
  ),
  dict(w=(4, 6)),
  (5, 4),
  lambda p, x: {'w': np.stack([f64(x), f64(x) + 1, f64(x) + 2])},
)
add(
  'split_inputs',
  lambda p, x: x @ p['w'][:4] + (x * x) @ p['w'][4:],
  dict(w=(8, 3)),
  (5, 4),
  lambda p, x: {'w': np.stack([f64(x), f64(x) ** 2])},
)
add(
  'ensemble',
  lambda p, x: jax.vmap(lambda w, b, x: jnp.tanh(x @ w + b), (0, 0, None))(
    p['w'], p['b'], x
  ),
  dict(w=(2, 4, 3), b=(2, 3)),
  (5, 4),
  just(4),
)  # one product, one X


# --- read backwards, times a number, in parts that are not equal ---

add(
  'flipped_inputs',
  lambda p, x: x @ p['w'][::-1] + p['b'],
  dict(w=(4, 3), b=(3,)),
  (5, 4),
  lambda p, x: {'w': f64(x)[:, ::-1]},
)
add(
  'flipped_outputs',
  lambda p, x: x @ p['w'][:, ::-1] + p['b'],
  dict(w=(4, 3), b=(3,)),
  (5, 4),
  just(4),
)
add(
  'flipped_then_cut',
  lambda p, x: jnp.einsum(
    'bde,edm->bm', x, p['w'][::-1, ::-1].reshape(3, 2, 4)
  ),
  dict(w=(6, 4)),
  (5, 2, 3),
  lambda p, x: {'w': flat(np.swapaxes(f64(x), 1, 2), 6)[:, ::-1]},
)
add(
  'flipped_in_part',
  lambda p, x: x @ p['w'].reshape(2, 3, 4)[:, ::-1].reshape(6, 4),
  dict(w=(6, 4)),
  (5, 6),
  lambda p, x: {'w': f64(x).reshape(5, 2, 3)[:, :, ::-1].reshape(5, 6)},
)
add(
  'flipped_groups',
  lambda p, x: jnp.einsum('ecd,edm->ecm', x, p['w'][::-1, :, ::-1]),
  dict(w=(2, 4, 3)),
  (2, 5, 4),
  lambda p, x: {'w': f64(x)[::-1]},
)
add(
  'flipped_and_scanned',
  lambda p, x: jax.lax.scan(
    lambda x, w: (jnp.tanh(x @ w), None), x, p['w'][::-1]
  )[0],
  dict(w=(2, 4, 4)),
  (5, 4),
  lambda p, x: {'w': np.stack([np.tanh(f64(x) @ f64(p['w'][1])), f64(x)])},
)
add(
  'flipped_and_indexed',
  lambda p, x: x @ p['w'][::-1][0] + jnp.cos(x) @ p['w'][::-1][1],
  dict(w=(2, 4, 3)),
  (5, 4),
  lambda p, x: {'w': np.stack([np.cos(f64(x)), f64(x)])},
)
add(
  'negative',
  lambda p, x: x @ -p['w'] + p['b'],
  dict(w=(4, 3), b=(3,)),
  (5, 4),
  just(4),
)
add(
  'equalised',
  lambda p, x: x @ (p['w'] / np.sqrt(6)).T + 0.5 * p['b'],
  dict(w=(3, 4), b=(3,)),
  (5, 4),
  just(4),
)
add(
  'times_one',
  lambda p, x: jnp.einsum('bd,dhk->bhk', x, p['w'] * 1.0) + p['b'] * 1.0,
  dict(w=(4, 2, 3), b=(2, 3)),
  (5, 4),
  just(4),
)
add(
  'learnt_scale',
  lambda p, x: x @ (jnp.exp(p['s']) * p['w']) + p['b'],
  dict(w=(4, 3), s=(), b=(3,)),
  (5, 4),
  just(4),
)
add(
  'leaf_as_scale',
  lambda p, x: (-x @ (p['w'][..., ::-1] * p['s'])) / 3,
  dict(w=(4, 3), s=()),
  (5, 4),
  lambda p, x: {'w': -f64(x)},
)


def cell(p, x):
  """Gates z and r read h, the third reads r h: a recurrent kernel's parts."""
  gates = jnp.moveaxis(x @ p['i'], 1, 0)

  def step(h, g):
    z, r = jnp.split(jax.nn.sigmoid(g[:, :6] + h @ p['h'][:, :6]), 2, -1)
    new = jnp.tanh(g[:, 6:] + (r * h) @ p['h'][:, 6:])
    return (1 - z) * h + z * new, None

  start = 0.5 + 0 * gates[0, :, :3]
  return jax.lax.scan(step, start, gates)[0]


def cell_rows(p, x):
  h, read = np.full((len(x), 3), 0.5), []
  sigmoid = lambda v: 1 / (1 + np.exp(-v))
  for t in range(x.shape[1]):
    g = f64(x[:, t]) @ f64(p['i'])
    w = f64(p['h'])
    z = sigmoid(g[:, :3] + h @ w[:, :3])
    r = sigmoid(g[:, 3:6] + h @ w[:, 3:6])
    read.append(np.stack([h, h, r * h]))
    h = (1 - z) * h + z * np.tanh(g[:, 6:] + (r * h) @ w[:, 6:])
  return {'i': flat(x, 2), 'h': np.concatenate(read, 1)}


form(cell, dict(i=(2, 9), h=(3, 9)), (4, 3, 2), cell_rows)


def packed(p, x):
  """Queries of x, keys and values of another: one kernel, as in PyTorch."""
  context = jnp.sin(x)
  q, kv = jnp.split(p['w'].astype(x.dtype), [4])
  q, (k, v) = x @ q.T, jnp.split(context @ (2 * kv).T, 2, -1)
  return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v


form(
  packed,
  dict(w=(12, 4)),
  (2, 5, 4),
  lambda p, x: {
    'w': np.stack(
      [flat(x, 4), flat(np.sin(f64(x)), 4), flat(np.sin(f64(x)), 4)]
    )
  },
)
add(
  'parts_of_the_inputs',
  lambda p, x: x[:, :4] @ p['w'][:4][::-1] + jnp.cos(x[:, 4:]) @ p['w'][4:],
  dict(w=(6, 3)),
  (5, 6),
  lambda p, x: {
    'w': np.stack([f64(x)[:, 3:1:-1], f64(x)[:, 1::-1], np.cos(f64(x)[:, 4:])])
  },
)


# --- embeddings ---


def tied(p, x):
  h = jnp.take(p['w'], x, axis=0)
  return jnp.tanh(h) @ p['w'].T


form(
  tied,
  dict(w=(7, 4)),
  (2, 5),
  lambda p, x: {'w': flat(np.tanh(f64(p['w']))[x], 4)},
  ids=7,
)
add(
  'one_hot',
  lambda p, x: jax.nn.one_hot(x, 7) @ p['w'],
  dict(w=(7, 4)),
  (2, 5),
  lambda p, x: {'w': flat(np.eye(7)[x], 7)},
  ids=7,
)


# --- convolutions ---


def patches(x, window, strides=None, padding=None, dilation=None, grow=None):
  """Channel-last x (n, *space, c) as rows (n * positions, *window * c)."""
  k = len(window)
  strides, dilation, grow = (v or (1,) * k for v in (strides, dilation, grow))
  padding = padding or ((0, 0),) * k
  x = f64(x)
  sizes = [(s - 1) * g + 1 for s, g in zip(x.shape[1:-1], grow)]
  grown = np.zeros((x.shape[0], *sizes, x.shape[-1]))
  grown[(slice(None), *(slice(None, None, g) for g in grow))] = x
  grown = np.pad(grown, [(0, 0), *padding, (0, 0)])
  counts = [
    (s - (w - 1) * d - 1) // t + 1
    for s, w, d, t in zip(grown.shape[1:-1], window, dilation, strides)
  ]
  rows = []
  for image in grown:
    for at in itertools.product(*map(range, counts)):
      rows.append(
        np.stack(
          [
            image[
              tuple(
                a * t + o * d
                for a, t, o, d in zip(at, strides, offset, dilation)
              )
            ]
            for offset in itertools.product(*map(range, window))
          ]
        ).ravel()
      )
  return np.stack(rows)


def conv(layout, **kwargs):
  return lambda p, x: jax.lax.conv_general_dilated(
    x, p['w'], dimension_numbers=layout, **kwargs
  )


add(
  'conv_1d',
  conv(('NWC', 'WIO', 'NWC'), window_strides=(1,), padding='VALID'),
  dict(w=(3, 2, 5)),
  (2, 6, 2),
  lambda p, x: {'w': patches(x, (3,))},
)
add(
  'conv_same',
  conv(('NHWC', 'HWIO', 'NHWC'), window_strides=(2, 1), padding='SAME'),
  dict(w=(3, 2, 2, 5)),
  (2, 5, 4, 2),
  lambda p, x: {'w': patches(x, (3, 2), (2, 1), ((1, 1), (0, 1)))},
)
add(
  'conv_explicit',
  conv(
    ('NHWC', 'HWIO', 'NHWC'),
    window_strides=(1, 2),
    padding=((2, 0), (1, -1)),
    rhs_dilation=(2, 1),
  ),
  dict(w=(2, 3, 2, 5)),
  (2, 5, 6, 2),
  lambda p, x: {
    'w': patches(x[:, :, :-1], (2, 3), (1, 2), ((2, 0), (1, 0)), (2, 1))
  },
)
add(
  'conv_patches',
  conv(('NHWC', 'HWIO', 'NHWC'), window_strides=(2, 2), padding='VALID'),
  dict(w=(2, 2, 3, 5)),
  (2, 4, 6, 3),
  lambda p, x: {'w': patches(x, (2, 2), (2, 2))},
)


def channels_first(rows, window, c):
  """Rows over (*window, c) as rows over (c, *window)."""
  n = len(rows)
  return np.moveaxis(rows.reshape(n, *window, c), -1, 1).reshape(n, -1)


add(
  'conv_nchw',
  conv(('NCHW', 'OIHW', 'NCHW'), window_strides=(1, 1), padding='VALID'),
  dict(w=(5, 3, 2, 2)),
  (2, 3, 4, 3),
  lambda p, x: {
    'w': channels_first(patches(np.moveaxis(x, 1, -1), (2, 2)), (2, 2), 3)
  },
)
add(
  'conv_3d',
  conv(('NDHWC', 'DHWIO', 'NDHWC'), window_strides=(1, 1, 1), padding='VALID'),
  dict(w=(2, 1, 2, 2, 3)),
  (2, 3, 2, 3, 2),
  lambda p, x: {'w': patches(x, (2, 1, 2))},
)
add(
  'conv_transposed',
  lambda p, x: jax.lax.conv_transpose(
    x, p['w'], (2, 2), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  ),
  dict(w=(2, 3, 2, 4)),
  (2, 3, 2, 2),
  lambda p, x: {'w': patches(x, (2, 3), padding=((1, 1), (2, 2)), grow=(2, 2))},
)


add(
  'conv_transposed_kernel',
  lambda p, x: jax.lax.conv_transpose(
    x,
    p['w'],
    (2, 2),
    'VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    transpose_kernel=True,
  ),
  dict(w=(2, 3, 4, 2)),
  (2, 3, 2, 2),
  lambda p, x: {
    'w': patches(x, (2, 3), padding=((1, 1), (2, 2)), grow=(2, 2))
    .reshape(-1, 2, 3, 2)[:, ::-1, ::-1]
    .reshape(-1, 12)
  },
)
add(
  'conv_flipped_groups',
  lambda p, x: jax.lax.conv_general_dilated(
    x,
    jnp.flip(p['w'], (0, 1, 2)) * -0.5,
    (1,),
    'VALID',
    dimension_numbers=('NWC', 'WIO', 'NWC'),
    feature_group_count=2,
  ),
  dict(w=(2, 2, 6)),
  (3, 5, 4),
  lambda p, x: {
    'w': np.stack([patches(x[..., i : i + 2], (2,))[:, ::-1] for i in (2, 0)])
  },
)


def grouped_rows(p, x):
  return {'w': np.stack([patches(x[..., :2], (2,)), patches(x[..., 2:], (2,))])}


add(
  'conv_grouped',
  conv(
    ('NWC', 'WIO', 'NWC'),
    window_strides=(1,),
    padding='VALID',
    feature_group_count=2,
  ),
  dict(w=(2, 2, 6)),
  (3, 5, 4),
  grouped_rows,
)
add(
  'conv_multiplier',
  conv(
    ('NWC', 'WIO', 'NWC'),
    window_strides=(1,),
    padding='VALID',
    feature_group_count=2,
  ),
  dict(w=(3, 1, 4)),
  (3, 5, 2),
  lambda p, x: {
    'w': np.stack([patches(x[..., i : i + 1], (3,)) for i in (0, 1)])
  },
)


# --- Flax layers ---


def layer(name, module, shapes, x, rows, **kwargs):
  add(
    name, lambda p, x: module.apply({'params': p}, x), shapes, x, rows, **kwargs
  )


dense = lambda d, *m: dict(kernel=(*d, *m), bias=m)
layer(
  'nn_dense',
  nn.Dense(3),
  dense((4,), 3),
  (2, 5, 4),
  lambda p, x: {'kernel': flat(x, 4)},
)
layer(
  'nn_dense_general',
  nn.DenseGeneral((3, 2), axis=(-2, -1)),
  dense((2, 4), 3, 2),
  (5, 2, 4),
  lambda p, x: {'kernel': flat(x, 8)},
)
layer(
  'nn_einsum',
  nn.Einsum((4, 2, 3), 'btd,dhk->bhtk', use_bias=False),
  dict(kernel=(4, 2, 3)),
  (2, 5, 4),
  lambda p, x: {'kernel': flat(x, 4)},
)
layer(
  'nn_conv',
  nn.Conv(3, (2, 2), padding='VALID'),
  dense((2, 2, 2), 3),
  (2, 3, 4, 2),
  lambda p, x: {'kernel': patches(x, (2, 2))},
)


def attention_rows(p, x):
  x = f64(x)
  proj = lambda k: (
    np.einsum('btd,dhk->bthk', x, f64(p[k]['kernel'])) + f64(p[k]['bias'])
  )
  q, k, v = proj('query'), proj('key'), proj('value')
  logits = np.einsum('bqhk,bthk->bhqt', q, k) / np.sqrt(3)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  mixed = np.einsum('bhqt,bthk->bqhk', weights, v)
  rows = dict.fromkeys(
    ('query/kernel', 'key/kernel', 'value/kernel'), flat(x, 4)
  )
  return rows | {'out/kernel': flat(mixed, 6)}


layer(
  'nn_attention',
  nn.MultiHeadDotProductAttention(2, qkv_features=6),
  dict(
    query=dense((4,), 2, 3),
    key=dense((4,), 2, 3),
    value=dense((4,), 2, 3),
    out=dense((2, 3), 4),
  ),
  (2, 5, 4),
  attention_rows,
)


def moments_of(rows):
  """(n, mean, second moment) of rows (*groups, n, d)."""
  n = rows.shape[-2]
  return (
    np.full(rows.shape[:-2], n),
    rows.mean(-2),
    np.einsum('...nd,...ne->...de', rows, rows) / n,
  )


def seed_of(name):
  return zlib.crc32(name.encode()) % 10_000
