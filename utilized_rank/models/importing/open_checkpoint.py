"""A checkpoint that is recognised, its tensors still in their files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import os
from typing import Any

import jax
import numpy as np

from utilized_rank.host.extras import extra
from utilized_rank.models.importing import by_shape
from utilized_rank.models.importing import hf_vit_layouts
from utilized_rank.models.importing import language_layouts
from utilized_rank.models.importing import layouts
from utilized_rank.models.importing import metadata as metadata_of
from utilized_rank.models.importing import model_types
from utilized_rank.models.importing import other_layouts
from utilized_rank.models.importing import vit_layouts
from utilized_rank.models.importing.files import formats
from utilized_rank.models.importing.files.factored import Factored
from utilized_rank.models.importing.files.tensor import Tensor
from utilized_rank.models.importing.hierarchies import convnext
from utilized_rank.models.importing.hierarchies import efficientnet
from utilized_rank.models.importing.hierarchies import swin
from utilized_rank.tree import paths

with extra('models'):
  import flax.linen as nn

LAYOUTS: tuple[layouts.Layout, ...] = (
  *vit_layouts.LAYOUTS,
  *hf_vit_layouts.LAYOUTS,
  *language_layouts.LAYOUTS,
  *other_layouts.LAYOUTS,
  *convnext.LAYOUTS,
  *efficientnet.LAYOUTS,
  *swin.LAYOUTS,
)
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Imported:
  """What was found in a checkpoint.

  Attributes:
    layout: whose names it has.
    prefix: what these names had in front.
    input: an abstract batch of one example.
    assumed: options of the model that are taken as they usually are, with
      `assume=True`.
    ignored: tensors that are no part of the model, and what is no tensor.
    metadata: where the options were found that no shape tells, or ''.
  """

  layout: str
  prefix: str
  input: jax.ShapeDtypeStruct
  assumed: Mapping[str, Any]
  ignored: tuple[str, ...]
  metadata: str = ''


class UnsaidError(ValueError):
  """Nothing says what changes the output of the model."""


@dataclasses.dataclass(frozen=True)
class Opened:
  """A checkpoint as a model, whose variables are read when they are asked for.

  Attributes:
    path: of the checkpoint.
    model: what it is a checkpoint of.
    imported: what was found in it.
    match: the layout of its names, and which leaf each tensor is.
    tensors: what is in its files, by name.
    factored: the leaves that are pairs; None where there are none.
    resize: the layout's way to resize position embeddings, or None.
  """

  path: str
  model: nn.Module
  imported: Imported
  match: layouts.Match
  tensors: Mapping[str, Tensor]
  factored: Factored | None
  resize: Any

  @functools.cached_property
  def abstract(self) -> Any:
    """The variables' shapes, of what is a pair those of the dense kernel."""
    return jax.eval_shape(
      self.model.init, jax.random.key(0), self.imported.input
    )

  def leaves(
    self, wanted: Iterable[str], dtype: Any = np.float32
  ) -> dict[str, Any]:
    """Some leaves by path, numpy arrays; tensors are read one at a time."""
    expected, _ = paths.flatten(self.abstract)
    found: dict[str, Any] = {}
    by_tensor: dict[str, list[str]] = {}
    for place in wanted:
      if self.factored is not None and place in self.factored.leaves:
        shape = expected[place].shape
        found[place] = self.factored.leaf(place, self.tensors, shape, dtype)
        continue
      found[place] = np.empty(expected[place].shape, dtype)
      by_tensor.setdefault(self.match.targets[place].name, []).append(place)
    for name, places in by_tensor.items():
      values = self.tensors[name].read()
      for place in places:
        leaf = found[place]
        leaf[...] = self.match.targets[place].of(values).reshape(leaf.shape)
    return found

  def variables(self, dtype: Any = np.float32) -> dict[str, Any]:
    """All leaves, in the model's tree."""
    expected, treedef = paths.flatten(self.abstract)
    return paths.unflatten(treedef, self.leaves(expected, dtype))


