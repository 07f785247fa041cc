"""Utilization of self-supervised ViTs on ImageNet-1k: measured, not shrunk.

Command:  python -m launch.main --config=configs/ssl_vit.py:mae \
            --config.data.data_dir=DIR --config.checkpoint.path=FILE \
            --workdir=runs/ssl_mae
          for each of mae, dino, dinov2 and clip; then compare, beside the
          supervised run of `imagenet_vit_b16.py`:

  names = ('vit_b16', 'ssl_mae', 'ssl_dino', 'ssl_dinov2', 'ssl_clip')
  reports = [ur.Report.load(f'runs/{n}/utilization.json') for n in names]
  print(ur.compare(reports, names))

Purpose:  the paper's claim that self-supervised pre-training utilizes more.
Data:     DIR holds TFDS's imagenet2012, prepared; FILE is a pre-trained
          encoder in the layout of its repository (or timm, or Hugging Face).
          Its own mean, deviation, crop and interpolation are the argument's.
Hardware: one GPU, or a patient CPU: 4,096 images go through the model once.
          Never run by us, who have neither the data nor the checkpoints.
Paper:    self-supervised pre-training drives utilization up to 70 %
          (arXiv 2407.04797, abstract); of which models, we could not
          establish.

`:testing` makes everything tiny, on `.npz` images, for tests.
"""

import ml_collections

from configs import imagenet_vit_b16

ARGUMENTS = ('mae', 'dino', 'dinov2', 'clip', 'testing')


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the configuration.

  Args:
    arg: one of `ARGUMENTS`; None or an empty string is `'mae'`.

  Raises:
    ValueError: any other `arg`.
  """
  arg = arg or 'mae'
  if arg not in ARGUMENTS:
    raise ValueError(
      f'configs/ssl_vit.py:{arg} is unknown; the argument is one of '
      f'{", ".join(ARGUMENTS)}.'
    )
  config = imagenet_vit_b16.base(None, 'ssl_vit')
  config.data.preprocess = 'dino' if arg == 'testing' else arg
  # Their files say no more than shapes; the encoders are the usual ones.
  config.checkpoint.assume = True
  del config.finetune
  config.compress.fractions = ()
  # No labels and no classes: moments of activations alone.
  config.compress.method = 'output'
  if arg == 'testing':
    imagenet_vit_b16.shrink(config)
  return config
