"""From a function of parameters and other arguments to a jaxpr of arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import contextvars
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from utilized_rank.host.kept import identity
from utilized_rank.tree import paths
from utilized_rank.walk import compat
from utilized_rank.walk import rescaling


@dataclasses.dataclass(frozen=True)
class Traced:
  """A function, traced at one signature.

  Attributes:
    jaxpr: open jaxpr, dead code dropped; its inputs are the parameters'
      array leaves followed by the other arguments' arrays.
    consts: values of the jaxpr's constants.
    params: array leaves of the parameters by path; other leaves (functions,
      strings) are part of the trace.
    args: the other arguments' arrays, in order.
    out_tree: pytree structure of the outputs.
  """

  jaxpr: Any
  consts: list[Any]
  params: dict[str, Any]
  args: list[Any]
  out_tree: Any

  @functools.cached_property
  def rescaling(self) -> rescaling.Rescaling:
    """What it does to its parameters before it uses them."""
    return rescaling.find(self.jaxpr, list(self.params))


# Of the call that is at work, if it asked for it: signature -> trace.
_TRACES: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar(
  'traces', default=None
)


def is_array(leaf: Any) -> bool:
  """Arrays, tracers, numpy arrays and shapes; not Python scalars.

  Python scalars stay what they are, so `train=False` can be branched on, and so
  do numpy's arrays of what JAX does not have (texts, objects).
  """
  if isinstance(leaf, (np.ndarray, np.generic)):
    return compat.is_known(leaf.dtype)
  return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))


def split(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
  """A tree's arrays, for what takes arrays alone (`jax.jit`, `device_put`).

  Args:
    tree: any pytree; functions, strings, flags and numbers among its leaves
      stay what and where they are.

  Returns:
    The arrays, and a function from as many others to the tree with these in
    their place.

  >>> arrays, join = split({'w': jnp.ones(2), 'act': 'gelu', 'bias': True})
  >>> double = jax.jit(lambda arrays: join(arrays)['w'] * 2)
  >>> double(arrays).tolist(), join(arrays)['act']
  ([2.0, 2.0], 'gelu')
  """
  named, treedef = paths.flatten(tree)
  moving = [path for path, leaf in named.items() if is_array(leaf)]

  def join(arrays):
    new = dict(zip(moving, arrays, strict=True))
    return paths.unflatten(treedef, named | new)

  return [named[path] for path in moving], join


def check_values(tree: Any) -> None:
  """Raises ValueError for a tree with a shape alone among its leaves.

  >>> check_values({'w': jax.ShapeDtypeStruct((2,), np.float32)})
  Traceback (most recent call last):
  ...
  ValueError: 'w' is a shape (2,) without values: find_sites and plan take ...
  """
  for path, leaf in paths.flatten(tree)[0].items():
    check_value(path, leaf)


def check_value(path: str, leaf: Any) -> None:
  """Raises ValueError for a leaf that is a shape alone."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    raise ValueError(
      f'{path!r} is a shape {leaf.shape} without values: find_sites and plan '
      'take shapes, all else needs the arrays'
    )


def on_device(named: Mapping[str, Any]) -> dict[str, Any]:
  """The arrays among leaves by path, on a device: moved once, if at all.

  Raises:
    ValueError: one is a shape alone.

  >>> list(on_device({'w': np.ones(2), 'act': 'gelu'}))
  ['w']
  """
  for path, leaf in named.items():
    check_value(path, leaf)
  return {
    path: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf)
    for path, leaf in named.items()
    if is_array(leaf)
  }


@contextlib.contextmanager
def explained(
  fn: Callable[..., Any], params: Any, *args: Any
) -> Iterator[None]:
  """Says, of what fails inside, that the function does not fit its arguments.

  Raises:
    ValueError: as `trace`, which runs only then.

  >>> with explained(lambda p, x: p['v'] @ x, {'w': jnp.eye(2)}, jnp.ones(2)):
  ...   raise KeyError('v')
  Traceback (most recent call last):
  ...
  ValueError: the function does not accept these parameters (1 arrays, the ...
  """
  try:
    yield
  except Exception:
    trace(fn, params, args, {})
    raise


def failure(fn: Callable[..., Any], *args: Any) -> Exception | None:
  """What tracing a function raises; None where nothing. It is not run.

  >>> failure(lambda x: x + 1, 2.0), str(failure(lambda x: x[0], ()))
  (None, 'tuple index out of range')
  """
  try:
    jax.eval_shape(fn, *args)
  except Exception as error:  # each primitive's author raises another
    return error
  return None


