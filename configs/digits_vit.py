"""Compress a ViT on scikit-learn's bundled handwritten digits: the main job.

Command:  python -m launch.main --config=configs/digits_vit.py \
            --workdir=runs/digits

Hardware: two CPU cores; no network, no GPU.
Time:     2:40 minutes in all on two idle cores: 1,181 images, 200,000
          parameters, 3,000 steps and two fine-tunes of 1,000.
Expected: mean test accuracy of the seeds 0, 1, 2: dense 98.7 %, with 50 % of
          the block kernels' parameters 98.8 %, with 25 % 98.4 % (97.2 %
          before fine-tuning); one of the 360 test images is 0.28 points.

`--config=configs/digits_vit.py:testing` makes everything tiny, for tests.
"""

import dataclasses

import ml_collections

from utilized_rank.training.config import FinetuneConfig
from utilized_rank.training.config import TrainConfig

# Every kernel of the blocks: q, k, v, out and the two of the MLP.
BLOCK_KERNELS = r'params/Transformer/encoderblock(_\d+)?/.*kernel'


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the configuration.

  Args:
    arg: None or an empty string for the job, `'testing'` for a tiny one.

  Raises:
    ValueError: any other `arg`.
  """
  if arg not in (None, '', 'testing'):
    raise ValueError(
      f"configs/digits_vit.py:{arg} is unknown; the argument is 'testing'."
    )
  config = ml_collections.ConfigDict()
  config.seed = 0

  config.model = ml_collections.ConfigDict()
  config.model.patch_size = 2
  config.model.width = 64
  config.model.depth = 4
  config.model.heads = 4
  config.model.mlp_dim = 256
  config.model.pool = 'gap'
  config.model.dropout = 0.0
  config.model.attention_dropout = 0.0
  config.model.scan = False
  config.model.remat = False

  config.data = ml_collections.ConfigDict()
  config.data.name = 'sk_digits'
  config.data.data_dir = ml_collections.config_dict.placeholder(str)
  config.data.augment = 'affine'
  # Of the training split.
  config.data.mean = (0.305,)
  config.data.std = (0.376,)

  config.train = ml_collections.ConfigDict()
  config.train.steps = 3000
  # On two cores a step of 64 takes a third of the time of a step of 128.
  config.train.batch_size = 64
  config.train.learning_rate = 1e-3
  config.train.warmup_steps = 200
  config.train.weight_decay = 0.5
  config.train.label_smoothing = 0.1
  config.train.clip_norm = 1.0
  config.train.checkpoint_every = 1000
  config.train.log_every = 100

  config.finetune = ml_collections.ConfigDict()
  config.finetune.steps = 1000
  config.finetune.batch_size = 64
  config.finetune.learning_rate = 5e-4
  config.finetune.warmup_steps = 50
  config.finetune.weight_decay = 0.0
  config.finetune.label_smoothing = 0.1
  config.finetune.clip_norm = 1.0
  config.finetune.checkpoint_every = 500
  config.finetune.log_every = 100
  config.finetune.distill_weight = 0.9
  config.finetune.distill_temperature = 2.0
  complete(config.finetune)

  config.compress = ml_collections.ConfigDict()
  config.compress.fractions = (0.5, 0.25)
  config.compress.energies = (0.9, 0.95, 0.99, 0.999)
  config.compress.select = ((BLOCK_KERNELS, True), (r'.*', False))
  config.compress.method = 'loss'
  config.compress.allocation = 'budget'
  config.compress.batch_size = 64
  # 128 images are few for the moments of gradients: sixteen augmented passes.
  config.compress.calibration_images = 2048
  config.compress.memory_limit = 0

  if arg == 'testing':
    config.model.width = 16
    config.model.depth = 2
    config.model.heads = 2
    config.model.mlp_dim = 32
    config.compress.calibration_images = 128
    for section in (config.train, config.finetune):
      section.steps = 6
      section.batch_size = 16
      section.warmup_steps = 1
      section.checkpoint_every = 3
      section.log_every = 3
  return config


def complete(section: ml_collections.ConfigDict) -> None:
  """Gives `config.finetune` the keys that it lacks, for flags to override."""
  for field in dataclasses.fields(FinetuneConfig):
    # The seed is the run's own.
    if field.name not in (*section, 'seed'):
      section[field.name] = field.default


def training(section: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A `config.train` of what a `config.finetune` has that both have."""
  names = {field.name for field in dataclasses.fields(TrainConfig)}
  made = ml_collections.ConfigDict()
  for key in section:
    if key in names:
      made[key] = section[key]
  return made
