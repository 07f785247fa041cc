"""What a checkpoint's names and shapes say, written as tables.

A layout is a table from another code base's names to this package's paths. In
a pattern, `#` stands for a number; in a path the numbers come back in their
order, and `{layer}` takes apart a stack of all layers. A path without a
collection is below `params`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from utilized_rank.host.extras import extra

with extra('models'):
  import flax.linen as nn

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Convert = Callable[[np.ndarray], np.ndarray]


class Rule(NamedTuple):
  """One row of a table: where a tensor goes, and which view of it.

  A path of '' is nowhere: what the model does not use.
  """

  pattern: str
  path: str
  convert: Convert


class Usual(NamedTuple):
  """What an option is in the best known models, where nothing says it.

  Attributes:
    value: of the option.
    elsewhere: what other models with the same names and shapes have.
  """

  value: Any
  elsewhere: str = ''


class Target(NamedTuple):
  """A leaf of the model, and what fills it."""

  name: str
  layer: int | None
  convert: Convert

  def of(self, values: np.ndarray) -> np.ndarray:
    return self.convert(values if self.layer is None else values[self.layer])

  def shape(self, shape: Shape) -> Shape:
    return self.of(np.broadcast_to(np.int8(0), shape)).shape


@dataclasses.dataclass(frozen=True)
class Layout:
  """The names of one code base.

  Attributes:
    name: whose layout it is.
    anchors: names of which every such file has one, after a prefix that the
      others share.
    table: the rows, given the shapes of what has the prefix.
    family: `family(layout, mapped, source, options)`, from the shapes by our
      paths and by their names to `(model, input)`, the latter abstract.
    ignored: regular expressions of whole names that are no part of the model.
    settings: options of the model that hold for the whole layout, and
      `resize`, the method of `positions.resize_positions`.
    assumed: options that change the output and that no shape tells. Metadata or
      the caller say them; else they are taken only where the caller agrees.
    heads: attention heads by width where the code base has a convention; they
      are taken as what is assumed is.
    model_types: those of Hugging Face that are saved with these names.
    by_config: too much is unsaid without the config, which names the model.
    architectures: timm and torchvision have names for models of this layout.
  """

  name: str
  anchors: Sequence[str]
  table: Callable[[Shapes], Iterable[Rule]]
  family: Callable[
    [Layout, Shapes, Shapes, Mapping[str, Any]],
    tuple[nn.Module, jax.ShapeDtypeStruct],
  ]
  ignored: Sequence[str] = ()
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  assumed: Mapping[str, Usual] = dataclasses.field(default_factory=dict)
  heads: Mapping[int, int] = dataclasses.field(default_factory=dict)
  model_types: Sequence[str] = ()
  by_config: bool = False
  architectures: bool = False


@dataclasses.dataclass(frozen=True)
class Match:
  """A layout laid over a file.

  Attributes:
    layout: the layout.
    prefix: what its names have in front in this file.
    targets: by path of ours.
    ignored: names that are no part of the model.
    unknown: names that the table does not have.
    aside: other files have this prefix beside the model (a student, an
      optimizer's copy).
  """

  layout: Layout
  prefix: str
  targets: dict[str, Target]
  ignored: list[str]
  unknown: list[str]
  aside: bool


def match(
  layout: Layout, prefix: str, shapes: Shapes, ignore: Sequence[str]
) -> Match:
  """Lays a layout over the names of a file.

  Raises:
    ValueError: two tensors claim one leaf.
  """
  outside = [re.compile(p) for p in layout.ignored]
  aside = any(p.fullmatch(f'{prefix}x') for p in outside)
  wanted = [re.compile(p) for p in ignore]
  ignored = []
  for name in shapes:
    # Where nothing but the copy is there, it is the model.
    seen = name.removeprefix(prefix) if aside else name
    if any(p.fullmatch(seen) for p in outside) or any(
      p.fullmatch(name) for p in wanted
    ):
      ignored.append(name)
  left = {n: s for n, s in shapes.items() if n not in set(ignored)}
  inside = {
    n.removeprefix(prefix): s for n, s in left.items() if n.startswith(prefix)
  }
  rows = [(_compiled(r.pattern), r) for r in layout.table(inside)]
  targets: dict[str, Target] = {}
  unknown = [n for n in left if not n.startswith(prefix)]
  for name, shape in inside.items():
    known = False
    for pattern, rule in rows:
      if found := pattern.fullmatch(name):
        known = True
        if not rule.path:
          ignored.append(prefix + name)
          continue
        for path, layer in _paths(rule.path, found.groups(), shape):
          if path in targets:
            raise ValueError(
              f'{prefix}{name} and {targets[path].name} are both {path} in '
              f'the layout of {layout.name}.'
            )
          targets[path] = Target(prefix + name, layer, rule.convert)
    if not known:
      unknown.append(prefix + name)
  return Match(layout, prefix, targets, ignored, unknown, aside)


def _compiled(pattern: str) -> re.Pattern[str]:
  return re.compile(re.escape(pattern).replace(r'\#', r'(\d+)'))


def _paths(
  template: str, numbers: Sequence[str], shape: Shape
) -> list[tuple[str, int | None]]:
  for number in numbers:
    template = template.replace('#', number, 1)
  if not template.startswith('batch_stats/'):
    template = f'params/{template}'
  if '{layer}' not in template:
    return [(template, None)]
  return [(template.replace('{layer}', str(i)), i) for i in range(shape[0])]


def same(x: np.ndarray) -> np.ndarray:
  return x


def transposed(x: np.ndarray) -> np.ndarray:
  """PyTorch's dense kernels are (out, in)."""
  return x.T


def pointwise(x: np.ndarray) -> np.ndarray:
  """A dense layer, or a 1x1 convolution that is one."""
  return x.reshape(x.shape[:2]).T


def hwio(x: np.ndarray) -> np.ndarray:
  """PyTorch's convolutions are (out, in, h, w)."""
  return x.transpose(2, 3, 1, 0)


def one_more(x: np.ndarray) -> np.ndarray:
  """Scales that are stored as their difference from one."""
  return x.astype(np.float32) + 1  # bfloat16 has no room for both


def dense(pattern: str, path: str, convert: Convert = transposed) -> list[Rule]:
  """A torch layer: `.weight` and, where there is one, `.bias`."""
  return [
    Rule(f'{pattern}.weight', f'{path}/kernel', convert),
    Rule(f'{pattern}.bias', f'{path}/bias', same),
  ]


def norm(pattern: str, path: str, convert: Convert = same) -> list[Rule]:
  """A torch layer norm, or what of a batch norm is learned."""
  return [
    Rule(f'{pattern}.weight', f'{path}/scale', convert),
    Rule(f'{pattern}.bias', f'{path}/bias', same),
  ]


def batch_norm(pattern: str, path: str) -> list[Rule]:
  """A torch batch norm with its statistics."""
  return [
    *norm(pattern, path),
    Rule(f'{pattern}.running_mean', f'batch_stats/{path}/mean', same),
    Rule(f'{pattern}.running_var', f'batch_stats/{path}/var', same),
  ]


def fused(
  pattern: str, paths: Sequence[str], sizes: Sequence[int] | None = None
) -> list[Rule]:
  """A torch layer that is several of ours side by side, of sizes as given."""
  cut = functools.partial(_pieces, sizes or (1,) * len(paths))
  return [
    rule
    for i, path in enumerate(paths)
    for rule in (
      Rule(f'{pattern}.weight', f'{path}/kernel', cut(i, transposed)),
      Rule(f'{pattern}.bias', f'{path}/bias', cut(i, same)),
    )
  ]


def _pieces(sizes: Sequence[int], i: int, convert: Convert) -> Convert:
  before, whole = sum(sizes[:i]), sum(sizes)

  def take(x: np.ndarray) -> np.ndarray:
    if x.shape[0] % whole:
      raise ValueError(
        f'an axis of {x.shape[0]} does not divide into parts as {sizes}.'
      )
    unit = x.shape[0] // whole
    return convert(x[before * unit : (before + sizes[i]) * unit])

  return take
