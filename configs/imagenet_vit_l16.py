"""The paper's ViT-L/16 on ImageNet-1k, from a published checkpoint.

Command:  python -m launch.main --config=configs/imagenet_vit_l16.py \
            --config.data.data_dir=DIR --config.checkpoint.path=FILE \
            --workdir=runs/vit_l16

Purpose:  mean layer utilization of ViT-L/16, and a quarter of its block
          kernels' parameters with fine-tuning.
Data:     as for `imagenet_vit_b16.py`.
Hardware: made for one GPU of 80 GiB; never run by us, who have neither the
          data nor the checkpoint. `--config.finetune.devices=8` spreads batches
          over as many.
Time:     fine-tuning 7.4 hours on an A100, if the data keep up. Not measured:
          50,000 steps of 256 images, each four passes of 34 GFLOP (one computes
          blocks again) and one of the teacher's 123, at 40 % of 312 TFLOP/s.
Paper:    mean layer utilization 20 %, parameters reduced to 25 %, less than
          0.2 % accuracy lost after fine-tuning (arXiv 2407.04797, abstract).

`:testing` makes everything tiny, on `.npz` images, for tests.
"""

import ml_collections

from configs import imagenet_vit_b16


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the configuration.

  Args:
    arg: None or an empty string for the job, `'testing'` for a tiny one.

  Raises:
    ValueError: any other `arg`.
  """
  config = imagenet_vit_b16.base(arg, 'imagenet_vit_l16')
  config.model.variant = 'L/16'
  config.model.remat = True
  config.compress.fractions = (0.25,)
  config.compress.batch_size = 64
  if arg == 'testing':
    imagenet_vit_b16.shrink(config)
    config.model.remat = False
  return config
