"""From a checkpoint file to a model and its variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import logging
from typing import Any

import jax
import numpy as np

from utilized_rank.host.extras import extra
from utilized_rank.models.importing.open_checkpoint import Imported
from utilized_rank.models.importing.open_checkpoint import open_checkpoint
from utilized_rank.models.positions import resize_positions
from utilized_rank.models.vit import ViT

with extra('models'):
  import flax.linen as nn


def load_checkpoint(
  path: str,
  *,
  dtype: Any = np.float32,
  image_size: int | None = None,
  ignore: Sequence[str] = (),
  config: str | Mapping[str, Any] | None = None,
  architecture: str | None = None,
  assume: bool = False,
  **options: Any,
) -> tuple[nn.Module, dict[str, Any], Imported]:
  """A published checkpoint as a model of this package and its variables.

  Reads `.npz`, `.safetensors`, `.pth` and Flax `.msgpack`, and directories of
  Hugging Face and timm, none with PyTorch, none running code of the file. Names
  and shapes tell which code base's layout it is and how large the model is.
  What they do not tell and what changes the output (heads, activation, rotary
  wavelengths) is read from the `config.json` beside the file or from the
  architecture's name; where nothing says it, loading refuses. Tensors are read
  one at a time into arrays that are there already, so that loading takes the
  memory of the variables and of one tensor.

  A directory that `compress_checkpoint` wrote has `LowRank` leaves in place of
  kernels: `ur.low_rank(model.apply)` runs on them.

  Args:
    path: the file, or a directory with the files of one model.
    dtype: type of the variables.
    image_size: side of the images, if the position embeddings of a ViT are to
      be resized, as the layout's own code does it.
    ignore: regular expressions; tensors whose whole name matches one are left
      out, and named in `Imported.ignored`.
    config: the `config.json` of Hugging Face or timm, or its path, where it is
      not beside the file.
    architecture: the name of the model in timm or torchvision, such as
      `'vit_base_patch16_224'`.
    assume: take what nothing says as it usually is; `Imported.assumed` has it.
    **options: attributes of the model that shapes do not tell, such as `heads`
      or `activation`; they take the place of what was found.

  Returns:
    `(model, variables, imported)`: `model.apply(variables, batch)`. Leaves are
    numpy arrays.

  Raises:
    ValueError: the layout is unknown or ambiguous, nothing says an option,
      the metadata say what the model cannot do, tensors are left over or
      missing, shapes do not fit, or the file is not safe to read.
    TypeError: the model has no such option, or no positions to resize.

  >>> import tempfile, os
  >>> path = os.path.join(tempfile.mkdtemp(), 'mlp.npz')
  >>> np.savez(path, **{'Dense_0/kernel': np.ones((4, 3)),
  ...                   'Dense_0/bias': np.zeros(3)})
  >>> model, variables, imported = load_checkpoint(path, activation='relu')
  >>> imported.layout, model.apply(variables, np.ones((1, 4))).tolist()
  ('MLP of Flax', [[4.0, 4.0, 4.0]])
  """
  opened = open_checkpoint(
    path,
    ignore=ignore,
    config=config,
    architecture=architecture,
    assume=assume,
    **options,
  )
  model, imported = opened.model, opened.imported
  variables = opened.variables(dtype)
  if image_size is not None:
    batch = _resize(model, variables, imported.input, image_size, opened.resize)
    imported = dataclasses.replace(imported, input=batch)
  logging.getLogger(__name__).info('%s: %s', path, imported)
  return model, variables, imported


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
      'embeddings to resize; give it images of another size as they are.'
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
