"""How much of a network is really used, and how small it can get.

>>> import utilized_rank as ur
>>> moments = ur.collect(fn, params, batches)           # doctest: +SKIP
>>> print(ur.measure(params, moments))                  # doctest: +SKIP
>>> ranks = ur.uniform_ranks(params, moments, params_fraction=0.5)
... # doctest: +SKIP
>>> small = ur.factorize(params, moments, ranks)        # doctest: +SKIP
>>> outputs = ur.low_rank(fn)(small, batch)             # doctest: +SKIP
"""

import importlib
import pathlib
import re
from typing import Any

from utilized_rank.lowrank import serialize
from utilized_rank.version import __version__

__all__ = [
  'Attention',
  'CheckpointPlan',
  'Comparison',
  'FactorOptimizer',
  'Families',
  'Hidden',
  'HiddenLayer',
  'LatencyTable',
  'Layout',
  'LowRank',
  'Moment',
  'Moments',
  'NarrowHeads',
  'Plan',
  'Preempted',
  'Recipe',
  'Report',
  'SearchedRanks',
  'Sites',
  'TunedRanks',
  'UnsupportedError',
  'anchor',
  'budget_head_ranks',
  'budget_ranks',
  'budget_widths',
  'capture',
  'collect',
  'compare',
  'compress',
  'compress_checkpoint',
  'count_params',
  'decompose',
  'distill',
  'energy_ranks',
  'factorize',
  'factorize_heads',
  'find_attention',
  'find_hidden',
  'find_sites',
  'finetune',
  'head_damages',
  'hidden_damages',
  'kl_divergence',
  'load',
  'low_rank',
  'measure',
  'measure_checkpoint',
  'measure_latency',
  'merge',
  'merge_moments',
  'narrow_hidden',
  'plan',
  'plan_checkpoint',
  'predict_loss',
  'project',
  'refine',
  'sampled_cross_entropy',
  'sampled_squared_error',
  'save',
  'save_safetensors',
  'search_ranks',
  'shardings',
  'squared_error',
  'stack',
  'tune_ranks',
  'two_layers',
  'uniform_head_ranks',
  'uniform_ranks',
  'unstack',
  'write_out',
]
# `__init__.pyi` says where they are, to type checkers and here: what is not
# used is not imported.
_WHERE = {
  name: module
  for module, name in re.findall(
    r'^from (utilized_rank\.\S+) import (?:\(\s*)?(\w+) as',
    pathlib.Path(__file__).with_suffix('.pyi').read_text('utf-8'),
    re.MULTILINE,
  )
}

serialize.register()


def __getattr__(name: str) -> Any:
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  value = globals()[name] = getattr(importlib.import_module(_WHERE[name]), name)
  return value


def __dir__() -> list[str]:
  """What the package offers; rooms are importable by name."""
  return [*__all__, '__version__']
