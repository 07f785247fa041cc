"""What networks are fine-tuned on: training, validation and test examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.networks import LOADERS
from benchmarks.networks import common
from benchmarks.networks import resnet_cifar10
import utilized_rank as ur
from utilized_rank.data import augment
from utilized_rank.models.vit import ViT
from utilized_rank.training import train

Batch = common.Batch
VALIDATION = 2000
TEST = 5000


@dataclasses.dataclass(frozen=True)
class Task:
  """A dense network and its data, with labels `y` (-1 for none).

  Attributes:
    name: of the network.
    fn: `fn(params, batch) -> logits`.
    params: dense parameters.
    select: rules for the kernels to shrink.
    train: examples to tune and to calibrate on.
    validation: examples to choose on.
    test: examples for the last line.
    batch_size: of all.
    steps: updates of a fine-tuning.
    labels: whether training examples have labels worth learning.
    augmented: random crops and mirror images of the training examples.
  """

  name: str
  fn: Callable[[Any, Any], jax.Array]
  params: Any
  select: list[tuple[str, bool]]
  train: Batch
  validation: Batch
  test: Batch
  batch_size: int
  steps: int
  labels: bool = True
  augmented: bool = False

  def batches(self, seed: int) -> Callable[[int], Iterator[Batch]]:
    """Training batches from a step on, drawn by seed and step alone."""

    def stream(start: int) -> Iterator[Batch]:
      step = start
      while True:
        rng = np.random.default_rng((seed, step))
        rows = rng.integers(0, len(self.train['x']), self.batch_size)
        batch = {k: v[rows] for k, v in self.train.items()}
        if self.augmented:
          x = batch['x']
          batch['x'] = augment.crop_flip(x, x.shape[1], rng)
        yield batch
        step += 1

    return stream

  def whole(self, examples: Batch) -> list[Batch]:
    """All examples in their order."""
    size = self.batch_size
    starts = range(0, len(examples['x']), size)
    return [{k: v[i : i + size] for k, v in examples.items()} for i in starts]

  def calibration(self) -> list[Batch]:
    """The first training examples, without labels."""
    few = {'x': self.train['x'][:1024]}
    return self.whole(few)


def labels(logits: jax.Array, batch: Any) -> jax.Array:
  """(B,): mean nats of an example's labels, of those that there are."""
  y = jnp.asarray(batch['y'], jnp.int32)
  log_p = jax.nn.log_softmax(logits)
  nats = -jnp.take_along_axis(log_p, jnp.maximum(y, 0)[..., None], -1)[..., 0]
  return _mean(nats, y)


def mistakes(logits: jax.Array, batch: Any) -> jax.Array:
  """(B,): the share of an example's labels that are not the likeliest."""
  y = jnp.asarray(batch['y'], jnp.int32)
  return _mean((logits.argmax(-1) != y).astype(jnp.float32), y)


def _mean(values: jax.Array, y: jax.Array) -> jax.Array:
  real = (y >= 0).astype(values.dtype).reshape(len(y), -1)
  total = jnp.sum(values.reshape(len(y), -1) * real, 1)
  return total / jnp.maximum(real.sum(1), 1)


def _split(data: Batch, count: int) -> tuple[Batch, Batch]:
  """All but the last examples, and those."""
  first = {k: v[:-count] for k, v in data.items()}
  return first, {k: v[-count:] for k, v in data.items()}


def _digits(root: str, seed: int, folder: str) -> Task:
  del folder
  return _of_folds(LOADERS['digits_vit'](root), 0, 200, 64, 600, seed)


def _kwt1(root: str, seed: int, folder: str) -> Task:
  """One half of the clips trains, the other is the test; seeds in turns."""
  del folder
  return _of_folds(LOADERS['kwt1'](root), seed % 2, 50, 32, 600, seed)


def _stories(root: str, seed: int, folder: str) -> Task:
  """Distilled on what the model itself wrote; the test is TinyStories."""
  del folder
  task = _of_folds(LOADERS['stories260k'](root), 0, 8, 8, 1500, seed)
  return dataclasses.replace(task, labels=False)


