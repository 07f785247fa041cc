"""Stock code that is given a pair of factors says what to call in its place."""

import copy
import pickle

import equinox as eqx
from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.tree.layout import Layout

LAYOUT = Layout.of((4, 3), inputs=(0,), outputs=(1,))
W = ur.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), None, LAYOUT)
NARROW = ur.NarrowHeads(
  jnp.ones((4, 2, 1)),
  None,
  None,
  Layout.of((4, 2, 3), inputs=(0,), outputs=(1, 2)),
  head=2,
)
X = np.ones((2, 4), np.float32)

TOUCHES = {
  'asarray': lambda w: jnp.asarray(w),
  'array': lambda w: jnp.array(w),
  'numpy': lambda w: np.asarray(w),
  'dot': lambda w: jnp.dot(X, w),
  'matmul': lambda w: jnp.asarray(X) @ w,
  'numpy matmul': lambda w: X @ w,
  'from the left': lambda w: w @ X,
  'einsum': lambda w: jnp.einsum('bd,d...->b...', X, w),
  'transposed': lambda w: w.T,
  'transpose': lambda w: jnp.transpose(w),
  'reshape': lambda w: w.reshape(-1),
  'astype': lambda w: w.astype(jnp.bfloat16),
  'value': lambda w: w.value,
  'index': lambda w: w[0],
  'ellipsis': lambda w: w[...],
  'rows': lambda w: list(w),
  'sum': lambda w: w + 1,
  'scale': lambda w: 0.5 * w,
  'scale by an array': lambda w: jnp.ones(3) * w,
  'scale by numpy': lambda w: np.ones(3) / w,
  'negative': lambda w: -w,
  'linen promotes': lambda w: nn.dtypes.promote_dtype(X, w, dtype=None),
  'under jit': lambda w: jax.jit(lambda w: jnp.dot(X, w))(w),
  'under grad': lambda w: jax.grad(lambda w: jnp.sum(X @ w))(w),
}


@pytest.mark.parametrize('leaf', [W, NARROW], ids=['pair', 'heads'])
@pytest.mark.parametrize('name', TOUCHES)
def test_it_names_low_rank(name, leaf):
  with pytest.raises((TypeError, AttributeError), match=r'ur\.low_rank\(fn\)'):
    TOUCHES[name](leaf)


def test_it_says_which_kernel():
  with pytest.raises(TypeError, match='LowRank kernel .of shape 4×3.*getitem'):
    W[0]
  with pytest.raises(AttributeError, match=r'NarrowHeads.*4×2×3.*\.T\)'):
    _ = NARROW.T
  with pytest.raises(AttributeError, match="no attribute 'rankk'"):
    _ = W.rankk


@pytest.mark.parametrize(
  'module',
  [
    nnx.Linear(4, 3, rngs=nnx.Rngs(0)),
    nnx.LinearGeneral(4, (3,), rngs=nnx.Rngs(0)),
    nnx.Conv(4, 3, (1,), rngs=nnx.Rngs(0)),
    eqx.nn.Linear(4, 3, key=jax.random.key(0)),
  ],
  ids=lambda m: f'{type(m).__module__.split(".")[0]} {type(m).__name__}',
)
def test_stock_modules_say_it(module):
  is_equinox = isinstance(module, eqx.Module)
  fn = lambda m, x: jax.vmap(m)(x) if is_equinox else m(x)
  x = jax.random.normal(jax.random.key(0), (16, 5, 4))
  x = x[:, 0] if is_equinox else x
  moments = ur.collect(fn, module, [x], progress=False)
  small = ur.factorize(
    module, moments, dict.fromkeys(moments, 1), progress=False
  )
  with pytest.raises((TypeError, AttributeError), match=r'ur\.low_rank\(fn\)'):
    fn(small, x)
  assert ur.low_rank(fn)(small, x).shape == fn(module, x).shape


def test_it_still_is_a_pytree():
  assert np.shape(W) == jnp.shape(W) == (4, 3) and W.dtype == jnp.float32
  assert not hasattr(W, 'ndim') and not hasattr(W, 'sharding')
  mark = object()
  assert jax.tree.map(lambda _: mark, W).a is mark
  assert jax.jit(lambda w: w)(W).layout == LAYOUT
  assert jax.eval_shape(lambda w: w, W).shape == (4, 3)
  for again in (copy.deepcopy(W), pickle.loads(pickle.dumps(W))):
    np.testing.assert_array_equal(again.dense(), W.dense())
