"""The moments of two data sets, added."""

from __future__ import annotations

import jax

from utilized_rank.moments.moments import Moments


def merge_moments(a: Moments, b: Moments) -> Moments:
  """Adds the moments of two data sets.

  Raises:
    ValueError: they are of different kernels, or of different shapes.

  >>> import utilized_rank as ur
  >>> one = ur.capture(lambda p, x: x @ p)(jnp.eye(2), jnp.ones((3, 2)))[1]
  >>> int(merge_moments(one, one)[''].count)
  6
  """
  ours, theirs = ({e.path: e for e in m.table} for m in (a, b))
  for path in [*ours, *theirs]:
    if path not in ours or path not in theirs:
      has, lacks = ('first', 'second') if path in ours else ('second', 'first')
      raise ValueError(
        f'moments of {path!r} are in the {has} argument and not in the '
        f'{lacks}; merge moments collected with one function and selection'
      )
    if ours[path].layout != theirs[path].layout:
      raise ValueError(
        f'moments of {path!r} are over {ours[path].layout.shape} in the '
        f'first argument and {theirs[path].layout.shape} in the second'
      )
    if ours[path].columns != theirs[path].columns:
      raise ValueError(
        f'the sketch of {path!r} has {ours[path].columns} columns in the first '
        f'argument and {theirs[path].columns} in the second (0: none)'
      )
    if ours[path].side != theirs[path].side:
      raise ValueError(
        f'moments of {path!r} are of its {ours[path].side}s in the first '
        f'argument and of its {theirs[path].side}s in the second'
      )
  if [e.index for e in a.table] != [theirs[e.path].index for e in a.table]:
    raise ValueError(
      'the two moments share inputs differently; they come from different '
      'functions'
    )
  for name, what, option in (
    ('grads', 'gradient moments', 'loss'),
    ('row_grads', 'squared gradients of rows', 'fisher_rows'),
    ('coupled', 'sums of inputs and gradients together', 'coupled'),
  ):
    if (getattr(a, name) is None) != (getattr(b, name) is None):
      raise ValueError(
        f'one of the two has {what} and the other has none; collect both with '
        f'the same {option}='
      )
  a = a.covering(a.coverage or b.coverage)
  b = b.in_order_of(a)
  return jax.tree.map(lambda x, y: x + y, a, b)