def _of_folds(
  network: common.Network,
  fold: int,
  validation: int,
  batch_size: int,
  steps: int,
  seed: int,
) -> Task:
  data, test = network.folds[fold]
  rows = np.random.default_rng(seed).permutation(len(data['x']))
  train_, held = _split({k: v[rows] for k, v in data.items()}, validation)
  return Task(
    network.name, network.fn, network.params, network.select,
    train_, held, test, batch_size, steps,
  )  # fmt: skip


def _cifar(root: str, seed: int) -> tuple[Batch, Batch, Batch]:
  read = resnet_cifar10.jpeg
  data = read(root, 'cifar10_train_jpeg.npz', 50_000)
  rows = np.random.default_rng(seed).permutation(len(data['x']))
  train_, held = _split({k: v[rows] for k, v in data.items()}, VALIDATION)
  return train_, held, read(root, 'cifar10_test_jpeg.npz', TEST)


def _resnet(name: str) -> Callable[[str, int, str], Task]:
  def load(root: str, seed: int, folder: str) -> Task:
    del folder
    network = LOADERS[name](root)
    return Task(
      name, network.fn, network.params, network.select, *_cifar(root, seed),
      128, 4000, augmented=True,
    )  # fmt: skip

  return load


def _vit_cifar10(root: str, seed: int, folder: str) -> Task:
  model = ViT(10, patch_size=4, width=128, depth=6, heads=4, mlp_dim=512,
              pool='gap')  # fmt: skip
  return _vit('vit_cifar10', model, _cifar(root, seed), 15_000, folder)


def _vit_fmnist(root: str, seed: int, folder: str) -> Task:
  read = lambda name: common.read(root, 'data', name)
  images = lambda v: {'x': v['x'].reshape(-1, 28, 28, 1), 'y': v['y']}
  data = images(read('fmnist_train60000.npz'))
  rows = np.random.default_rng(seed).permutation(len(data['x']))
  train_, held = _split({k: v[rows] for k, v in data.items()}, VALIDATION)
  test = images(read('fmnist_test5000.npz'))
  model = ViT(10, patch_size=4, width=96, depth=6, heads=4, mlp_dim=384,
              pool='gap')  # fmt: skip
  return _vit('vit_fmnist', model, (train_, held, test), 8_000, folder)


def _vit(
  name: str,
  model: ViT,
  data: tuple[Batch, Batch, Batch],
  steps: int,
  folder: str,
) -> Task:
  """A ViT trained here, which goes on where it stopped."""

  def fn(params: Any, batch: Any) -> Any:
    return model.apply(params, jnp.asarray(batch['x'], jnp.float32) / 128 - 1)

  x = data[0]['x'][:1].astype(np.float32)
  params = jax.jit(model.init)(jax.random.key(0), x)
  select = [('params/Transformer/encoderblock.*kernel', True)]
  task = Task(name, fn, params, select, *data, 128, 4000, augmented=True)
  done = os.path.join(folder, f'{name}_dense')
  if not os.path.exists(done):

    def objective(params: Any, frozen: Any, batch: Any, rng: Any) -> Any:
      del frozen, rng
      logits = fn(params, batch)
      right = 1 - mistakes(logits, batch).mean()
      return labels(logits, batch).mean(), {'accuracy': right}

    params = train.minimize(
      objective,
      params,
      task.batches(0),
      {'steps': steps, 'batch_size': 128, 'warmup_steps': 500,
       'weight_decay': 0.1, 'checkpoint_every': 1000, 'log_every': 100},
      directory=os.path.join(folder, f'{name}_training'),
      desc=name,
    )  # fmt: skip
    ur.save(done, params)
  return dataclasses.replace(task, params=ur.load(done))


# By name: a function of --data_root, a seed and a folder for what is trained.
TASKS: dict[str, Callable[[str, int, str], Task]] = {
  'digits_vit': _digits,
  'resnet20_cifar10': _resnet('resnet20_cifar10'),
  'resnet56_cifar10': _resnet('resnet56_cifar10'),
  'kwt1': _kwt1,
  'stories260k': _stories,
  'vit_fmnist': _vit_fmnist,
  'vit_cifar10': _vit_cifar10,
}