def open_checkpoint(
  path: str,
  *,
  ignore: Sequence[str] = (),
  config: str | Mapping[str, Any] | None = None,
  architecture: str | None = None,
  assume: bool = False,
  **options: Any,
) -> Opened:
  """Recognises a checkpoint without reading its weights.

  The arguments, and the errors, are those of `load_checkpoint`.

  >>> import tempfile
  >>> path = os.path.join(tempfile.mkdtemp(), 'mlp.npz')
  >>> np.savez(path, **{'Dense_0/kernel': np.ones((4, 3)),
  ...                   'Dense_0/bias': np.zeros(3)})
  >>> opened = open_checkpoint(path, activation='relu')
  >>> opened.leaves(['params/Dense_0/bias'])
  {'params/Dense_0/bias': array([0., 0., 0.], dtype=float32)}
  """
  path = os.fspath(path)
  tensors, others = formats.read_tensors(path)
  # PyTorch saves as empty what a model does not have (no registers).
  shapes = {n: t.shape for n, t in tensors.items() if 0 not in t.shape}
  factored = Factored.of(others)
  if factored is not None:
    shapes = factored.dense_shapes(shapes)
  metadata = metadata_of.find(path, others, config, architecture)
  said = dict(metadata.facts)
  if metadata.config is not None:
    said, unused = model_types.facts(metadata.config, metadata.source)
    ignore = (*ignore, *unused)
  said |= options
  match = _recognise(path, shapes, ignore, metadata)
  layout = match.layout
  inside = {n.removeprefix(match.prefix): s for n, s in shapes.items()}
  mapped = {p: t.shape(shapes[t.name]) for p, t in match.targets.items()}
  assumed = {}
  if metadata.architecture is None:  # a name says everything
    assumed = _unsaid(path, layout, mapped, said, assume)
  chosen = {**layout.settings, **assumed, **said}
  resize = chosen.pop('resize', None)
  try:
    model, batch = layout.family(layout, mapped, inside, chosen)
  except KeyError as error:
    raise ValueError(
      f'{path} has the layout of {layout.name}, but nothing in it is '
      f'{error.args[0]}; found {_some(shapes)}.'
    ) from error
  imported = Imported(
    layout.name,
    match.prefix,
    batch,
    assumed,
    (*match.ignored, *(n for n in others if not n.startswith('__metadata__'))),
    metadata.source,
  )
  opened = Opened(path, model, imported, match, tensors, factored, resize)
  _check(opened, shapes)
  return opened


def _unsaid(
  path: str,
  layout: layouts.Layout,
  mapped: layouts.Shapes,
  said: Mapping[str, Any],
  assume: bool,
) -> dict[str, Any]:
  """What neither shapes nor metadata nor the caller say, as it usually is."""
  unsaid = {k: u for k, u in layout.assumed.items() if k not in said}
  width = by_shape.width_without_heads(mapped)
  if width is not None and 'heads' not in said:
    if assume and width not in layout.heads:
      raise ValueError(
        f'{path}: no shape tells the number of attention heads, and the layout '
        f'of {layout.name} has no convention for width {width}; give heads=.'
      )
    usual = layout.heads.get(width)
    unsaid['heads'] = layouts.Usual(usual, 'one for every 64 or so features')
  if unsaid and not assume:
    listed = '; '.join(
      f'{k}= (usually {u.value!r}'
      + (f', {u.elsewhere})' if u.elsewhere else ')')
      for k, u in unsaid.items()
    )
    hint = ', or name the model with architecture=' * layout.architectures
    hint += ', or give its config.json with config=' * bool(layout.model_types)
    raise UnsaidError(
      f'{path} has the layout of {layout.name}, and neither its shapes nor '
      f'metadata say what changes the output. Give {listed}{hint}, or take '
      'what is usual with assume=True.'
    )
  return {k: u.value for k, u in unsaid.items()}


