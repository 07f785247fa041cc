"""torchax's environment, but what can be computed early is.

Modules keep values from call to call: the rotary angles of an image size, in
transformers. Computed while a function is traced they would be values of that
trace, which the next call may not read.
"""

from __future__ import annotations

from typing import Any

import jax

from utilized_rank.host.extras import extra

with extra('torch'):
  import torch
  from torch.utils import _pytree
  from torchax import tensor
  from torchax.view import View


class Environment(tensor.Environment):
  """One that traces only what depends on a traced array."""

  def dispatch(self, func, types, args=(), kwargs=None):
    if func in (torch.Tensor.copy_, torch.ops.aten.copy_.default):
      into, source, *rest = args  # torchax wants no view to copy from
      source = source.torch() if isinstance(source, View) else source
      args = (into, source, *rest)
    run = super().dispatch
    if _is_traced((args, kwargs)):
      return run(func, types, args, kwargs)
    with jax.ensure_compile_time_eval():
      return run(func, types, args, kwargs)

  def j2t_iso(self, jaxarray: Any) -> Any:
    wrap = lambda array: _Tensor(array, self)
    return _pytree.tree_map_only(jax.Array, wrap, jaxarray)


class _Tensor(tensor.Tensor):
  """A tensor whose own methods, which no environment sees, are early too."""

  def flatten(self, *args, **kwargs):
    return self._early(super().flatten, *args, **kwargs)

  def detach(self):
    return self._early(super().detach)

  def _early(self, method, *args, **kwargs):
    if _is_traced(self):
      return method(*args, **kwargs)
    with jax.ensure_compile_time_eval():
      return method(*args, **kwargs)


def _is_traced(values: Any) -> bool:
  """Whether a tensor among nested values holds an array that is traced."""
  return any(
    isinstance(v.jax(), jax.core.Tracer)
    for v in _pytree.tree_leaves(values)
    if isinstance(v, (tensor.Tensor, View))
  )
