"""A compressed checkpoint's directory as a model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
import os
from typing import Any, NamedTuple

import numpy as np

from utilized_rank.host.extras import extra
from utilized_rank.models.importing.files import formats
from utilized_rank.models.importing.files.factored import Factored
from utilized_rank.models.importing.files.tensor import Tensor
from utilized_rank.models.importing.open_checkpoint import Opened
from utilized_rank.models.importing.open_checkpoint import open_checkpoint

_SHOWN = 6


class Part(NamedTuple):
  """What is in place of a layer, or of some of its outputs.

  Attributes:
    name: below the layer's own; '' where it is all of the layer.
    inputs: d.
    outputs: m.
    rank: r of a pair; None for one linear layer.
    bias: whether it has one.
  """

  name: str
  inputs: int
  outputs: int
  rank: int | None
  bias: bool


def load_pretrained(
  folder: str | os.PathLike[str], *, kind: Any = None, **options: Any
) -> Any:
  """What `compress_checkpoint` wrote, as a model of transformers.

  The model is transformers' own class, loaded by its own `from_pretrained`: its
  code, dtypes, shards, tied embeddings and `generate` are as they were. Where
  the directory has `NAME.0.weight` (r, inputs) and `NAME.1.weight` (outputs, r)
  for a weight, the layer NAME is two `nn.Linear` in a `Pair`. Where one tensor
  of the checkpoint was several kernels (q, k and v side by side), NAME is a
  `SideBySide` of one such pair for each. No dense weight is allocated on the
  way: layers are exchanged before there is memory behind them.

  A directory that holds no pairs is loaded as it is, as strictly. Nothing is
  downloaded. Needs transformers (seen to work with 5.24) beside the extra
  `torch`.

  Args:
    folder: with `config.json` and weights.
    kind: a class of transformers; default the one that `architectures` in
      `config.json` names.
    **options: as for `from_pretrained`, such as `dtype` (default 'auto': that
      of the config, else of the file) or `attn_implementation`.

  Returns:
    The model, in evaluation mode.

  Raises:
    ImportError: torch or transformers is not installed.
    ValueError: `folder` is no directory with a `config.json`; neither `kind`
      nor the config says which class it is; a pair is in place of no linear
      layer of its class, or of one of another shape; tensors are missing, are
      too many, or have other shapes than the model's.

  >>> from utilized_rank.torch.pretrained import load_pretrained
  >>> model = load_pretrained('llama-7b-80')  # doctest: +SKIP
  """
  folder = os.fspath(folder)
  if not os.path.isfile(os.path.join(folder, 'config.json')):
    raise ValueError(f'{folder!r} is no directory with a config.json')
  with extra('torch'):
    import torch  # noqa: F401
  tensors, others = formats.read_tensors(folder)
  kind = _kind(folder, kind)
  layers: dict[str, list[Part]] = {}
  factored = Factored.of(others)
  if factored is not None:
    layers = _layers(folder, factored, tensors)
  model, info = _with_pairs(kind, layers).from_pretrained(
    folder,
    local_files_only=True,
    output_loading_info=True,
    ignore_mismatched_sizes=True,  # they are told with the others
    **{'dtype': 'auto', **options},
  )
  found = {
    'missing': info['missing_keys'],
    'not known to the model': info['unexpected_keys'],
    'of another shape': info['mismatched_keys'],
  }
  if wrong := {why: names for why, names in found.items() if names}:
    raise ValueError(
      f'{folder} does not fill a {kind.__name__}: '
      + '; '.join(f'{why}: {_some(names)}' for why, names in wrong.items())
    )
  model.__class__ = kind
  return model.eval()


def _kind(folder: str, kind: Any) -> Any:
  """The class of transformers that a directory is of."""
  try:
    import transformers
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f'{error.name} is not installed: load_pretrained makes models of '
      'transformers (pip install transformers)',
      name=error.name,
    ) from error
  if kind is not None:
    return kind
  config = transformers.AutoConfig.from_pretrained(
    folder, local_files_only=True
  )
  names = config.architectures or []
  if len(names) != 1 or not hasattr(transformers, names[0]):
    raise ValueError(
      f'{folder}: its config.json has architectures={names}, which is not one '
      'class of transformers: give kind=, such as '
      'transformers.LlamaForCausalLM'
    )
  return getattr(transformers, names[0])


def _layers(
  folder: str, factored: Factored, tensors: Mapping[str, Tensor]
) -> dict[str, list[Part]]:
  """What is in place of each layer that changed, in the order of outputs."""
  absent = {
    name
    for parts in factored.leaves.values()
    for name in parts.values()
    if name not in tensors
  }
  if absent:
    raise ValueError(f'{folder} lacks tensors of its pairs: {_some(absent)}')
  stems = {name.removesuffix('.weight') for name in factored.replaced}
  found: dict[str, list[tuple[str, str]]] = {}
  for path, parts in factored.leaves.items():
    if 'a' in parts:
      below = parts['a'].removesuffix('.0.weight')
    elif 'weight' in parts:  # beside others that are pairs
      below = parts['weight'].removesuffix('.weight')
    else:
      continue
    stem = below if below in stems else below.rpartition('.')[0]
    found.setdefault(stem, []).append((below[len(stem) + 1 :], path))
  together = [parts for parts in found.values() if len(parts) > 1]
  if together:
    opened = open_checkpoint(folder)
    for several in together:
      several.sort(key=lambda part: _place(opened, factored, part[1]))
  return {
    stem: [
      _part(folder, stem, name, factored.leaves[path], tensors)
      for name, path in several
    ]
    for stem, several in found.items()
  }


def _place(opened: Opened, factored: Factored, path: str) -> tuple[int, ...]:
  """The first row and column that a leaf has in its tensor."""
  target = opened.match.targets[path]
  shape = factored.replaced[target.name]
  indices = np.ix_(*map(np.arange, shape))  # nothing of the tensor's size
  return tuple(
    int(target.of(np.broadcast_to(index, shape)).min()) for index in indices
  )


def _part(
  folder: str,
  stem: str,
  name: str,
  parts: Mapping[str, str],
  tensors: Mapping[str, Tensor],
) -> Part:
  shape_of = lambda key: tensors[parts[key]].shape
  last = f'{stem}.{name}'.rstrip('.')
  if 'a' not in parts:
    outputs, inputs = shape_of('weight')
    return Part(name, inputs, outputs, None, f'{last}.bias' in tensors)
  (rank, inputs), (outputs, other) = shape_of('a'), shape_of('b')
  if rank != other:
    raise ValueError(
      f'{folder}: the pair of {last} is of shapes {shape_of("a")} and '
      f'{shape_of("b")}, whose ranks differ'
    )
  return Part(name, inputs, outputs, rank, f'{last}.1.bias' in tensors)


def _with_pairs(kind: Any, layers: Mapping[str, list[Part]]) -> Any:
  """The class, but its layers are exchanged as soon as they are made."""

  def init(self, *args: Any, **options: Any) -> None:
    kind.__init__(self, *args, **options)
    modules = dict(self.named_modules())
    for stem, parts in layers.items():
      _exchange(self, modules, stem, parts)

  # transformers finds the code, and what it is called, by these names.
  about = {'__init__': init, '__module__': kind.__module__}
  return type(kind.__name__, (kind,), about)


def _exchange(
  model: Any, modules: Mapping[str, Any], stem: str, parts: list[Part]
) -> None:
  """Puts what the directory has in place of a linear layer."""
  from utilized_rank.torch import pairs

  base = f'{model.base_model_prefix}.'
  # transformers, too, adds what a file of the model's body has not in front.
  names = [stem, base + stem, stem.removeprefix(base)]
  name = next((name for name in names if name in modules), None)
  layer = None if name is None else modules[name]
  sizes = None if layer is None else pairs.sizes_of(layer)
  if name is None or layer is None or sizes is None:
    raise ValueError(
      f'{stem} is a pair, and in {type(model).__name__} '
      + ('nothing' if layer is None else f'a {type(layer).__name__}')
      + ', not a linear layer; kind= may be of another class than the weights'
    )
  given = {part.inputs for part in parts}, sum(part.outputs for part in parts)
  if given != ({sizes[0]}, sizes[1]):
    raise ValueError(
      f'{stem}: the layer of {type(model).__name__} has (inputs, outputs) '
      f'{sizes}; in place of it are '
      f'{[(part.inputs, part.outputs) for part in parts]}'
    )
  made = {
    part.name: pairs.empty(part.inputs, part.outputs, part.rank, part.bias)
    for part in parts
  }
  new = made[''] if '' in made else pairs.SideBySide(made)
  new.to(layer.weight.dtype)
  model.set_submodule(name, new)


def _some(names: Any) -> str:
  listed = sorted(str(n[0] if isinstance(n, tuple) else n) for n in names)
  more = len(listed) - _SHOWN
  return ', '.join(listed[:_SHOWN]) + (f' and {more} more' if more > 0 else '')
