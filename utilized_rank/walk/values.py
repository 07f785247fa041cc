"""What travels through a walk of a traced function, and who looks at it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
import dataclasses
from typing import Any, NamedTuple, Protocol

import jax

from utilized_rank.tree.layout import View
from utilized_rank.walk import compat


class UnsupportedError(ValueError):
  """A parameter enters a computation that the walker cannot see into."""


class Payload(Protocol):
  """What stands for a leaf while its function is being walked.

  `view` is what the payload is laid out as before the operation, unless said
  otherwise.
  """

  def relayout(self, eqn: Any, view: View) -> Payload:
    """The payload of the view that `eqn`, a layout operation, makes."""
    ...

  def index(self, cut: View, axis: int, at: Any) -> Payload | None:
    """The payload of one index of a leaf that is cut in equal parts.

    `cut` has the parts' axis at `axis` and what each holds at `axis + 1`; `at`
    is an integer, or a traced one if each part is one index of the array.
    None where the payload cannot be taken apart there.
    """
    ...

  def scaled(
    self, view: View, make: Callable[[Any], Any], factor: Any
  ) -> Payload | None:
    """The payload times a factor; None where it cannot be multiplied.

    `make` multiplies an array that is laid out as the view says, as the
    function's author wrote it; `factor` is a scalar, or has an axis for each
    of the view's, of size one where it repeats itself.
    """
    ...

  def squeeze(self, axis: int) -> Payload:
    """The payload without an axis of size one."""
    ...

  def unstack(self, view: View) -> tuple[Any, Callable[[Any], Payload]] | None:
    """A pytree to loop over in place of axis 0, and how to read a slice."""
    ...

  def shard(
    self, cut: View, spec: Any, parts: dict[int, Any]
  ) -> tuple[Any, Any, Callable[[Any], Payload]] | None:
    """A pytree for a `shard_map`, its specs, and how to read a device's part.

    `spec` is the leaf's own partition spec; `parts` maps axes of `cut` to the
    mesh axes they are spread over.
    """
    ...

  def materialise(self, view: View) -> jax.Array:
    """The array that the view describes."""
    ...


@dataclasses.dataclass(frozen=True)
class Param:
  """A parameter leaf, or a layout of one, as a value of the walk."""

  view: View
  payload: Any


@dataclasses.dataclass(frozen=True)
class Bias(Param):
  """A parameter leaf that is added to something, `scale` times.

  Attributes:
    place: identity of the addition; a leaf may be added at several.
    scale: a number known when the function is traced.
  """

  place: Any = None
  scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Pieces:
  """Several, not all, of the equal parts that an axis of a leaf is cut into.

  They lie side by side along `axis`; a product with them is one with each.
  """

  params: tuple[Param, ...]
  axis: int


@dataclasses.dataclass(frozen=True)
class Output:
  """What a product made, laid out anew, or a sum that it is in.

  The view is over the *kernel's* atoms, rows being axes without atoms, so a
  bias that is added can be recognised by its place alone.

  Attributes:
    view: how the product's output lies in the value.
    value: the array.
    use: the visitor's own, of the product.
    scale: how many times the output is in the value.
    others: further products that are in the same value.
    biases: leaves that are in it already.
  """

  view: View
  value: Any
  use: Any
  scale: float = 1.0
  others: tuple[Output, ...] = ()
  biases: tuple[Bias, ...] = ()

  @property
  def terms(self) -> tuple[Output, ...]:
    """All products in the value."""
    return (self, *self.others)

  def moved(self, value: Any, views: Sequence[View | None]) -> Output | None:
    """The value laid out anew: every product's view, None if it is lost."""
    terms = [
      dataclasses.replace(term, view=view, value=value, others=(), biases=())
      for term, view in zip(self.terms, views, strict=True)
      if view is not None
    ]
    if not terms:
      return None
    # A leaf that is in it already is laid out as it was where it was added.
    still = all(
      view is not None and view.cast(term.view.dtype) == term.view
      for view, term in zip(views, self.terms, strict=True)
    )
    return dataclasses.replace(
      terms[0],
      others=tuple(terms[1:]),
      biases=self.biases if still else (),
    )


@dataclasses.dataclass(frozen=True)
class Emission:
  """One value on its way out of the walk.

  Attributes:
    key: what makes it the same value as another emission.
    value: pytree of arrays.
    uses: for each use of the value, an object of the visitor's.
    loops: tokens of the loops that stack it; other loops add it up.
  """

  key: Hashable
  value: Any
  uses: list[Any]
  loops: frozenset[Any]


