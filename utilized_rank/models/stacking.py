"""A looped ViT's tree and a scanned one's, and the way between them."""

from __future__ import annotations

from collections.abc import Mapping
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = Mapping[str, Any]


def stack_blocks(params: Params) -> dict[str, Any]:
  """Turns a looped ViT's tree into that of the same ViT with `scan=True`.

  Args:
    params: the tree with `Transformer/encoderblock_{i}`, or the variables
      dict `{'params': tree}`. Arrays of numpy stay in numpy, and so exact.

  Returns:
    A new tree of the same form with `Transformer/encoderblock`, whose leaves
    have one more axis of length depth in front. `unstack_blocks` undoes it.

  Raises:
    ValueError: there are no blocks, a number is missing, or the blocks'
      trees or shapes differ.
  """
  if 'params' in params:
    return {**params, 'params': stack_blocks(params['params'])}
  encoder = dict(_encoder(params))
  numbers = sorted(
    int(match[1])
    for key in encoder
    if (match := re.fullmatch(r'encoderblock_(\d+)', key))
  )
  if not numbers or numbers != list(range(len(numbers))):
    raise ValueError(
      'Transformer has the blocks '
      f'{[f"encoderblock_{i}" for i in numbers]}; stacking takes '
      'encoderblock_0 to encoderblock_{depth-1} without a gap.'
    )
  blocks = [encoder.pop(f'encoderblock_{i}') for i in numbers]
  for i, block in enumerate(blocks):
    if _signature(block) != _signature(blocks[0]):
      raise ValueError(
        f'encoderblock_{i} differs from encoderblock_0 in its tree or its '
        'shapes, so they do not stack; blocks of different ranks stay looped.'
      )
  encoder['encoderblock'] = jax.tree.map(_stack, *blocks)
  return {**params, 'Transformer': encoder}


def unstack_blocks(params: Params) -> dict[str, Any]:
  """Turns the tree of a ViT with `scan=True` into that of the looped ViT.

  Args:
    params: the tree with `Transformer/encoderblock`, or `{'params': tree}`.

  Returns:
    A new tree of the same form with `Transformer/encoderblock_{i}`.

  Raises:
    ValueError: there is no stacked block, or its leaves differ in length.
  """
  if 'params' in params:
    return {**params, 'params': unstack_blocks(params['params'])}
  encoder = dict(_encoder(params))
  if 'encoderblock' not in encoder:
    raise ValueError(
      f'Transformer has the keys {sorted(encoder)}; unstacking takes the '
      'stacked block encoderblock.'
    )
  stacked = encoder.pop('encoderblock')
  lengths = {leaf.shape[0] for leaf in jax.tree.leaves(stacked)}
  if len(lengths) != 1:
    raise ValueError(
      'the leaves of Transformer/encoderblock have leading axes of lengths '
      f'{sorted(lengths)}; all must have one length, the depth.'
    )
  for i in range(lengths.pop()):
    encoder[f'encoderblock_{i}'] = jax.tree.map(lambda x, i=i: x[i], stacked)
  return {**params, 'Transformer': encoder}


def _encoder(params: Params) -> Params:
  if 'Transformer' not in params:
    raise ValueError(
      f'the tree has the keys {sorted(params)}; a ViT has Transformer.'
    )
  return params['Transformer']


def _signature(tree: Any) -> tuple[Any, ...]:
  leaves, structure = jax.tree.flatten(tree)
  return structure, [(x.shape, x.dtype) for x in leaves]


def _stack(*leaves: Any) -> Any:
  # jnp.stack would cut numpy's float64 to float32.
  if all(isinstance(leaf, np.ndarray) for leaf in leaves):
    return np.stack(leaves)
  return jnp.stack(leaves)
