"""Products of every kind that random programs are built of."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

D = 4  # every step maps (n, 4) to (n, 4)


class Step:
  """A product as JAX runs it, and as numpy does.

  Attributes:
    shape: of the kernel.
    run: `run(w, x) -> y`, by JAX.
    plain: `plain(w, x) -> (y, X)`, by numpy: X are the rows that the kernel
      reads, (n, d); of several kernels those of each.
  """

  def __init__(self, shape, run, plain):
    self.shape, self.run, self.plain = shape, run, plain


def _heads(w, x):
  rows = x.reshape(-1, 2, 2).transpose(0, 2, 1).reshape(-1, 4)
  return rows @ w.reshape(4, 4), rows


def _conv_rows(x):
  padded = np.pad(x, ((1, 1), (0, 0)))
  return np.stack([padded[i : i + 3].ravel() for i in range(len(x))])


def _experts(w, x):
  parts = np.stack([x[:, :2], x[:, 2:]])
  return np.concatenate([parts[0] @ w[0], parts[1] @ w[1]], -1), parts


def _gates(array, zr, new):
  return array.tanh(zr[:, :4]) * zr[:, 4:] + new


def _sliced(w, x):
  return x @ w[0] + np.cos(x) @ w[1], np.stack([x, np.cos(x)])


def _spectral(w, x):
  """By a number that a power iteration makes of the kernel alone."""
  unit = lambda v: v / jnp.linalg.norm(v)
  u = lax.fori_loop(
    0, 2, lambda _, u: unit(unit(u @ w.T) @ w), jnp.ones(D, w.dtype)
  )
  return x @ w / (1 + unit(u @ w.T) @ w @ u)


def _spectral_plain(w, x):
  unit, u = lambda v: v / np.linalg.norm(v), np.ones(D)
  for _ in range(2):
    u = unit(unit(u @ w.T) @ w)
  return x @ w / (1 + unit(u @ w.T) @ w @ u), x


def _by_weight_norm(w):
  return w / (w**2).sum(0) ** 0.5


def _standardised(w):
  return (w - w.mean(0)) / (w.std(0) + 0.1)


def _fixed(array, x):
  """One kernel has no row, and the last row has no kernel."""
  return array.asarray([1, 0, max(len(x) - 2, 0)])


def _by_data(array, x):
  """Data say how many the first has; the last has half of what is left."""
  first = (x[:, 0] > 0).sum()
  return array.stack([first, 0 * first, (len(x) - first) // 2])


def _ragged(sizes_of):
  def plain(w, x):
    ends = np.cumsum(sizes_of(np, x))
    rows = np.split(x, ends)
    y = [r @ v for r, v in zip(rows, w)]
    return np.concatenate([*y, np.zeros_like(rows[-1])]), rows[:-1]

  return Step(
    (3, 4, 4), lambda w, x: lax.ragged_dot(x, w, sizes_of(jnp, x)), plain
  )


@jax.custom_vjp
def _on_a_grid(w, x):
  return jnp.round(8 * x) / 8 @ w


# Straight through: rounding has no derivative but the one that is given here.
_on_a_grid.defvjp(
  lambda w, x: (_on_a_grid(w, x), (w, x)),
  lambda kept, t: (kept[1].T @ t, t @ kept[0].T),
)


def _on_a_grid_plain(w, x):
  return np.round(8 * x) / 8 @ w, np.round(8 * x) / 8


STEPS = {
  'dot': Step((4, 4), lambda w, x: x @ w, lambda w, x: (x @ w, x)),
  'transposed': Step(
    (4, 4), lambda w, x: (w @ x.T).T, lambda w, x: (x @ w.T, x)
  ),
  'cast': Step(
    (2, 2, 4),
    lambda w, x: x @ w.astype(jnp.bfloat16).astype(x.dtype).reshape(4, 4),
    lambda w, x: (x @ _bf16(w).reshape(4, 4), x),
  ),
  'heads': Step(
    (2, 2, 4),
    lambda w, x: jnp.einsum('ndh,hde->ne', x.reshape(-1, 2, 2), w),
    _heads,
  ),
  'heads_left': Step(
    (2, 2, 4),
    lambda w, x: jnp.einsum('hde,ndh->ne', w, x.reshape(-1, 2, 2)),
    _heads,
  ),
  'conv': Step(
    (3, 4, 4),
    lambda w, x: lax.conv_general_dilated(
      x[None], w, (1,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC')
    )[0],
    lambda w, x: (_conv_rows(x) @ w.reshape(12, 4), _conv_rows(x)),
  ),
  'experts': Step(
    (2, 2, 2),
    lambda w, x: jnp.einsum('neb,ebm->nem', x.reshape(-1, 2, 2), w).reshape(
      -1, 4
    ),
    _experts,
  ),
  'flipped': Step(
    (4, 4),
    lambda w, x: x @ w[::-1, ::-1],
    lambda w, x: (x @ w[::-1, ::-1], x[:, ::-1]),
  ),
  'flipped_heads': Step(
    (2, 2, 4),
    lambda w, x: x @ jnp.flip(w, (1, 2)).reshape(4, 4),
    lambda w, x: (
      x @ w[:, ::-1, ::-1].reshape(4, 4),
      x.reshape(-1, 2, 2)[:, :, ::-1].reshape(-1, 4),
    ),
  ),
  'flipped_experts': Step(
    (2, 2, 2),
    lambda w, x: jnp.einsum(
      'neb,ebm->nem', x.reshape(-1, 2, 2), w[::-1]
    ).reshape(-1, 4),
    lambda w, x: (_experts(w[::-1], x)[0], _experts(w, x)[1][::-1]),
  ),
  'scaled': Step(
    (4, 4),
    lambda w, x: x @ (-w / np.sqrt(4)),
    lambda w, x: (x @ (-w / 2), x),
  ),
  'scale_of_itself': Step(
    (4, 4),
    lambda w, x: x @ (w * jnp.cos(w[0, 0])),
    lambda w, x: (x @ (w * np.cos(w[0, 0])), x),
  ),
  'parts': Step(
    (4, 12),
    lambda w, x: _gates(jnp, x @ w[:, :8], jnp.cos(x) @ w[:, 8:]),
    lambda w, x: (
      _gates(np, x @ w[:, :8], np.cos(x) @ w[:, 8:]),
      np.stack([x, x, np.cos(x)]),
    ),
  ),
  'spectral': Step((4, 4), _spectral, _spectral_plain),
  'sliced': Step((2, 4, 4), lambda w, x: x @ w[0] + jnp.cos(x) @ w[1], _sliced),
  'split': Step(
    (4, 8),
    lambda w, x: sum(
      f(x) @ v for f, v in zip((lambda v: v, jnp.cos), jnp.split(w, 2, 1))
    ),
    lambda w, x: _sliced(np.stack(np.split(w, 2, 1)), x),
  ),
  'ragged': _ragged(_fixed),
  'ragged_by_data': _ragged(_by_data),
  'straight_through': Step((4, 4), _on_a_grid, _on_a_grid_plain),
  'weight_norm': Step(
    (4, 4),
    lambda w, x: x @ _by_weight_norm(w),
    lambda w, x: (x @ _by_weight_norm(w), x),
  ),
  'standardised': Step(
    (4, 4),
    lambda w, x: x @ _standardised(w),
    lambda w, x: (x @ _standardised(w), x),
  ),
}
# What meets the data is no scale of the parameter: named, and not measured.
NO_KERNEL = ('standardised', 'weight_norm')


def _bf16(w):
  return np.asarray(jnp.asarray(w, jnp.bfloat16), np.float64)