class Tape:
  """Emissions of one scope, by key."""

  def __init__(self):
    self.emissions: dict[Hashable, Emission] = {}

  def emit(
    self,
    key: Hashable,
    make: Callable[[], Any],
    use: Any,
    loops: frozenset[Any],
  ) -> None:
    """Adds a use of a value, making the value where it is new."""
    if key not in self.emissions:
      self.emissions[key] = Emission(key, make(), [], loops)
    self.emissions[key].uses.append(use)


class Visitor(Protocol):
  """What to do with the products that a walk finds."""

  def product(
    self, eqn: Any, operands: Sequence[Any], which: int, walk: Any
  ) -> Any:
    """The output of a product; `operands[which]` is the one `Param`."""
    ...

  def wants(self, view: View) -> bool:
    """Whether the leaf's products are looked at."""
    ...

  def dropped(self, view: View, reason: str) -> None:
    """A leaf stopped being a leaf; its array is used for something else."""
    ...

  def opaque(self, view: View, primitive: str) -> None:
    """A leaf is about to enter a primitive that hides what it computes.

    Raises:
      UnsupportedError: unless it may.
    """
    ...

  def biased(self, output: Output, bias: Bias) -> bool:
    """A parameter is added to what a product is in; whether it may take a
    constant of the product's output."""
    ...

  def stacked(self, use: Any, loop: Any, size: int, is_stacked: bool) -> Any:
    """The use, seen from outside a loop that stacked or summed it."""
    ...


class Running(NamedTuple):
  """Which examples of a vmapped `while` are not done yet.

  Attributes:
    examples: of each, the leading axes of all that is carried.
    test: the variable of the condition's jaxpr that says so.
    body: the loop's body, an open jaxpr; carried values are its last inputs.
    consts: of its first inputs, which stay what they are, whether each is made
      of parameters.
  """

  examples: jax.Array
  test: Any
  body: Any
  consts: tuple[bool, ...]


class Loop:
  """Identity of one loop, one traced index or one spread over devices."""

  def __init__(self, name: str):
    self.name = name

  def __repr__(self) -> str:
    return f'<{self.name}>'


def split(values: Sequence[Any]):
  """The arrays in a list of values, and how to put the list together again."""

  def apart(value):
    if isinstance(value, Pieces):
      return [p.payload for p in value.params]
    return value.payload if isinstance(value, Param) else value

  def together(value, arrays):
    if isinstance(value, Pieces):
      params = map(together, value.params, arrays)
      return dataclasses.replace(value, params=tuple(params))
    return Param(value.view, arrays) if isinstance(value, Param) else arrays

  def rebuild(arrays):
    return [together(*pair) for pair in zip(values, arrays, strict=True)]

  return [apart(v) for v in values], rebuild


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
  """A leaf that stands for itself: the array, laid out as its view says.

  `bare` is None, or the array without what the leaf is multiplied with.
  """

  array: Any
  bare: Any = None

  def _each(self, change: Callable[[Any], Any]) -> Dense:
    return Dense(
      change(self.array), None if self.bare is None else change(self.bare)
    )

  def relayout(self, eqn: Any, view: View) -> Dense:
    del view
    return self._each(lambda array: compat.bind(eqn, [array])[0])

  def scaled(
    self, view: View, make: Callable[[Any], Any], factor: Any
  ) -> Dense:
    del view, factor
    bare = self.array if self.bare is None else self.bare
    return Dense(make(self.array), bare)

  def index(self, cut: View, axis: int, at: Any) -> Dense:
    n = cut.sizes[axis + 1]
    if isinstance(at, int):
      return self._each(
        lambda array: jax.lax.slice_in_dim(array, at * n, at * n + n, axis=axis)
      )
    return self._each(
      lambda array: jax.lax.dynamic_slice_in_dim(array, at, n, axis)
    )

  def squeeze(self, axis: int) -> Dense:
    return self._each(lambda array: jax.lax.squeeze(array, (axis,)))

  def shard(self, cut: View, spec: Any, parts: dict[int, Any]):
    del cut, parts
    return self, self._each(lambda _: spec), lambda dense: dense

  def unstack(self, view: View):
    del view
    return self, lambda dense: dense

  def materialise(self, view: View) -> Any:
    del view
    return self.array
