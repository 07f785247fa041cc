"""torchax, loaded beside a newer PyTorch than it was written for."""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import Any

from utilized_rank.host.extras import extra

_LOCK = threading.Lock()


@functools.cache
def load() -> tuple[Any, Any]:
  """The module `torchax`, and an environment that computes early.

  What depends on no traced array is computed at once. Modules keep such values
  from call to call (the rotary angles of an image size, in transformers), where
  a value of a trace would be a leak.

  Raises:
    ImportError: torchax or torch is not installed.
  """
  with extra('torch'):
    import torch  # noqa: F401
  with _LOCK, _missing_overloads():
    try:
      with extra('torch'):
        import torchax
    except ImportError as error:
      raise ImportError(
        'a module of PyTorch becomes a function of JAX by torchax, which does '
        f'not load: {error}'
      ) from error
    from utilized_rank.torch.early import Environment

    return torchax, Environment()


@contextlib.contextmanager
def _missing_overloads():
  """Lets tables name overloads of operators that PyTorch has dropped.

  torchax 0.0.13 lists operators of named tensors, which PyTorch 2.13 no longer
  has, as keys of its tables (`findings/torchax_and_torch_2_13.sh`). Nothing
  calls them: a key of their name is all that is needed.
  """
  with extra('torch'):
    from torch import _ops

  packet, looks_up = _ops.OpOverloadPacket, '__getattr__'
  found = getattr(packet, looks_up)

  def get(self, name):
    try:
      return found(self, name)
    except AttributeError:
      if name.startswith('_'):
        raise
      return f'{self}.{name}'

  setattr(packet, looks_up, get)
  try:
    yield
  finally:
    setattr(packet, looks_up, found)
