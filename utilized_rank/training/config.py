"""Options of training and of fine-tuning, as sections of a config."""

from __future__ import annotations

import dataclasses
from typing import Any

from utilized_rank.training import loop
from utilized_rank.training import optimizers
from utilized_rank.training.optimizers import FactorOptimizer

# Names of kernels in Flax, and of their factors.
KERNELS = r'(.*/)?kernel(/(a|b(_\w+)?))?'


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How to train; the section `config.train`.

  Attributes:
    steps: number of updates.
    batch_size: images per update.
    learning_rate: peak of the schedule, which rises linearly over
      `warmup_steps` and falls to 0 along a cosine.
    warmup_steps: see above.
    weight_decay: decoupled, multiplied by the learning rate.
    decay_rule: regular expression that the whole path of a leaf must match to
      be decayed; the default takes kernels and the factors of kernels.
    label_smoothing: probability spread over all classes.
    clip_norm: largest global norm of the gradient; infinity for none.
    seed: decides dropout, and the order of the data where the caller uses it
      for that.
    accumulate: parts of every batch that are run one after the other.
    ema: decay of an average of the parameters, which then is the result; 0 for
      none.
    checkpoint_every: steps between two checkpoints; 0 for the last one only.
    log_every: steps between two lines of metrics; a NaN is noticed then.
    tensorboard: write events for TensorBoard too; needs tensorboardX.
  """

  steps: int
  batch_size: int
  learning_rate: float = 1e-3
  warmup_steps: int = 0
  weight_decay: float = 0.0
  decay_rule: str = KERNELS
  label_smoothing: float = 0.0
  clip_norm: float = 1.0
  seed: int = 0
  accumulate: int = 1
  ema: float = 0.0
  checkpoint_every: int = 0
  log_every: int = 50
  tensorboard: bool = False

  def __post_init__(self):
    _ = self.loop  # it has checks of its own
    self.require('batch_size', self.batch_size >= 1, 'at least 1')
    self.require('learning_rate', self.learning_rate > 0, 'positive')
    self.require(
      'warmup_steps',
      0 <= self.warmup_steps < self.steps,
      f'in [0, steps={self.steps})',
    )
    self.require('weight_decay', self.weight_decay >= 0, 'not negative')
    self.require('label_smoothing', 0 <= self.label_smoothing < 1, 'in [0, 1)')
    self.require('clip_norm', self.clip_norm > 0, 'positive')

  def require(self, name: str, holds: bool, what: str) -> None:
    """Raises ValueError for a field that is wrong."""
    if not holds:
      raise ValueError(f'{name}={getattr(self, name)!r}; it must be {what}.')

  @property
  def loop(self) -> loop.Options:
    names = {field.name for field in dataclasses.fields(loop.Options)}
    return loop.Options(**{k: v for k, v in vars(self).items() if k in names})

  @property
  def optimizer(self) -> FactorOptimizer:
    return FactorOptimizer(
      learning_rate=self.learning_rate,
      warmup=self.warmup_steps,
      weight_decay=self.weight_decay,
      decay_rule=self.decay_rule,
      clip_norm=self.clip_norm,
    )

  @property
  def identity(self) -> dict[str, Any]:
    """What decides the result; the rest may change when a run goes on."""
    identity = dataclasses.asdict(self)
    for name in ('checkpoint_every', 'log_every', 'tensorboard'):
      del identity[name]
    # JSON has no infinity.
    return {key: repr(value) for key, value in identity.items()}


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
  """How to fine-tune what was made smaller; the section `config.finetune`.

  Attributes:
    distill_weight: part a of the loss (1 - a) cross-entropy + a distillation.
    distill_temperature: see `losses.distillation`.
    kind: 'adamw' or 'muon', see `FactorOptimizer`; so are the next two.
    decay_products: decay the products of factors in place of each.
    pair_rates: learning rates in proportion to the factors.
    balance: train pairs of equal Gram matrices, see `finetune`.
    norms: what becomes of batch norms' running statistics: 'frozen', 'trained'
      or 'reestimated', see `finetune`.
    compute_dtype: of the network while factors stay float32, such as
      'bfloat16'; empty for their own.
    trainable: ordered `(regex, bool)` rules, see `finetune`.
    validate_every: steps between two validations, of which the best parameters
      are kept; 0 for none.
    patience: validations without a new best after which it stops; 0 for never.
    devices: how many batches are spread over.
  """

  distill_weight: float = 0.0
  distill_temperature: float = 1.0
  kind: str = optimizers.ADAMW
  decay_products: bool = False
  pair_rates: bool = False
  balance: bool = False
  norms: str = 'frozen'
  compute_dtype: str = ''
  trainable: tuple[tuple[str, bool], ...] = ()
  validate_every: int = 0
  patience: int = 0
  devices: int = 1

  def __post_init__(self):
    super().__post_init__()
    self.require('devices', self.devices >= 1, 'at least 1')
    self.require('distill_weight', 0 <= self.distill_weight <= 1, 'in [0, 1]')
    self.require(
      'distill_temperature', self.distill_temperature > 0, 'positive'
    )
    self.require(
      'kind', self.kind in optimizers.KINDS, f'in {optimizers.KINDS}'
    )

  @property
  def optimizer(self) -> FactorOptimizer:
    return dataclasses.replace(
      super().optimizer,
      kind=self.kind,
      decay_products=self.decay_products,
      pair_rates=self.pair_rates,
    )
