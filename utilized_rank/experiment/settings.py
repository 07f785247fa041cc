"""A run's config as typed options, and which stage reads what of it first."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any, TypeVar

from utilized_rank.data import splits
from utilized_rank.experiment import network
from utilized_rank.experiment.shrink import CompressConfig
from utilized_rank.host import options
from utilized_rank.host.extras import extra
from utilized_rank.training.config import FinetuneConfig
from utilized_rank.training.config import TrainConfig

with extra('all'):
  import ml_collections

T = TypeVar('T')
# A run with a checkpoint has 'restore' in place of the first.
STAGES = (
  'train',
  'collect',
  'measure',
  'factorize',
  'finetune',
  'evaluate',
  'report',
)
_SECTIONS = ('model', 'data', 'train', 'checkpoint', 'finetune', 'compress')
# The first stage that reads a key of `config.compress`; of what is not here it
# is the collection.
_READERS = {
  'fractions': 'factorize',
  'energies': 'measure',
  'energy': 'measure',
  'centered': 'measure',
  'compensate_mean': 'factorize',
  'allocation': 'factorize',
  'heads': 'factorize',
  'latency_batch_size': 'evaluate',
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a run is asked for; sections that it does not have are None.

  Attributes:
    plain: the config as nested dictionaries, for the run's directory.
    seed: of parameters, batches and drawn labels.
    model: which network.
    data: which images.
    checkpoint: where trained weights are; without it the network is trained.
    train: how.
    finetune: how, after the network was made smaller.
    compress: what is made smaller, and how far.
  """

  plain: dict[str, Any]
  seed: int
  model: network.ModelConfig
  data: splits.DataConfig
  checkpoint: network.CheckpointConfig | None
  train: TrainConfig | None
  finetune: FinetuneConfig | None
  compress: CompressConfig

  @classmethod
  def of(cls, config: Any) -> Settings:
    """Checks an `ml_collections.ConfigDict`, or a mapping like it.

    Raises:
      ValueError: an unknown or missing key, or a wrong value.
    """
    if isinstance(config, cls):
      return config
    plain = ml_collections.ConfigDict(config).to_dict()
    _check_sections(plain)
    read = lambda kind, name: options.from_config(
      kind, plain[name], f'config.{name}'
    )
    compress = read(CompressConfig, 'compress')
    restores = 'checkpoint' in plain
    training = lambda kind, name: _training(kind, plain, name)
    return cls(
      plain,
      plain['seed'],
      network.ModelConfig.of(plain['model']),
      read(splits.DataConfig, 'data'),
      read(network.CheckpointConfig, 'checkpoint') if restores else None,
      None if restores else training(TrainConfig, 'train'),
      training(FinetuneConfig, 'finetune') if compress.fractions else None,
      compress,
    )

  @property
  def stages(self) -> tuple[str, ...]:
    """The names of this run's stages, in order."""
    return ('train' if self.checkpoint is None else 'restore', *STAGES[1:])

  def first_reader(self, key: str) -> str:
    """The first stage whose result a key such as 'train.steps' decides."""
    section, _, name = key.partition('.')
    if section == 'finetune':
      return 'finetune'
    if section == 'compress':
      return _READERS.get(name.partition('.')[0], 'collect')
    return self.stages[0]


def _training(kind: type[T], plain: Mapping[str, Any], name: str) -> T:
  section = {'seed': plain['seed'], **plain[name]}
  return options.from_config(kind, section, f'config.{name}')


def _check_sections(plain: Mapping[str, Any]) -> None:
  for key in plain:
    if key not in (*_SECTIONS, 'seed'):
      raise ValueError(
        f'config has the unknown key {key!r}; it takes seed, '
        f'{", ".join(_SECTIONS)}'
      )
  for key in ('seed', 'model', 'data', 'compress'):
    if key not in plain:
      raise ValueError(f'config lacks the key {key!r}')
  if ('train' in plain) == ('checkpoint' in plain):
    both = 'both' if 'train' in plain else 'neither'
    raise ValueError(
      f"config has {both} of 'train' and 'checkpoint'; it takes one"
    )
  if 'finetune' not in plain and plain['compress'].get('fractions', True):
    raise ValueError("config lacks the key 'finetune'")
