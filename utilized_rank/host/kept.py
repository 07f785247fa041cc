"""What was made of a function, kept for its next use as long as it lives.

`jax.jit` knows a program again by the function that it was given, so that what
makes its functions anew at every call compiles anew at every call. Here such a
function is made once for each that it is made of, and dropped with it. The
latter must be pure, as for `jax.jit`: what it reads beside its arguments is
what it was when it was traced.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
import functools
import types
from typing import Any, TypeVar
import weakref

T = TypeVar('T')

# Identities of all owners and a key -> what was made.
_made: dict[Hashable, Any] = {}
# Identity of an owner -> its reference, and the entries that end with it.
_owners: dict[int, tuple[Any, set[Hashable]]] = {}


def kept(
  functions: Sequence[Callable[..., Any]],
  key: Hashable,
  make: Callable[..., T],
) -> T:
  """What `make` made of the very same functions before; else it makes it now.

  Args:
    functions: what it is made of. A method is known by its object.
    key: tells several things that are made of the same functions apart.
    make: `make(*functions)`. It is given stand-ins that do not keep the
      functions alive, and holds on to nothing else that does.

  >>> double = lambda x: 2 * x
  >>> make = lambda fn: functools.lru_cache(lambda x: fn(x))
  >>> once = kept([double], 'once', make)
  >>> once(3), kept([double], 'once', make) is once
  (6, True)
  """
  try:
    stand_ins = [
      fn if isinstance(fn, _StandIn) else _StandIn(fn) for fn in functions
    ]
    entry = tuple(s.identity for s in stand_ins), key
    hash(entry)
  except TypeError:  # no weak references to it, or the key has no hash
    return make(*functions)
  if entry not in _made:
    _made[entry] = make(*stand_ins)
    for stand_in in stand_ins:
      stand_in.owner_of(entry)
  return _made[entry]


class Kept:
  """What is made of functions, to make more of it that is kept.

  >>> made = Kept([fn := lambda x: 2 * x], 'double', lambda fn: fn)
  >>> [made.into('jit', jax.jit)(3).item() for _ in range(2)]
  [6, 6]
  """

  def __init__(
    self,
    functions: Sequence[Callable[..., Any]],
    key: Hashable,
    make: Callable[..., Any],
  ):
    """The arguments are those of `kept`."""
    self._functions, self._key, self._make = functions, key, make

  def into(self, key: Hashable, make: Callable[[Any], T]) -> T:
    """`make` of what was made, kept as long as the functions live."""
    whole = lambda *functions: make(self._make(*functions))
    return kept(self._functions, (self._key, key), whole)


def identity(fn: Callable[..., Any]) -> Hashable:
  """What two references to one function, or to one's stand-in, share."""
  if isinstance(fn, _StandIn):
    return fn.identity
  if isinstance(fn, types.MethodType):
    return id(fn.__self__), fn.__func__
  return id(fn), None


class _StandIn:
  """Calls a function that it does not keep alive."""

  def __init__(self, fn: Callable[..., Any]):
    self._method = None
    owner: Any = fn
    if isinstance(fn, types.MethodType):
      # A method is an object of its own at every look.
      owner, self._method = fn.__self__, fn.__func__
    # No longer than its object.
    self._ref = weakref.ref(owner)
    self.identity = id(owner), self._method

  def owner_of(self, entry: Hashable) -> None:
    """Has an entry dropped when the function is."""
    number = self.identity[0]
    if number not in _owners:
      end = functools.partial(_drop, number)
      _owners[number] = weakref.ref(self._ref(), end), set()
    _owners[number][1].add(entry)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    owner = self._ref()
    assert owner is not None, 'called after its function was dropped'
    if self._method is None:
      return owner(*args, **kwargs)
    return self._method(owner, *args, **kwargs)


def _drop(number: int, ref: Any) -> None:
  del ref
  _, entries = _owners.pop(number)
  for entry in entries:
    _made.pop(entry, None)
