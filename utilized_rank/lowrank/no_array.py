"""What says so when code that needs an array is given a pair of factors."""

from __future__ import annotations

from typing import Any, NoReturn

import jax

# Such as `w.T`, `w.reshape`, `w.astype`; what starts with _ is Python's own.
# In an NNX module the leaf stands where a variable was.
_NAMES = frozenset(n for n in dir(jax.Array) if not n.startswith('_')) | {
  *('value', 'get_value', 'set_value', 'raw_value', 'get_metadata'),
}
_OPERATORS = (
  *('add', 'sub', 'mul', 'matmul', 'truediv', 'floordiv', 'mod', 'pow'),
  *('radd', 'rsub', 'rmul', 'rmatmul', 'rtruediv', 'rfloordiv', 'rmod'),
  *('rpow', 'neg', 'pos', 'abs', 'lt', 'le', 'gt', 'ge', 'len', 'iter'),
  *('getitem', 'array', 'jax_array', 'float'),
)


class NoArray:
  """A leaf that only `low_rank` can run: touched as an array, it says so.

  Classes of it have `shape` and `dtype`, those of the kernel that they stand
  for.
  """

  def __getattr__(self, name: str) -> Any:
    if name in _NAMES:
      # Not a TypeError: hasattr must be able to ask.
      raise AttributeError(self._touched(f'.{name}'))
    raise AttributeError(
      f'{type(self).__name__!r} object has no attribute {name!r}'
    )

  def _touched(self, how: str) -> str:
    kind = type(self).__name__
    return (
      f'a {kind} kernel (of shape {self._size()}) was used as an array '
      f'({how}): the function was called without low_rank. Call '
      'ur.low_rank(fn)(params, ...) in place of fn(params, ...), or multiply '
      'the kernels out with ur.merge(params)'
    )

  def _size(self) -> str:
    return '×'.join(map(str, self.shape))


def _refuses(name: str) -> Any:
  def method(self: NoArray, *args: Any, **kwargs: Any) -> NoReturn:
    del args, kwargs
    raise TypeError(self._touched(name))

  method.__name__ = method.__qualname__ = name
  return method


for _name in _OPERATORS:
  setattr(NoArray, f'__{_name}__', _refuses(f'__{_name}__'))
