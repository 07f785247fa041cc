"""From a checkpoint file to a model and its variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import logging
import math
from typing import Any

import jax
import numpy as np

from utilized_rank.host.extras import extra
from utilized_rank.models.importing import formats
from utilized_rank.models.importing import layouts
from utilized_rank.models.importing import other_layouts
from utilized_rank.models.importing import vit_layouts
from utilized_rank.models.importing.tensor import Tensor
from utilized_rank.models.positions import resize_positions
from utilized_rank.models.vit import ViT
from utilized_rank.tree import paths

with extra('models'):
  import flax.linen as nn

LAYOUTS: tuple[layouts.Layout, ...] = (
  *vit_layouts.LAYOUTS,
  *other_layouts.LAYOUTS,
)
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Imported:
  """What was found in a checkpoint.

  Attributes:
    layout: whose names it has.
    prefix: what these names had in front.
    input: an abstract batch of one example.
    assumed: options of the model that are no matter of shapes; give them to
      `load_checkpoint` where the checkpoint has others.
    ignored: tensors that are no part of the model, and what is no tensor.
  """

  layout: str
  prefix: str
  input: jax.ShapeDtypeStruct
  assumed: Mapping[str, Any]
  ignored: tuple[str, ...]


def load_checkpoint(
  path: str,
  *,
  dtype: Any = np.float32,
  image_size: int | None = None,
  ignore: Sequence[str] = (),
  **options: Any,
) -> tuple[nn.Module, dict[str, Any], Imported]:
  """A published checkpoint as a model of this package and its variables.

  Reads `.npz`, `.safetensors`, `.pth` and Flax `.msgpack`, none with PyTorch,
  none running code of the file. Names and shapes tell which code base's layout
  it is and how large the model is. Tensors are read one at a time into arrays
  that are there already, so that loading takes the memory of the variables and
  of one tensor.

  Args:
    path: the file.
    dtype: type of the variables.
    image_size: side of the images, if the position embeddings of a ViT are to
      be resized, as the layout's own code does it.
    ignore: regular expressions; tensors whose whole name matches one are left
      out, and named in `Imported.ignored`.
    **options: attributes of the model that shapes do not tell, such as `heads`
      or `activation`; they take the place of what was found.

  Returns:
    `(model, variables, imported)`: `model.apply(variables, batch)`. Leaves are
    numpy arrays.

  Raises:
    ValueError: the layout is unknown or ambiguous, tensors are left over or
      missing, shapes do not fit, or the file is not safe to read.
    TypeError: the model has no such option, or no positions to resize.

  >>> import tempfile, os
  >>> path = os.path.join(tempfile.mkdtemp(), 'mlp.npz')
  >>> np.savez(path, **{'Dense_0/kernel': np.ones((4, 3)),
  ...                   'Dense_0/bias': np.zeros(3)})
  >>> model, variables, imported = load_checkpoint(path)
  >>> imported.layout, model.apply(variables, np.ones((1, 4))).tolist()
  ('MLP of Flax', [[4.0, 4.0, 4.0]])
  """
  tensors, others = formats.read_tensors(path)
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  match = _recognise(path, shapes, ignore)
  layout = match.layout
  chosen = {**layout.settings, **layout.assumed, **options}
  resize = chosen.pop('resize', None)
  mapped = {p: t.shape(shapes[t.name]) for p, t in match.targets.items()}
  source = {n.removeprefix(match.prefix): s for n, s in shapes.items()}
  try:
    model, batch = layout.family(layout, mapped, source, chosen)
  except KeyError as error:
    raise ValueError(
      f'{path} has the layout of {layout.name}, but nothing in it is '
      f'{error.args[0]}; found {_some(shapes)}.'
    ) from error
  variables = _fill(path, model, batch, match, tensors, dtype)
  if image_size is not None:
    batch = _resize(model, variables, batch, image_size, resize)
  assumed = {k: chosen[k] for k in layout.assumed if k not in options}
  if layout.heads and 'heads' not in options:
    assumed['heads'] = model.heads
  imported = Imported(
    layout.name, match.prefix, batch, assumed, (*match.ignored, *others)
  )
  logging.getLogger(__name__).info('%s: %s', path, imported)
  return model, variables, imported


def _recognise(
  path: str, shapes: layouts.Shapes, ignore: Sequence[str]
) -> layouts.Match:
  """The only layout and prefix that know all tensors."""
  partial: list[layouts.Match] = []
  for layout in LAYOUTS:
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
    whole = [m for m in matches if m.targets and not m.unknown]
    if len(whole) == 1:
      return whole[0]
    partial += matches
  if not partial:
    known = '; '.join(f'{x.name}: {" or ".join(x.anchors)}' for x in LAYOUTS)
    raise ValueError(
      f'{path} has no known layout. Expected one of these names, with any '
      f'prefix: {known}. Found {_some(shapes)}.'
    )
  nearest = min(partial, key=lambda m: len(m.unknown))
  raise ValueError(
    f'{path} is nearest to the layout of {nearest.layout.name} (prefix '
    f'{nearest.prefix!r}), which does not know {len(nearest.unknown)} of '
    f'{len(shapes)} tensors: {_some({n: shapes[n] for n in nearest.unknown})}. '
    'Expected names such as '
    f'{_some({t.name: shapes[t.name] for t in nearest.targets.values()})}. '
    'Where they are no part of the model, name them in ignore=.'
  )


def _some(shapes: layouts.Shapes) -> str:
  shown = [f'{name} {shape}' for name, shape in list(shapes.items())[:_SHOWN]]
  more = len(shapes) - len(shown)
  return ', '.join(shown) + (f' and {more} more' if more else '')


def _fill(
  path: str,
  model: nn.Module,
  batch: jax.ShapeDtypeStruct,
  match: layouts.Match,
  tensors: Mapping[str, Tensor],
  dtype: Any,
) -> dict[str, Any]:
  abstract = jax.eval_shape(model.init, jax.random.key(0), batch)
  expected, treedef = paths.flatten(abstract)
  missing = {
    p: leaf.shape for p, leaf in expected.items() if p not in match.targets
  }
  extra = {
    p: tensors[t.name].shape
    for p, t in match.targets.items()
    if p not in expected
  }
  if missing or extra:
    raise ValueError(
      f'{path} does not fill the {type(model).__name__} that its shapes '
      f'describe in the layout of {match.layout.name}. Missing: '
      f'{_some(missing) or "nothing"}. Left over: {_some(extra) or "nothing"}.'
    )
  leaves: dict[str, Any] = {}
  by_tensor: dict[str, list[tuple[str, layouts.Target]]] = {}
  for place, target in match.targets.items():
    shape = expected[place].shape
    found = target.shape(tensors[target.name].shape)
    if math.prod(found) != math.prod(shape):
      raise ValueError(
        f'{path}: {target.name} gives {place} the shape {found}; it should '
        f'be {shape}.'
      )
    leaves[place] = np.empty(shape, dtype)
    by_tensor.setdefault(target.name, []).append((place, target))
  for name, targets in by_tensor.items():
    values = tensors[name].read()
    for place, target in targets:
      leaves[place][...] = target.of(values).reshape(leaves[place].shape)
  return paths.unflatten(treedef, {p: leaves[p] for p in expected})


def _resize(
  model: nn.Module,
  variables: dict[str, Any],
  batch: jax.ShapeDtypeStruct,
  image_size: int,
  method: str,
) -> jax.ShapeDtypeStruct:
  if not isinstance(model, ViT):
    raise TypeError(
      f'image_size={image_size}: a {type(model).__name__} has no position '
      'embeddings to resize; it takes images of any size.'
    )
  if image_size % model.patch_size:
    raise ValueError(
      f'image_size={image_size} is no multiple of the patch size '
      f'{model.patch_size}.'
    )
  side = image_size // model.patch_size
  holder = variables['params']['Transformer']['posembed_input']
  table = holder['pos_embedding']
  resized = resize_positions(table, (side, side), method)
  holder['pos_embedding'] = resized.astype(table.dtype)
  shape = (1, image_size, image_size, batch.shape[-1])
  return jax.ShapeDtypeStruct(shape, batch.dtype)