class Form:
  """A tree without its arrays: a static argument of `jax.jit`.

  Two are equal where the trees have one structure and equal leaves among those
  that are no arrays.

  >>> tree = {'w': jnp.ones(2), 'act': 'gelu'}
  >>> Form(tree) == Form({'w': jnp.zeros(3), 'act': 'gelu'})
  True
  >>> Form(tree).filled({'w': 1})
  {'act': 'gelu', 'w': 1}
  """

  def __init__(self, tree: Any, is_leaf: Callable[[Any], bool] | None = None):
    named, self._treedef = paths.flatten(tree, is_leaf)
    array = lambda v: is_array(v) or (is_leaf is not None and is_leaf(v))
    self._leaves = {p: None if array(v) else (v,) for p, v in named.items()}
    try:
      self._hash = hash((self._treedef, tuple(self._leaves.items())))
    except TypeError:  # known again by itself alone
      self._hash = id(self)

  def filled(self, arrays: Mapping[str, Any]) -> Any:
    """The tree with arrays at its paths."""
    named = {
      path: arrays[path] if leaf is None else leaf[0]
      for path, leaf in self._leaves.items()
    }
    return paths.unflatten(self._treedef, named)

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other: object) -> bool:
    if self is other:
      return True
    return (
      isinstance(other, Form)
      and self._hash == other._hash
      and self._treedef == other._treedef
      and self._leaves == other._leaves
    )


def trace(
  fn: Callable[..., Any],
  params: Any,
  args: Sequence[Any],
  kwargs: dict[str, Any],
  is_leaf: Callable[[Any], bool] | None = None,
  shape_of: Callable[[Any], Any] = lambda leaf: leaf,
) -> Traced:
  """Traces `fn(params, *args, **kwargs)`.

  Args:
    fn: any function of JAX arrays.
    params: pytree of parameters.
    args: positional arguments after the parameters.
    kwargs: keyword arguments.
    is_leaf: what else is a leaf of `params`.
    shape_of: the array (or shape) that stands for such a leaf in the trace.

  Raises:
    ValueError: the function does not accept the parameters; the message has
      the function's own complaint.
  """
  named, treedef = paths.flatten(params, is_leaf)
  arrays = {
    p: v
    for p, v in named.items()
    if is_array(v) or (is_leaf is not None and is_leaf(v))
  }
  if not arrays:
    raise ValueError(
      'params holds no array: expected the parameter pytree of the function, '
      f'got {type(params).__name__}'
    )
  rest, rest_def = jax.tree.flatten((tuple(args), kwargs))
  moving = [i for i, v in enumerate(rest) if is_array(v)]

  def flat(param_arrays, arg_arrays):
    leaves = dict(named)
    leaves.update(zip(arrays, param_arrays, strict=True))
    others = list(rest)
    for i, value in zip(moving, arg_arrays, strict=True):
      others[i] = value
    args, kwargs = jax.tree.unflatten(rest_def, others)
    return fn(paths.unflatten(treedef, leaves), *args, **kwargs)

  shapes = [shape_of(v) for v in arrays.values()]
  arg_arrays = [rest[i] for i in moving]
  memo = _TRACES.get()
  key = None
  if memo is not None:
    key = (
      identity(fn),
      Form(params, is_leaf),
      Form((tuple(args), kwargs)),
      *map(compat.type_of, (*shapes, *arg_arrays)),
      compat.trace_context(),
    )
    if key in memo:
      return dataclasses.replace(memo[key][1], params=arrays, args=arg_arrays)
  try:
    jaxpr, consts, out_shape = compat.trace(flat, (shapes, arg_arrays))
  except Exception as error:
    if isinstance(error, jax.errors.JAXTypeError):
      raise
    first = next(iter(arrays))
    raise ValueError(
      f'the function does not accept these parameters ({len(arrays)} arrays, '
      f'the first at {first!r} of shape '
      f'{tuple(shape_of(arrays[first]).shape)}) and arguments '
      f'({[tuple(a.shape) for a in arg_arrays]}): '
      f'{type(error).__name__}: {error}'
    ) from error
  structure = jax.tree.structure(out_shape)
  found = Traced(jaxpr, consts, arrays, arg_arrays, structure)
  if memo is not None and not any(
    isinstance(c, jax.core.Tracer) for c in consts
  ):
    # With the function, whose identity is not another's as long as it lives.
    memo[key] = fn, dataclasses.replace(found, params={}, args=[])
  return found


@contextlib.contextmanager
def remembered() -> Iterator[None]:
  """In it a function is traced once for each signature."""
  if _TRACES.get() is not None:
    yield
    return
  token = _TRACES.set({})
  try:
    yield
  finally:
    _TRACES.reset(token)
