"""A CIFAR ResNet: trained from nothing, or from a published checkpoint.

Command:  python -m launch.main --config=configs/cifar_resnet.py \
            --config.data.data_dir=DIR --workdir=runs/cifar_resnet
Or:       ... --config=configs/cifar_resnet.py:checkpoint \
            --config.checkpoint.path=FILE

Purpose:  utilization of a small convolutional network, and three quarters and
          half of its convolutions' parameters with fine-tuning.
Data:     DIR holds TFDS's cifar10, prepared; FILE is a ResNet-20 in the
          layout of torchvision-like code bases. `--config.model.variant=56`
          takes the deeper one, `--config.data.name=cifar100` the other set.
Hardware: one GPU; 78,000 steps of 128 images are 200 epochs. Never run at
          this size by us.
Paper:    it reports ResNets on CIFAR (arXiv 2407.04797); which, and with what
          numbers, we could not establish. He et al. (arXiv 1512.03385) train
          ResNet-20 to 91.25 % with SGD; this trains with AdamW.

`:testing` makes everything tiny, on `.npz` images, for tests.
"""

import ml_collections

from configs import digits_vit
from configs import imagenet_resnet50
from configs import imagenet_vit_b16

ARGUMENTS = ('train', 'checkpoint', 'testing')


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the configuration.

  Args:
    arg: one of `ARGUMENTS`; None or an empty string is `'train'`.

  Raises:
    ValueError: any other `arg`.
  """
  config = base(arg, 'cifar_resnet')
  config.model.name = 'resnet'
  config.model.variant = '20'
  if 'checkpoint' in config:
    config.checkpoint.architecture = 'resnet20'
  config.compress.select = (
    (imagenet_resnet50.CONVOLUTIONS, True),
    (r'.*', False),
  )
  if arg == 'testing':
    imagenet_vit_b16.shrink(config)
    config.model.stages = (1, 1)
    config.model.width = 4
    config.model.small_images = True
    config.compress.fractions = (0.5,)
  return config


def base(arg: str | None, name: str) -> ml_collections.ConfigDict:
  """What the configs for CIFAR share."""
  arg = arg or 'train'
  if arg not in ARGUMENTS:
    raise ValueError(
      f'configs/{name}.py:{arg} is unknown; the argument is one of '
      f'{", ".join(ARGUMENTS)}.'
    )
  config = imagenet_vit_b16.base(None, name)
  if arg != 'checkpoint':
    del config.checkpoint
    config.train = digits_vit.training(config.finetune)
    config.train.steps = 78_000
    config.train.batch_size = 128
    config.train.learning_rate = 3e-3
    config.train.label_smoothing = 0.0
  config.data.name = 'cifar10'
  config.data.preprocess = ml_collections.config_dict.placeholder(str)
  # Of the training images; the means and deviations published models take.
  config.data.mean = (0.485, 0.456, 0.406)
  config.data.std = (0.229, 0.224, 0.225)
  config.data.augment = 'crop_flip'
  config.data.image_size = 32
  config.data.splits.train = 'train[:94%]'
  config.data.splits.calibration = 'train[94%:97%]'
  config.data.splits.validation = 'train[97%:]'
  config.data.splits.test = 'test'
  config.finetune.compute_dtype = ''
  # Forty epochs.
  config.finetune.steps = 16_000
  config.finetune.batch_size = 128
  config.finetune.learning_rate = 5e-4
  config.finetune.label_smoothing = 0.0
  config.compress.fractions = (0.75, 0.5)
  return config