def _recognise(
  path: str,
  shapes: layouts.Shapes,
  ignore: Sequence[str],
  metadata: metadata_of.Metadata,
) -> layouts.Match:
  """The only layout and prefix that know all tensors."""
  partial: list[layouts.Match] = []
  candidates = _candidates(metadata)
  for layout in candidates:
    prefixes = {
      name.removesuffix(anchor)
      for anchor in layout.anchors
      for name in shapes
      if name.endswith(anchor)
    }
    matches = [
      layouts.match(layout, prefix, shapes, ignore)
      for prefix in sorted(prefixes)
      if prefix[-1:] in ('', '.', '/')
    ]
    whole = _shortest([m for m in matches if m.targets and not m.unknown])
    # What stands beside a model in other files may be all there is in this.
    first = [m for m in whole if not m.aside] or whole
    if len(first) == 1:
      return first[0]
    partial += matches
  if not partial:
    known = '; '.join(f'{x.name}: {" or ".join(x.anchors)}' for x in candidates)
    raise ValueError(
      f'{path} has no known layout. Expected one of these names, with any '
      f'prefix: {known}. Found {_some(shapes)}.'
    )
  nearest = min(partial, key=lambda m: (len(m.unknown), not m.targets))
  if not nearest.unknown:
    several = {m.prefix: None for m in partial if not m.unknown}
    raise ValueError(
      f'{path} has the layout of {nearest.layout.name} more than once, below '
      f'{", ".join(map(repr, several))}; name all but one in ignore=.'
    )
  raise ValueError(
    f'{path} is nearest to the layout of {nearest.layout.name} (prefix '
    f'{nearest.prefix!r}), which does not know {len(nearest.unknown)} of '
    f'{len(shapes)} tensors: {_some({n: shapes[n] for n in nearest.unknown})}. '
    'Expected names such as '
    f'{_some({t.name: shapes[t.name] for t in nearest.targets.values()})}. '
    'Where they are no part of the model, name them in ignore=.'
  )


def _shortest(whole: list[layouts.Match]) -> list[layouts.Match]:
  """Of prefixes below which the same tensors are seen, the shortest."""
  seen: dict[frozenset[str], layouts.Match] = {}
  for match in whole:
    names = frozenset(t.name for t in match.targets.values())
    seen.setdefault(names, match)
  return list(seen.values())


def _candidates(metadata: metadata_of.Metadata) -> Sequence[layouts.Layout]:
  """A model that metadata name is never a near relative."""
  if metadata.architecture is not None:
    return [x for x in LAYOUTS if x.architectures]
  if metadata.config is None:
    return [x for x in LAYOUTS if not x.by_config]
  kind = metadata.config['model_type']
  found = [x for x in LAYOUTS if kind in x.model_types]
  if not found:
    known = sorted({t for x in LAYOUTS for t in x.model_types})
    raise ValueError(
      f'{metadata.source} has model_type {kind!r}, which is not known here; '
      f'known are {", ".join(known)}.'
    )
  return found


def _some(shapes: layouts.Shapes) -> str:
  shown = [f'{name} {shape}' for name, shape in list(shapes.items())[:_SHOWN]]
  more = len(shapes) - len(shown)
  return ', '.join(shown) + (f' and {more} more' if more else '')


def _check(opened: Opened, shapes: layouts.Shapes) -> None:
  """Refuses tensors that are not what the model needs."""
  path, match = opened.path, opened.match
  expected, _ = paths.flatten(opened.abstract)
  missing = {
    p: leaf.shape for p, leaf in expected.items() if p not in match.targets
  }
  extra = {
    p: shapes[t.name] for p, t in match.targets.items() if p not in expected
  }
  if missing or extra:
    raise ValueError(
      f'{path} does not fill the {type(opened.model).__name__} that its shapes '
      f'describe in the layout of {match.layout.name}. Missing: '
      f'{_some(missing) or "nothing"}. Left over: {_some(extra) or "nothing"}.'
    )
  for place, target in match.targets.items():
    shape = expected[place].shape
    found = target.shape(shapes[target.name])
    if not _fits(found, shape):
      raise ValueError(
        f'{path}: {target.name} gives {place} the shape {found}; it should '
        f'be {shape}.'
      )


def _fits(found: layouts.Shape, shape: layouts.Shape) -> bool:
  """The same axes, but for those of length 1 and for heads taken apart."""
  a, b = (tuple(n for n in x if n != 1) for x in (found, shape))
  return a == b or any(
    a == (*b[:i], b[i] * b[i + 1], *b[i + 2 :]) for i in range(len(b) - 1)
  )
