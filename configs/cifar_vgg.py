"""VGG-16 for CIFAR: trained from nothing, or from a checkpoint.

Command:  python -m launch.main --config=configs/cifar_vgg.py \
            --config.data.data_dir=DIR --workdir=runs/cifar_vgg
Or:       ... --config=configs/cifar_vgg.py:checkpoint \
            --config.checkpoint.path=FILE

Purpose:  utilization of a network with wide layers on small images, which is
          known to be far too large for them; a quarter and a tenth of its
          convolutions' parameters with fine-tuning.
Data:     DIR holds TFDS's cifar10, prepared; FILE is a VGG in the layout of
          torchvision. One dense layer, the head, follows the convolutions,
          all with batch norms, as is usual for CIFAR.
Hardware: one GPU; never run at this size by us.
Paper:    it reports "other architectures" on CIFAR (arXiv 2407.04797); whether
          VGG is one, and with what numbers, we could not establish.

`:testing` makes everything tiny, on `.npz` images, for tests.
"""

import ml_collections

from configs import cifar_resnet
from configs import imagenet_vit_b16

CONVOLUTIONS = r'params/conv([1-9]|\d\d)/kernel'


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the configuration.

  Args:
    arg: one of `cifar_resnet.ARGUMENTS`; None or an empty string is `'train'`.

  Raises:
    ValueError: any other `arg`.
  """
  config = cifar_resnet.base(arg, 'cifar_vgg')
  config.model.name = 'vgg'
  config.model.variant = '16'
  if arg != 'checkpoint':
    config.model.hidden = ()
    config.model.pool_size = 1
    config.model.batch_norm = True
  config.compress.fractions = (0.25, 0.1)
  config.compress.select = ((CONVOLUTIONS, True), (r'.*', False))
  if arg == 'testing':
    imagenet_vit_b16.shrink(config)
    config.model.stages = ((4,), (8, 8))
    config.compress.fractions = (0.5,)
  return config
