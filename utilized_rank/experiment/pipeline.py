"""The whole path: train, collect, measure, factorize, finetune, evaluate,
report. Every stage leaves its result in the run's directory, and a run that is
started again goes on after the last finished one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
import functools
import importlib.metadata
import itertools
import os
import sys
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_collections

from utilized_rank import version
from utilized_rank.collection.collect import collect
from utilized_rank.data import splits
from utilized_rank.experiment import costs
from utilized_rank.experiment import network
from utilized_rank.experiment.recover import recover
from utilized_rank.experiment.shrink import CompressConfig
from utilized_rank.experiment.shrink import shrink
from utilized_rank.experiment.workdir import Workdir
from utilized_rank.factorization import methods
from utilized_rank.host import options
from utilized_rank.losses.sampled import sampled_cross_entropy
from utilized_rank.lowrank.leaf import count_params
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.low_rank import low_rank
from utilized_rank.moments.moments import Moments
from utilized_rank.report import tables
from utilized_rank.report.measure import measure
from utilized_rank.report.report import Report
from utilized_rank.storage.checkpoint import load
from utilized_rank.storage.checkpoint import save
from utilized_rank.training import batch_statistics
from utilized_rank.training import train
from utilized_rank.training.config import FinetuneConfig
from utilized_rank.training.config import TrainConfig
from utilized_rank.training.parts import take_apart
from utilized_rank.tree import paths

T = TypeVar('T')
# A run with a checkpoint has 'restore' in place of the first.
STAGES = (
  'train',
  'collect',
  'measure',
  'factorize',
  'finetune',
  'evaluate',
  'report',
)
# Enough to forget all statistics from before, see `batch_statistics`.
_STATISTICS_BATCHES = 100
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')


def run(config: Any, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Runs every stage that is not done yet.

  Args:
    config: an `ml_collections.ConfigDict` such as `configs/digits_vit.py`
      makes. Its sections are `model`, `data`, `compress`; `train` or, for
      trained weights, `checkpoint`; and `finetune` where anything is made
      smaller.
    workdir: the run's directory.

  Returns:
    What is in `report.json`.

  Raises:
    ValueError: an unknown or missing key of the config (named), a directory
      of another run, or a damaged checkpoint.
  """
  job = Job(config, workdir)
  for name in job.stages:
    done = ' (done before)' if job.workdir.finished(name) else ''
    print(f'stage {name}{done}', file=sys.stderr, flush=True)
    result = job.workdir.stage(name, getattr(job, name))
  return result


