"""Modules of PyTorch, as functions to measure and compress, and back.

Needs the extra `torch`. In a script, `from utilized_rank.torch.module import
from_module, to_module`.

* `module.py`: a module as a function of its parameters, and a tree of factors
  as a module.
* `pairs.py`: the layers that hold two factors in place of one kernel.
* `pretrained.py`: a compressed checkpoint's directory as a model of
  transformers.
* `torchax_import.py`: torchax, which runs a module's operations as JAX's.
* `early.py`: its environment, but what needs no trace is computed at once.
"""
