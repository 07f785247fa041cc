"""One ViT, supervised and as a masked autoencoder, on the same images.

Command:  python -m benchmarks.self_supervised --data_root=DIR \
            --config=configs/self_supervised.py:cpu

Purpose:  the paper's claim that self-supervised pre-training utilizes more
          of a network (up to 70 % of ViTs), on data and hardware at hand.
Hardware: `cpu`, two cores, Fashion-MNIST, three seeds; `gpu`, one GPU,
          CIFAR-10. Both read `.npz` files from `config.data.data_dir`.

`:testing` makes everything tiny, for tests.
"""

import ml_collections

ARGUMENTS = ('cpu', 'gpu', 'testing')


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the configuration.

  Args:
    arg: one of `ARGUMENTS`; None or an empty string is `'cpu'`.

  Raises:
    ValueError: any other `arg`.
  """
  arg = arg or 'cpu'
  if arg not in ARGUMENTS:
    raise ValueError(
      f'configs/self_supervised.py:{arg} is unknown; the argument is one of '
      f'{", ".join(ARGUMENTS)}.'
    )
  config = ml_collections.ConfigDict()
  config.seeds = (0, 1, 2)
  config.energies = (0.9, 0.95, 0.99)
  # Of the paper on masked autoencoders.
  config.masked_share = 0.75

  config.model = ml_collections.ConfigDict()
  config.model.patch_size = 7
  config.model.width = 64
  config.model.depth = 6
  config.model.heads = 4
  config.model.mlp_dim = 256
  config.model.pool = 'gap'

  config.decoder = ml_collections.ConfigDict()
  config.decoder.width = 48
  config.decoder.depth = 1
  config.decoder.heads = 3

  config.data = ml_collections.ConfigDict()
  config.data.name = 'arrays'
  config.data.data_dir = ml_collections.config_dict.placeholder(str)
  config.data.image_key = 'x'
  config.data.label_key = 'y'
  config.data.augment = 'crop_flip'
  config.data.mean = (0.286,)
  config.data.std = (0.353,)
  config.data.splits = ml_collections.ConfigDict()
  config.data.splits.train = 'fmnist_train60000.npz[:57000]'
  # Held out: utilization is measured on these, of every model.
  config.data.splits.calibration = 'fmnist_train60000.npz[57000:59000]'
  config.data.splits.validation = 'fmnist_train60000.npz[59000:]'
  config.data.splits.test = 'fmnist_test5000.npz'

  config.supervised = ml_collections.ConfigDict()
  config.supervised.steps = 900
  config.supervised.batch_size = 64
  config.supervised.learning_rate = 1e-3
  config.supervised.warmup_steps = 100
  config.supervised.weight_decay = 0.05
  config.supervised.checkpoint_every = 300
  config.supervised.log_every = 100
  # An encoder that sees a quarter of the patches takes a third of the time.
  config.masked = config.supervised.copy_and_resolve_references()
  config.masked.steps = 2700

  if arg == 'gpu':
    config.model.patch_size = 4
    config.model.width = 192
    config.model.depth = 12
    config.model.heads = 3
    config.model.mlp_dim = 768
    config.decoder.width = 96
    config.decoder.depth = 2
    config.data.image_key = 'bytes'
    config.data.mean = (0.491, 0.482, 0.447)
    config.data.std = (0.247, 0.243, 0.262)
    config.data.splits.train = 'cifar10_train_jpeg.npz[:46000]'
    config.data.splits.calibration = 'cifar10_train_jpeg.npz[46000:48000]'
    config.data.splits.validation = 'cifar10_train_jpeg.npz[48000:]'
    config.data.splits.test = 'cifar10_test_jpeg.npz'
    for section, steps in (
      (config.supervised, 18_000),
      (config.masked, 72_000),
    ):
      section.steps = steps
      section.batch_size = 256
      section.warmup_steps = 1_000
      section.checkpoint_every = 3_000
  if arg == 'testing':
    config.seeds = (0, 1)
    config.model.patch_size = 4
    config.model.width = 16
    config.model.depth = 2
    config.model.heads = 2
    config.model.mlp_dim = 32
    config.decoder.width = 12
    config.data.mean = (0.5,)
    config.data.std = (0.5,)
    config.data.splits.train = 'train.npz[:32]'
    config.data.splits.calibration = 'train.npz[32:48]'
    config.data.splits.validation = 'train.npz[48:]'
    config.data.splits.test = 'test.npz'
    for section in (config.supervised, config.masked):
      section.steps = 2
      section.batch_size = 8
      section.warmup_steps = 1
      section.checkpoint_every = 0
  return config
