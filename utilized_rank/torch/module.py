"""A module of PyTorch as a function of its parameters, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utilized_rank.host.extras import extra
from utilized_rank.host.warning import warn
from utilized_rank.lowrank import leaf as leaves
from utilized_rank.torch import torchax_import

Params = dict[str, Any]


def from_module(
  module: Any, *, output: str | Callable[[Any], Any] | None = None
) -> tuple[Callable[[Params, Any], Any], Params]:
  """A `torch.nn.Module` as `fn(params, batch)`, for every function of `ur`.

  It runs the module's own code on JAX arrays (by torchax), so that nothing is
  written anew for a model; what is compiled is compiled by XLA.

  Args:
    module: in evaluation mode (`module.eval()`); it is not changed.
    output: which of the outputs to return, such as 'logits', or a function of
      them; default all of them that are arrays.

  Returns:
    fn: a batch that is a mapping is passed as keywords
      (`dict(input_ids=..., attention_mask=...)`), a tuple or list as
      arguments, and an array as the only one. Returns arrays in dictionaries,
      tuples and lists.
    params: its parameters and floating buffers, by their names in
      `state_dict()`; of a parameter with two names the first. They are copies.

  Raises:
    ImportError: torch or torchax is not installed.
    TypeError: `module` is none.
    ValueError: it is in training mode.
    KeyError: when called, `output` is none of the outputs.
  """
  _check_module(module)
  torchax, env = torchax_import.load()
  states, run = torchax.extract_jax(module, env)
  kept = module.state_dict()
  floating = lambda v: jnp.issubdtype(v.dtype, jnp.inexact)
  params = {k: v for k, v in states.items() if k in kept and floating(v)}
  fixed = {k: v for k, v in states.items() if k not in params}

  def fn(params: Params, batch: Any) -> Any:
    args, keywords = _arguments(batch)
    return _chosen(_arrays(run({**fixed, **params}, args, keywords)), output)

  return fn, params


def _check_module(module: Any) -> None:
  with extra('torch'):
    from torch import nn

  if not isinstance(module, nn.Module):
    raise TypeError(f'module is a torch.nn.Module, got {type(module).__name__}')
  if module.training:
    raise ValueError(
      'the module is in training mode, where dropout and batch statistics '
      'make it another function at each call: call module.eval() first'
    )


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
  is_numpy = lambda v: isinstance(v, np.ndarray)
  batch = jax.tree.map(lambda v: jnp.asarray(v) if is_numpy(v) else v, batch)
  if isinstance(batch, Mapping):
    return (), dict(batch)
  if isinstance(batch, (tuple, list)):
    return tuple(batch), {}
  return (batch,), {}


_NONE = object()


def _arrays(value: Any) -> Any:
  """Outputs as containers that JAX knows; what holds no array is left out."""
  if isinstance(value, (jax.Array, np.ndarray)):
    return value
  if isinstance(value, Mapping):
    found = {k: _arrays(v) for k, v in value.items()}
    return {k: v for k, v in found.items() if v is not _NONE} or _NONE
  if isinstance(value, (tuple, list)):
    several = [v for v in map(_arrays, value) if v is not _NONE]
    return type(value)(several) if type(value) is list else tuple(several)
  return _NONE


def _chosen(outputs: Any, output: str | Callable[[Any], Any] | None) -> Any:
  if outputs is _NONE:
    raise ValueError('the module returned no array')
  if output is None:
    return outputs
  if callable(output):
    return output(outputs)
  if not isinstance(outputs, Mapping) or output not in outputs:
    there = list(outputs) if isinstance(outputs, Mapping) else type(outputs)
    raise KeyError(f'output={output!r} is none of the outputs: {there}')
  return outputs[output]


def to_module(module: Any, small: Params) -> Any:
  """The module with two layers in place of each that was factorized.

  `nn.Linear`, `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` and the `Conv1D` of GPT-2
  become a `Pair` of stock layers: the weights `NAME.weight` are
  `NAME.0.weight` and `NAME.1.weight`, the bias is `NAME.1.bias`. A constant
  of mean compensation is a bias of its own where there was none. The weights
  of other layers (packed projections of `nn.MultiheadAttention`, transposed
  convolutions, those tied to an embedding) are multiplied out again, which a
  warning names: `select=` leaves them dense. Pairs have no identity block:
  choose ranks with `gauge=None`, so that what is counted is what is stored.

  Args:
    module: the one given to `from_module`; it is not changed.
    small: from `compress`, `factorize`, fine-tuning: a tree of `params`.

  Returns:
    A new module.

  Raises:
    KeyError: `small` lacks a parameter of the module, or has others.
    TypeError: a leaf is neither an array nor `LowRank`.
  """
  _check_module(module)
  from utilized_rank.torch import pairs

  new = copy.deepcopy(module)
  owners, kept = _owners(new), new.state_dict()
  tensors = {
    name: tensor
    for name, tensor in (*new.named_parameters(), *new.named_buffers())
    if name in kept and tensor.is_floating_point()
  }
  _check_names(tensors, small)
  named = leaves.with_left(leaves.write_out(dict(small)))
  multiplied: list[str] = []
  made: dict[str, pairs.Pair] = {}
  for name, leaf in named.items():
    if leaves.is_low_rank(leaf):
      continue
    if not isinstance(leaf, (jax.Array, np.ndarray)):
      raise TypeError(
        f'{name!r} is a {type(leaf).__name__}: of the leaves in place of a '
        'kernel a module can hold LowRank alone (heads=False, or merge first)'
      )
    pairs.fill(tensors[name], leaf)
  for name, leaf in named.items():
    if not leaves.is_low_rank(leaf):
      continue
    path, _, key = name.rpartition('.')
    layer = new.get_submodule(path)
    bias = named.get(f'{path}.bias' if path else 'bias')
    pair = None
    if key == 'weight' and len(owners[name]) == 1:
      pair = pairs.pair_of(layer, leaf, bias)
    if pair is None:
      multiplied.append(name)
      pairs.fill(tensors[name], leaf.dense())
      if leaf.c is not None:
        _give_bias(new, owners[name], leaf.c)
    else:
      made[name] = pair
  for name, pair in made.items():
    holder = made.get(small[name].left)
    if holder is not None:  # one left factor for both
      pair[0].weight = holder[0].weight
    path = name.rpartition('.')[0]
    if path:
      new.set_submodule(path, pair)
    else:
      new = pair
  if multiplied:
    warn(
      'multiplied out again, since their layers are no plain products: '
      + ', '.join(multiplied)
    )
  return new


def _check_names(params: Mapping[str, Any], small: Params) -> None:
  missing = sorted(set(params) - set(small))
  odd = sorted(set(small) - set(params))
  if missing or odd:
    raise KeyError(
      f'small is no tree of this module: it lacks {missing[:4]} and has '
      f'{odd[:4]} that the module does not'
    )


def _give_bias(module: Any, owners: list[str], c: Any) -> None:
  """Makes a constant the bias of the linear layer that has the weight.

  Raises:
    ValueError: there is none without a bias.
  """
  with extra('torch'):
    from torch import nn

  from utilized_rank.torch import pairs

  for name in owners:
    layer = module.get_submodule(name.rpartition('.')[0])
    if isinstance(layer, nn.Linear) and layer.bias is None:
      layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features))
      pairs.fill(layer.bias, c)
      return
  raise ValueError(
    f'{owners[0]!r} has a constant at its output, and its module no place for '
    'it: factorize or compress with compensate_mean=False, or leave it dense '
    'by select='
  )


def _owners(module: Any) -> dict[str, list[str]]:
  """By a parameter's first name: all the names that it has."""
  first: dict[int, str] = {}
  names: dict[str, list[str]] = {}
  for name, parameter in module.named_parameters(remove_duplicate=False):
    names.setdefault(first.setdefault(id(parameter), name), []).append(name)
  return names
