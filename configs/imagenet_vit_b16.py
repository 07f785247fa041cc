"""The paper's ViT-B/16 on ImageNet-1k, from a published checkpoint.

Command:  python -m launch.main --config=configs/imagenet_vit_b16.py \
            --config.data.data_dir=DIR --config.checkpoint.path=FILE \
            --workdir=runs/vit_b16

Purpose:  mean layer utilization of ViT-B/16, and half of its block kernels'
          parameters with fine-tuning.
Data:     DIR holds TFDS's imagenet2012, prepared; FILE is an AugReg `.npz`
          fine-tuned on ImageNet-1k at 224 pixels. For another family of
          checkpoints set `--config.data.preprocess` to its key in
          `utilized_rank/data/preprocess.py`.
Hardware: made for one GPU of 40 GiB or more; never run by us, who have
          neither the data nor the checkpoint. `--config.finetune.devices=8`
          spreads batches over as many.
Time:     fine-tuning 2.6 hours on an A100, if the data keep up. Not measured:
          50,000 steps of 256 images, each three passes of 18.4 GFLOP and one of
          the teacher's 35.2, at 40 % of 312 TFLOP/s.
Paper:    mean layer utilization 35 %, parameters reduced to 50 %, less than
          0.2 % accuracy lost after fine-tuning (arXiv 2407.04797, abstract).
          `--config.compress.method=utilized
          --config.compress.allocation=uniform` takes the paper's factors.

`:testing` makes everything tiny, on `.npz` images, for tests.
"""

import ml_collections

from configs import digits_vit


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the configuration.

  Args:
    arg: None or an empty string for the job, `'testing'` for a tiny one.

  Raises:
    ValueError: any other `arg`.
  """
  config = base(arg, 'imagenet_vit_b16')
  config.model.variant = 'B/16'
  config.compress.fractions = (0.5,)
  if arg == 'testing':
    shrink(config)
  return config


def base(arg: str | None, name: str) -> ml_collections.ConfigDict:
  """What the configs for ViTs on ImageNet share."""
  if arg not in (None, '', 'testing'):
    raise ValueError(
      f"configs/{name}.py:{arg} is unknown; the argument is 'testing'."
    )
  config = ml_collections.ConfigDict()
  config.seed = 0

  config.model = ml_collections.ConfigDict()
  config.model.name = 'vit'

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.path = ml_collections.config_dict.placeholder(str)
  # timm's and torchvision's names say what the shapes of a file do not.
  config.checkpoint.architecture = ml_collections.config_dict.placeholder(str)
  config.checkpoint.assume = False

  config.data = ml_collections.ConfigDict()
  config.data.name = 'imagenet2012'
  config.data.data_dir = ml_collections.config_dict.placeholder(str)
  config.data.preprocess = 'augreg'
  config.data.augment = 'inception'
  config.data.image_size = 224
  # The validation split is the test: nothing is chosen on it.
  config.data.splits = ml_collections.ConfigDict()
  config.data.splits.train = 'train[:98%]'
  config.data.splits.calibration = 'train[98%:99%]'
  config.data.splits.validation = 'train[99%:]'
  config.data.splits.test = 'validation'

  config.finetune = ml_collections.ConfigDict()
  # Ten epochs.
  config.finetune.steps = 50_000
  config.finetune.batch_size = 256
  config.finetune.learning_rate = 1e-4
  config.finetune.warmup_steps = 1_000
  config.finetune.weight_decay = 0.05
  config.finetune.label_smoothing = 0.1
  config.finetune.checkpoint_every = 2_500
  config.finetune.log_every = 250
  config.finetune.distill_weight = 0.9
  config.finetune.distill_temperature = 2.0
  config.finetune.compute_dtype = 'bfloat16'
  # The best of them on the validation split is kept.
  config.finetune.validate_every = 5_000
  digits_vit.complete(config.finetune)

  config.compress = ml_collections.ConfigDict()
  config.compress.energies = (0.9, 0.95, 0.99, 0.999)
  config.compress.select = (
    (digits_vit.BLOCK_KERNELS, True),
    (r'.*', False),
  )
  config.compress.method = 'loss'
  config.compress.allocation = 'budget'
  config.compress.batch_size = 128
  # Drawn at random from all classes; preprocessed as for evaluation.
  config.compress.calibration_images = 4096
  config.compress.calibration_augment = False
  # Bytes on one device that collecting may take; 0 for one pass of any size.
  config.compress.memory_limit = 0
  return config


def shrink(config: ml_collections.ConfigDict) -> None:
  """Sizes for tests, on the files `train.npz` and `test.npz`."""
  with config.unlocked():
    config.model.variant = None
    config.data.name = 'arrays'
    config.data.image_key = 'x'
    config.data.label_key = 'y'
    config.data.image_size = 16
    config.data.splits.train = 'train.npz[:24]'
    config.data.splits.calibration = 'train.npz[24:32]'
    config.data.splits.validation = 'train.npz[32:]'
    config.data.splits.test = 'test.npz'
    config.compress.calibration_images = 32
    config.compress.batch_size = 8
    config.compress.latency_batch_size = 2
    for name in ('train', 'finetune'):
      if name in config:
        config[name].steps = 2
        config[name].batch_size = 8
        config[name].warmup_steps = 1
        config[name].checkpoint_every = 0
        config[name].log_every = 1
    if 'finetune' in config:
      config.finetune.validate_every = 1
