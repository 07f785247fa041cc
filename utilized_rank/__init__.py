"""How much of a network is really used, and how small it can get.

>>> import utilized_rank as ur
>>> moments = ur.collect(fn, params, batches)           # doctest: +SKIP
>>> print(ur.measure(params, moments))                  # doctest: +SKIP
>>> ranks = ur.uniform_ranks(params, moments, params_fraction=0.5)
... # doctest: +SKIP
>>> small = ur.factorize(params, moments, ranks)        # doctest: +SKIP
>>> outputs = ur.low_rank(fn)(small, batch)             # doctest: +SKIP
"""

from utilized_rank.anchor import anchor
from utilized_rank.attention import find_attention
from utilized_rank.capture import capture
from utilized_rank.capture import find_sites
from utilized_rank.checkpoint import load
from utilized_rank.checkpoint import save
from utilized_rank.collect import collect
from utilized_rank.comparison import Comparison
from utilized_rank.comparison import compare
from utilized_rank.compress import compress
from utilized_rank.divergence import kl_divergence
from utilized_rank.divergence import squared_error
from utilized_rank.energy import energy_ranks
from utilized_rank.factorize import factorize
from utilized_rank.factorize_heads import budget_head_ranks
from utilized_rank.factorize_heads import factorize_heads
from utilized_rank.factorize_heads import head_damages
from utilized_rank.factorize_heads import uniform_head_ranks
from utilized_rank.families import Families
from utilized_rank.families import decompose
from utilized_rank.heads import Attention
from utilized_rank.interpret import UnsupportedError
from utilized_rank.latency import LatencyTable
from utilized_rank.latency import measure_latency
from utilized_rank.layers import stack
from utilized_rank.layers import unstack
from utilized_rank.layout import Layout
from utilized_rank.lowrank import LowRank
from utilized_rank.lowrank import count_params
from utilized_rank.lowrank import merge
from utilized_rank.lowrank import write_out
from utilized_rank.measure import measure
from utilized_rank.moments import Moment
from utilized_rank.moments import Moments
from utilized_rank.moments import merge_moments
from utilized_rank.narrow import NarrowHeads
from utilized_rank.plan import Plan
from utilized_rank.plan import plan
from utilized_rank.predict import predict_loss
from utilized_rank.project import project
from utilized_rank.ranks import budget_ranks
from utilized_rank.recipe import Recipe
from utilized_rank.refine import refine
from utilized_rank.report import Report
from utilized_rank.sampled import sampled_cross_entropy
from utilized_rank.search import SearchedRanks
from utilized_rank.search import search_ranks
from utilized_rank.sites import Sites
from utilized_rank.snapshots import Preempted
from utilized_rank.substitution import low_rank
from utilized_rank.tune import TunedRanks
from utilized_rank.tune import tune_ranks
from utilized_rank.uniform import uniform_ranks

__version__ = '0.2.0'
