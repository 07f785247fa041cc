"""Compress a ViT on any prepared TFDS set of images: cifar10 by default.

Command:  python -m launch.main --config=configs/tfds_vit.py:cifar10 \
            --config.data.data_dir=DIR --workdir=runs/cifar10

The argument is a TFDS name whose splits are `train` and `test`; for another
set, such as imagenet2012 with `validation`, override the slices:

  --config.data.splits.test=validation --config.data.image_size=224 \
  --config.data.augment=inception --config.data.crop_fraction=0.875

The set must have been prepared before (`data.load` says how); this machine
needs no TensorFlow. Made for one GPU; the numbers of a run depend on the set.
"""

import ml_collections

from configs import digits_vit


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the configuration for the TFDS set `arg`, `'cifar10'` if None."""
  config = digits_vit.get_config()
  config.model.patch_size = 4
  config.model.width = 192
  config.model.depth = 12
  config.model.heads = 3
  config.model.mlp_dim = 768
  config.model.dropout = 0.1

  config.data.name = arg or 'cifar10'
  config.data.augment = 'crop_flip'
  config.data.mean = (0.5,)
  config.data.std = (0.5,)
  config.data.image_size = 32
  config.data.crop_fraction = 1.0
  # Calibration and validation are cut from the training images.
  config.data.splits = ml_collections.ConfigDict()
  config.data.splits.train = 'train[:90%]'
  config.data.splits.calibration = 'train[90%:94%]'
  config.data.splits.validation = 'train[94%:]'
  config.data.splits.test = 'test'

  config.train.steps = 35_000
  config.train.batch_size = 256
  config.train.learning_rate = 1e-3
  config.train.warmup_steps = 2_000
  config.train.checkpoint_every = 5_000
  config.finetune.steps = 5_000
  config.finetune.batch_size = 256
  config.finetune.learning_rate = 3e-4
  config.finetune.warmup_steps = 250
  config.finetune.checkpoint_every = 1_000
  return config
