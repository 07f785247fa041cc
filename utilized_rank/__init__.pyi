"""What the package offers, and where it is.

Type checkers read this file, and `__init__.py` imports by it what is used.
"""

from utilized_rank.attention.factorize_heads import (
  budget_head_ranks as budget_head_ranks,
)
from utilized_rank.attention.factorize_heads import (
  factorize_heads as factorize_heads,
)
from utilized_rank.attention.factorize_heads import head_damages as head_damages
from utilized_rank.attention.factorize_heads import (
  uniform_head_ranks as uniform_head_ranks,
)
from utilized_rank.attention.find_attention import (
  find_attention as find_attention,
)
from utilized_rank.attention.heads import Attention as Attention
from utilized_rank.collection.collect import collect as collect
from utilized_rank.collection.plan import Plan as Plan
from utilized_rank.compression.compress import compress as compress
from utilized_rank.compression.forecast import plan as plan
from utilized_rank.factorization.decompose import Families as Families
from utilized_rank.factorization.decompose import decompose as decompose
from utilized_rank.factorization.factorize import factorize as factorize
from utilized_rank.factorization.project import project as project
from utilized_rank.hidden.budget_widths import budget_widths as budget_widths
from utilized_rank.hidden.find_hidden import find_hidden as find_hidden
from utilized_rank.hidden.layers import Hidden as Hidden
from utilized_rank.hidden.layers import HiddenLayer as HiddenLayer
from utilized_rank.hidden.narrow_hidden import hidden_damages as hidden_damages
from utilized_rank.hidden.narrow_hidden import narrow_hidden as narrow_hidden
from utilized_rank.host.stopping import Preempted as Preempted
from utilized_rank.losses.divergence import kl_divergence as kl_divergence
from utilized_rank.losses.divergence import squared_error as squared_error
from utilized_rank.losses.sampled import (
  sampled_cross_entropy as sampled_cross_entropy,
)
from utilized_rank.losses.sampled import (
  sampled_squared_error as sampled_squared_error,
)
from utilized_rank.lowrank.leaf import LowRank as LowRank
from utilized_rank.lowrank.leaf import count_params as count_params
from utilized_rank.lowrank.leaf import merge as merge
from utilized_rank.lowrank.leaf import write_out as write_out
from utilized_rank.lowrank.low_rank import low_rank as low_rank
from utilized_rank.lowrank.narrow_heads import NarrowHeads as NarrowHeads
from utilized_rank.lowrank.shardings import shardings as shardings
from utilized_rank.lowrank.stack import stack as stack
from utilized_rank.lowrank.stack import unstack as unstack
from utilized_rank.lowrank.two_layers import two_layers as two_layers
from utilized_rank.moments.capture import capture as capture
from utilized_rank.moments.capture import find_sites as find_sites
from utilized_rank.moments.merging import merge_moments as merge_moments
from utilized_rank.moments.moments import Moment as Moment
from utilized_rank.moments.moments import Moments as Moments
from utilized_rank.moments.sites import Sites as Sites
from utilized_rank.ranks.budget import budget_ranks as budget_ranks
from utilized_rank.ranks.energy import energy_ranks as energy_ranks
from utilized_rank.ranks.latency import LatencyTable as LatencyTable
from utilized_rank.ranks.latency import measure_latency as measure_latency
from utilized_rank.ranks.predict import predict_loss as predict_loss
from utilized_rank.ranks.search import SearchedRanks as SearchedRanks
from utilized_rank.ranks.search import search_ranks as search_ranks
from utilized_rank.ranks.tune import TunedRanks as TunedRanks
from utilized_rank.ranks.tune import tune_ranks as tune_ranks
from utilized_rank.ranks.uniform import uniform_ranks as uniform_ranks
from utilized_rank.refit.anchor import anchor as anchor
from utilized_rank.refit.distill import distill as distill
from utilized_rank.refit.refine import refine as refine
from utilized_rank.report.comparison import Comparison as Comparison
from utilized_rank.report.comparison import compare as compare
from utilized_rank.report.measure import measure as measure
from utilized_rank.report.report import Report as Report
from utilized_rank.storage.checkpoint import load as load
from utilized_rank.storage.checkpoint import save as save
from utilized_rank.storage.recipe import Recipe as Recipe
from utilized_rank.storage.safetensors_file import (
  save_safetensors as save_safetensors,
)
from utilized_rank.streaming.compress_checkpoint import (
  compress_checkpoint as compress_checkpoint,
)
from utilized_rank.streaming.measure_checkpoint import (
  measure_checkpoint as measure_checkpoint,
)
from utilized_rank.streaming.plan_checkpoint import (
  CheckpointPlan as CheckpointPlan,
)
from utilized_rank.streaming.plan_checkpoint import (
  plan_checkpoint as plan_checkpoint,
)
from utilized_rank.training.finetune import finetune as finetune
from utilized_rank.training.optimizers import FactorOptimizer as FactorOptimizer
from utilized_rank.tree.layout import Layout as Layout
from utilized_rank.version import __version__ as __version__
from utilized_rank.walk.interpret import UnsupportedError as UnsupportedError

__all__: list[str]
