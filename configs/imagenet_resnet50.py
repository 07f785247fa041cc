"""ResNet-50 on ImageNet-1k, from a published checkpoint.

Command:  python -m launch.main --config=configs/imagenet_resnet50.py \
            --config.data.data_dir=DIR --config.checkpoint.path=FILE \
            --workdir=runs/resnet50

Purpose:  utilization of a convolutional network, and three quarters and half
          of its convolutions' parameters with fine-tuning.
Data:     DIR holds TFDS's imagenet2012, prepared; FILE is torchvision's
          ResNet-50 (its first weights: 256 to 224 pixels, bilinear). For its
          V2 weights or timm's set `--config.data.preprocess` to
          `torchvision_v2` or `timm_resnet`.
Hardware: made for one GPU of 24 GiB or more; never run by us, who have
          neither the data nor the checkpoint.
Paper:    it reports ResNets on ImageNet (arXiv 2407.04797); which, and with
          what numbers, we could not establish.

Kernels are the convolutions of all blocks, 1x1 shortcuts too; not the first
one and not the head. Batch norms stay; `--config.checkpoint.fold_batch_norm`
folds them into the convolutions before anything is measured.

`:testing` makes everything tiny, on `.npz` images, for tests.
"""

import ml_collections

from configs import imagenet_vit_b16

CONVOLUTIONS = r'params/layer.*/conv\w*/kernel'


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the configuration.

  Args:
    arg: None or an empty string for the job, `'testing'` for a tiny one.

  Raises:
    ValueError: any other `arg`.
  """
  config = imagenet_vit_b16.base(arg, 'imagenet_resnet50')
  config.model.name = 'resnet'
  config.model.variant = '50'
  config.checkpoint.architecture = 'resnet50'
  config.checkpoint.fold_batch_norm = False
  config.data.preprocess = 'torchvision'
  config.finetune.learning_rate = 3e-4
  config.compress.fractions = (0.75, 0.5)
  config.compress.select = ((CONVOLUTIONS, True), (r'.*', False))
  if arg == 'testing':
    imagenet_vit_b16.shrink(config)
    config.compress.fractions = (0.5,)
  return config