class Job:
  """The stages of one run, each with what it needs from those before."""

  def __init__(self, config: Any, workdir: str | os.PathLike[str]):
    plain = ml_collections.ConfigDict(config).to_dict()
    # Everything is checked before anything is written.
    _check_sections(plain)
    self.seed = plain['seed']
    self.model_config = network.ModelConfig.of(plain['model'])
    self.data_config = options.from_config(
      splits.DataConfig, plain['data'], 'config.data'
    )
    self.checkpoint = self.train_config = self.finetune_config = None
    if 'checkpoint' in plain:
      self.checkpoint = options.from_config(
        network.CheckpointConfig, plain['checkpoint'], 'config.checkpoint'
      )
    else:
      self.train_config = self._training(plain, 'train', TrainConfig)
    self.compress = options.from_config(
      CompressConfig, plain['compress'], 'config.compress'
    )
    if self.compress.fractions:
      self.finetune_config = self._training(plain, 'finetune', FinetuneConfig)
    first = 'train' if self.checkpoint is None else 'restore'
    self.stages = (first, *STAGES[1:])
    self.config = plain
    self.workdir = Workdir(workdir, plain)

  def _training(self, plain: Mapping[str, Any], name: str, kind: type[T]) -> T:
    section = {'seed': plain['seed'], **plain[name]}
    return options.from_config(kind, section, f'config.{name}')

  # --- what stages share ---

  @functools.cached_property
  def sources(self) -> dict[str, splits.Source]:
    return splits.load(self.data_config)

  @functools.cached_property
  def model(self) -> Any:
    """The module; of a checkpoint, as its shapes describe it."""
    if self.checkpoint is not None:
      return self._restored[0]
    return self.model_config.build(self.sources['train'].num_classes)

  @functools.cached_property
  def _restored(self) -> tuple[Any, Any]:
    assert self.checkpoint is not None  # or the stage would be 'train'
    size = self.sources['train'].image_shape[0]
    return self.model_config.restore(self.checkpoint, size)

  @functools.cached_property
  def forward(self):
    """The dense model on its variables: `forward(params, images, ...)`."""
    return train.linen_forward(self.model)

  @functools.cached_property
  def small_forward(self):
    """The same model on a tree with `LowRank` leaves."""
    return low_rank(self.forward)

  @functools.cached_property
  def dense(self):
    return load(self.workdir.file('dense'))

  @functools.cached_property
  def moments(self) -> Moments:
    return load(self.workdir.file('moments'))

  def _small(self, fraction: float, *, tuned: bool) -> Any:
    name = 'finetuned' if tuned else 'factorized'
    return load(self.workdir.file(name, str(fraction)))

  def _batches(self, config: TrainConfig) -> Callable[[int], Any]:
    """Training batches from a step on."""
    return lambda start: self.sources['train'].batches(
      config.batch_size, seed=config.seed, start_step=start
    )

  # --- stages ---

  def train(self) -> dict[str, Any]:
    image = jnp.zeros((1, *self.sources['train'].image_shape))
    params = jax.jit(self.model.init)(jax.random.key(self.seed), image)
    config = self.train_config
    assert config is not None  # or the stage would be 'restore'
    batches = self._batches(config)
    params = train.fit(
      self.forward,
      params,
      batches,
      config,
      directory=self.workdir.file('train'),
    )
    params = batch_statistics.reestimate(
      batch_statistics.linen(self.model),
      params,
      itertools.islice(batches(config.steps), _STATISTICS_BATCHES),
      take_apart(params).moving,
    )
    save(self.workdir.file('dense'), params, overwrite=True)
    return {'validation': self._evaluate(self.forward, params, 'validation')}

  def restore(self) -> dict[str, Any]:
    model, params = self._restored
    save(self.workdir.file('dense'), params, overwrite=True)
    return {'model': repr(model)}

  def collect(self) -> dict[str, Any]:
    examples, batches = self._calibration()
    moments = collect(
      self._of_batch,
      self.dense,
      batches,
      loss=self._loss if self.compress.method in methods.OF_LOSS else None,
      fisher_rows=self.compress.method == 'fisher_rows',
      select=self.compress.select,
      checkpoint_dir=self.workdir.file('collect'),
      memory_limit=self.compress.memory_limit or None,
    )
    save(self.workdir.file('moments'), moments, overwrite=True)
    return {'examples': examples, 'kernels': len(moments)}

  def _of_batch(self, params: Any, batch: Mapping[str, Any]) -> jax.Array:
    return self.forward(params, batch['image'])

  @property
  def _loss(self) -> Any:
    return sampled_cross_entropy(seed=self.seed)

  def _calibration(self) -> tuple[int, Any]:
    """How many images there are to calibrate on, and they in batches."""
    source = self.sources['calibration']
    size = self.compress.batch_size
    examples = self.compress.calibration_images or len(source)
    steps = -(-examples // size)

    def stream():
      if not self.compress.calibration_images:
        return source.epoch(size)
      return source.batches(
        size, seed=self.seed, augment=self.compress.calibration_augment
      )

    return examples, _Batches(stream, steps)

  def measure(self) -> dict[str, Any]:
    report = measure(
      self.dense,
      self.moments,
      energy=self.compress.energy,
      centered=self.compress.centered,
    )
    report.save(self.workdir.file('utilization.json'))
    return report.json(self.compress.energies)

  def factorize(self) -> dict[str, Any]:
    chosen = {}
    for fraction in self.compress.fractions:
      small, ranks = shrink(
        self._of_batch,
        self.dense,
        self.moments,
        lambda: self._calibration()[1],
        self._loss,
        fraction,
        self.compress,
      )
      save(
        self.workdir.file('factorized', str(fraction)), small, overwrite=True
      )
      chosen[str(fraction)] = ranks
    return {'ranks': chosen}

  def finetune(self) -> dict[str, Any]:
    validation: dict[str, Any] = {}
    if self.finetune_config is None:
      return {'validation': validation}
    for fraction in self.compress.fractions:
      small = recover(
        self.model,
        self._small(fraction, tuned=False),
        self.dense,
        self._batches(self.finetune_config),
        lambda: self.sources['validation'].epoch(self.compress.batch_size),
        self.finetune_config,
        self.workdir.file('finetune', str(fraction)),
      )
      save(self.workdir.file('finetuned', str(fraction)), small, overwrite=True)
      validation[str(fraction)] = self._evaluate(
        self.small_forward, small, 'validation'
      )
    return {'validation': validation}

  def evaluate(self) -> dict[str, Any]:
    """The only stage that sees the test split."""
    test = lambda forward, params: self._evaluate(forward, params, 'test')
    models = [(self.forward, self.dense)]
    runs = [_run(1.0, test(self.forward, self.dense), {})]
    for fraction in self.compress.fractions:
      raw, tuned = (self._small(fraction, tuned=t) for t in (False, True))
      models.append((self.small_forward, tuned))
      after, before = (test(self.small_forward, x) for x in (tuned, raw))
      runs.append(_run(fraction, after, before))
    batch = next(
      iter(self.sources['test'].epoch(self.compress.latency_batch_size))
    )
    found = costs.measure(models, jnp.asarray(batch['image']))
    for entry, (_, params), cost in zip(runs, models, found, strict=True):
      entry['params'] = count_params(params)
      entry['kernel_params'] = self._kernel_params(params)
      entry.update(cost)
    return {'runs': runs}

  def report(self) -> dict[str, Any]:
    report = Report.load(self.workdir.file('utilization.json'))
    runs = self.workdir.read('stages/evaluate.json')['result']['runs']
    seconds = self.workdir.seconds()
    seconds = {k: seconds[k] for k in self.stages if k in seconds}
    versions = {
      'utilized_rank': version.__version__,
      'python': sys.version.split()[0],
      **{name: importlib.metadata.version(name) for name in _PACKAGES},
      'device': jax.devices()[0].device_kind,
    }
    result = {
      **report.json(self.compress.energies),
      'dense': runs[0],
      'compressed': runs[1:],
      'versions': versions,
      'config': self.config,
      'seconds': seconds,
    }
    self.workdir.write('report.json', result)
    self.workdir.write_text(
      'report.html',
      report.html(
        runs,
        {
          'title': f'Utilized rank: {self.data_config.name}',
          'config': self.config,
          'versions': versions,
          'seconds': seconds,
        },
        self.compress.energies,
      ),
    )
    mlu = report.utilization_at(self.compress.energies)
    shares = '  '.join(f'{u:.1%} at {e}' for e, u in mlu.items())
    print(
      f'{report}\n\nmean layer utilization: {shares}\n\n'
      f'{tables.run_table(runs)}\n\n'
      f'report: {self.workdir.file("report.html")}'
    )
    return result

  def _evaluate(self, forward, params, split: str) -> dict[str, float]:
    source = self.sources[split]
    if self.model.num_classes != source.num_classes:
      return {}  # features, or classes of another set
    batches = source.epoch(self.compress.batch_size)
    return train.evaluate(forward, params, batches)

  def _kernel_params(self, params: Any) -> int:
    named, _ = paths.flatten(params, is_low_rank)
    return count_params([named[path] for path in self.moments])


def _check_sections(plain: Mapping[str, Any]) -> None:
  known = ('model', 'data', 'train', 'checkpoint', 'finetune', 'compress')
  for key in plain:
    if key not in (*known, 'seed'):
      raise ValueError(
        f'config has the unknown key {key!r}; it takes seed, {", ".join(known)}'
      )
  for key in ('seed', 'model', 'data', 'compress'):
    if key not in plain:
      raise ValueError(f'config lacks the key {key!r}')
  if ('train' in plain) == ('checkpoint' in plain):
    both = 'both' if 'train' in plain else 'neither'
    raise ValueError(
      f"config has {both} of 'train' and 'checkpoint'; it takes one"
    )
  if 'finetune' not in plain and plain['compress'].get('fractions', True):
    raise ValueError("config lacks the key 'finetune'")


def _run(
  fraction: float, after: Mapping[str, float], before: Mapping[str, float]
) -> dict[str, Any]:
  """What the evaluation of one model found; None for what it has not."""
  return {
    'params_fraction': fraction,
    'test_accuracy': after.get('accuracy'),
    'test_accuracy_before_finetune': before.get('accuracy'),
    'test_top5_accuracy': after.get('top5_accuracy'),
    'test_correct': after.get('correct'),
    'test_count': after.get('count'),
  }


class _Batches:
  """The first so many items of a stream, from its start at every turn."""

  def __init__(self, stream: Callable[[], Iterable[Any]], length: int):
    self._stream, self._length = stream, length

  def __iter__(self) -> Iterator[Any]:
    return itertools.islice(self._stream(), self._length)

  def __len__(self) -> int:
    return self._length
