"""How much of a network is really used, and how small it can get.

>>> import utilized_rank as ur
>>> moments = ur.collect(fn, params, batches)           # doctest: +SKIP
>>> print(ur.measure(params, moments))                  # doctest: +SKIP
>>> ranks = ur.uniform_ranks(params, moments, params_fraction=0.5)
... # doctest: +SKIP
>>> small = ur.factorize(params, moments, ranks)        # doctest: +SKIP
>>> outputs = ur.low_rank(fn)(small, batch)             # doctest: +SKIP
"""

from utilized_rank.attention.factorize_heads import budget_head_ranks
from utilized_rank.attention.factorize_heads import factorize_heads
from utilized_rank.attention.factorize_heads import head_damages
from utilized_rank.attention.factorize_heads import uniform_head_ranks
from utilized_rank.attention.find_attention import find_attention
from utilized_rank.attention.heads import Attention
from utilized_rank.collection.collect import collect
from utilized_rank.collection.plan import Plan
from utilized_rank.collection.plan import plan
from utilized_rank.collection.snapshots import Preempted
from utilized_rank.compression.compress import compress
from utilized_rank.factorization.decompose import Families
from utilized_rank.factorization.decompose import decompose
from utilized_rank.factorization.factorize import factorize
from utilized_rank.factorization.project import project
from utilized_rank.losses.divergence import kl_divergence
from utilized_rank.losses.divergence import squared_error
from utilized_rank.losses.sampled import sampled_cross_entropy
from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.lowrank.leaf import count_params
from utilized_rank.lowrank.leaf import merge
from utilized_rank.lowrank.leaf import write_out
from utilized_rank.lowrank.low_rank import low_rank
from utilized_rank.lowrank.narrow_heads import NarrowHeads
import utilized_rank.lowrank.serialize
from utilized_rank.lowrank.stack import stack
from utilized_rank.lowrank.stack import unstack
from utilized_rank.moments.capture import capture
from utilized_rank.moments.capture import find_sites
from utilized_rank.moments.moments import Moment
from utilized_rank.moments.moments import Moments
from utilized_rank.moments.moments import merge_moments
from utilized_rank.moments.sites import Sites
from utilized_rank.ranks.budget import budget_ranks
from utilized_rank.ranks.energy import energy_ranks
from utilized_rank.ranks.latency import LatencyTable
from utilized_rank.ranks.latency import measure_latency
from utilized_rank.ranks.predict import predict_loss
from utilized_rank.ranks.search import SearchedRanks
from utilized_rank.ranks.search import search_ranks
from utilized_rank.ranks.tune import TunedRanks
from utilized_rank.ranks.tune import tune_ranks
from utilized_rank.ranks.uniform import uniform_ranks
from utilized_rank.refit.anchor import anchor
from utilized_rank.refit.refine import refine
from utilized_rank.report.comparison import Comparison
from utilized_rank.report.comparison import compare
from utilized_rank.report.measure import measure
from utilized_rank.report.report import Report
from utilized_rank.storage.checkpoint import load
from utilized_rank.storage.checkpoint import save
from utilized_rank.storage.recipe import Recipe
from utilized_rank.tree.layout import Layout
from utilized_rank.version import __version__
from utilized_rank.walk.interpret import UnsupportedError

__all__ = [
  'Attention',
  'Comparison',
  'Families',
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
  'capture',
  'collect',
  'compare',
  'compress',
  'count_params',
  'decompose',
  'energy_ranks',
  'factorize',
  'factorize_heads',
  'find_attention',
  'find_sites',
  'head_damages',
  'kl_divergence',
  'load',
  'low_rank',
  'measure',
  'measure_latency',
  'merge',
  'merge_moments',
  'plan',
  'predict_loss',
  'project',
  'refine',
  'sampled_cross_entropy',
  'save',
  'search_ranks',
  'squared_error',
  'stack',
  'tune_ranks',
  'uniform_head_ranks',
  'uniform_ranks',
  'unstack',
  'write_out',
]

utilized_rank.lowrank.serialize.register()


def __dir__() -> list[str]:
  """What the package offers; rooms are importable by name."""
  return [*__all__, '__version__']
