"""The whole path: train, collect, measure, factorize, finetune, evaluate,
report. Every stage leaves its result in the run's directory, and a run that is
started again goes on after the last finished one."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import importlib.metadata
import itertools
import os
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

import utilized_rank as ur
from utilized_rank import data
from utilized_rank import methods
from utilized_rank import options
from utilized_rank import page
from utilized_rank import paths
from utilized_rank import tables
from utilized_rank import train
from utilized_rank.lowrank import is_low_rank
from utilized_rank.models.vit import ViT
from utilized_rank.report import Report
from utilized_rank.workdir import Workdir

STAGES = (
  'train',
  'collect',
  'measure',
  'factorize',
  'finetune',
  'evaluate',
  'report',
)
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')


@dataclasses.dataclass(frozen=True)
class CompressConfig:
  """What to shrink, and how far; the section `config.compress`.

  Attributes:
    select: ordered `(regex, bool)` rules over leaf paths: the kernels.
    fractions: shares of those kernels' parameters to keep, one model each.
    energies: shares of energy to give the mean layer utilization at.
    energy: the one that the table of layers is at.
    centered: take the spectra about the mean.
    method: see `factorize`; 'loss' and 'fisher_rows' collect gradients too, of
      labels drawn from the model itself.
    compensate_mean: see `factorize`.
    allocation: 'uniform' (`uniform_ranks`), or 'budget' (`budget_ranks`, in
      nats of loss where the method is 'loss').
    batch_size: images per batch of calibration and evaluation.
    calibration_images: augmented calibration images to collect moments over;
      0 for one pass over the split as it is.
    latency_batch_size: images per call when the speed is measured.
  """

  select: tuple[tuple[str, bool], ...]
  fractions: tuple[float, ...] = (0.5, 0.25)
  energies: tuple[float, ...] = (0.9, 0.95, 0.99, 0.999)
  energy: float = 0.99
  centered: bool = False
  method: str = 'loss'
  compensate_mean: bool = True
  allocation: str = 'budget'
  batch_size: int = 64
  calibration_images: int = 0
  latency_batch_size: int = 64

  def __post_init__(self):
    if not self.fractions or any(not 0 < f < 1 for f in self.fractions):
      raise ValueError(
        f'config.compress.fractions={self.fractions}: shares in (0, 1)'
      )
    methods.check_method(self.method)
    if self.allocation not in ('uniform', 'budget'):
      raise ValueError(
        f"config.compress.allocation={self.allocation!r}: 'uniform' or 'budget'"
      )


def run(config: Any, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Runs every stage that is not done yet.

  Args:
    config: an `ml_collections.ConfigDict` such as `configs/digits_vit.py`
      makes; its sections are `model`, `data`, `train`, `finetune`, `compress`.
    workdir: the run's directory.

  Returns:
    What is in `report.json`.

  Raises:
    ValueError: an unknown or missing key of the config (named), a directory
      of another run, or a damaged checkpoint.
  """
  job = Job(config, workdir)
  for name in STAGES:
    done = ' (done before)' if job.workdir.finished(name) else ''
    print(f'stage {name}{done}', file=sys.stderr, flush=True)
    result = job.workdir.stage(name, getattr(job, name))
  return result


class Job:
  """The stages of one run, each with what it needs from those before."""

  def __init__(self, config: Any, workdir: str | os.PathLike[str]):
    plain = ml_collections.ConfigDict(config).to_dict()
    sections = ('model', 'data', 'train', 'finetune', 'compress')
    for key in plain:
      if key not in (*sections, 'seed'):
        raise ValueError(
          f'config has the unknown key {key!r}; it takes seed, '
          f'{", ".join(sections)}'
        )
    for key in ('seed', *sections):
      if key not in plain:
        raise ValueError(f'config lacks the key {key!r}')
    # Everything is checked before anything is written.
    self.seed = plain['seed']
    self.model_config = plain['model']
    self.data_config = options.from_config(
      data.DataConfig, plain['data'], 'config.data'
    )
    self.train_config = self._training(plain, 'train')
    self.finetune_config = self._training(plain, 'finetune')
    self.compress = options.from_config(
      CompressConfig, plain['compress'], 'config.compress'
    )
    fields = [f.name for f in dataclasses.fields(ViT)]
    for key in self.model_config:
      if key not in fields or key in ('parent', 'name', 'num_classes'):
        raise ValueError(f'config.model has the unknown key {key!r}')
    self.config = plain
    self.workdir = Workdir(workdir, plain)

  def _training(self, plain: Mapping[str, Any], name: str):
    section = {'seed': plain['seed'], **plain[name]}
    return options.from_config(train.TrainConfig, section, f'config.{name}')

  # --- what stages share ---

  @functools.cached_property
  def sources(self) -> dict[str, data.Source]:
    return data.load(self.data_config)

  @functools.cached_property
  def model(self) -> ViT:
    classes = self.sources['train'].num_classes
    return ViT(num_classes=classes, **self.model_config)

  @functools.cached_property
  def forward(self):
    """The dense model on its variables: `forward(params, images, ...)`."""
    return train.linen_forward(self.model)

  @functools.cached_property
  def small_forward(self):
    """The same model on a tree with `LowRank` leaves."""
    return ur.low_rank(self.forward)

  @functools.cached_property
  def dense(self):
    return ur.load(self.workdir.file('dense'))

  @functools.cached_property
  def moments(self) -> ur.Moments:
    return ur.load(self.workdir.file('moments'))

  def _small(self, fraction: float, *, tuned: bool) -> Any:
    name = 'finetuned' if tuned else 'factorized'
    return ur.load(self.workdir.file(name, str(fraction)))

  def _batches(self, config: train.TrainConfig):
    return lambda start: self.sources['train'].batches(
      config.batch_size, seed=config.seed, start_step=start
    )

  # --- stages ---

  def train(self) -> dict[str, Any]:
    image = jnp.zeros((1, *self.sources['train'].image_shape))
    params = jax.jit(self.model.init)(jax.random.key(self.seed), image)
    params = train.fit(
      self.forward,
      params,
      self._batches(self.train_config),
      self.train_config,
      directory=self.workdir.file('train'),
    )
    ur.save(self.workdir.file('dense'), params, overwrite=True)
    return {'validation': self._evaluate(self.forward, params, 'validation')}

  def collect(self) -> dict[str, Any]:
    source = self.sources['calibration']
    size = self.compress.batch_size
    examples = self.compress.calibration_images or len(source)
    steps = -(-examples // size)
    if self.compress.calibration_images:
      stream = source.batches(size, seed=self.seed)
    else:
      stream = source.epoch(size)
    loss = None
    if self.compress.method in methods.OF_LOSS:
      loss = ur.sampled_cross_entropy(seed=self.seed)
    moments = ur.collect(
      lambda params, batch: self.forward(params, batch['image']),
      self.dense,
      _sized(itertools.islice(stream, steps), steps),
      loss=loss,
      fisher_rows=self.compress.method == 'fisher_rows',
      select=self.compress.select,
      checkpoint_dir=self.workdir.file('collect'),
    )
    ur.save(self.workdir.file('moments'), moments, overwrite=True)
    return {'examples': examples, 'kernels': len(moments)}

  def measure(self) -> dict[str, Any]:
    report = ur.measure(
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
      ranks = self._ranks(fraction)
      small = ur.factorize(
        self.dense,
        self.moments,
        ranks,
        method=self.compress.method,
        compensate_mean=self.compress.compensate_mean,
      )
      ur.save(
        self.workdir.file('factorized', str(fraction)), small, overwrite=True
      )
      chosen[str(fraction)] = ranks
    return {'ranks': chosen}

  def _ranks(self, fraction: float) -> dict[str, int]:
    if self.compress.allocation == 'uniform':
      return ur.uniform_ranks(
        self.dense, self.moments, params_fraction=fraction
      )
    # The paper's form has no ranks of its own under a budget.
    method = self.compress.method
    return ur.budget_ranks(
      self.dense,
      self.moments,
      params_fraction=fraction,
      method='output' if method == methods.UTILIZED else method,
      compensate_mean=self.compress.compensate_mean,
    )

  def finetune(self) -> dict[str, Any]:
    teacher = None
    if self.finetune_config.distill_weight > 0:
      teacher = train.Teacher(self.forward, self.dense)
    validation = {}
    for fraction in self.compress.fractions:
      small = train.fit(
        self.small_forward,
        self._small(fraction, tuned=False),
        self._batches(self.finetune_config),
        self.finetune_config,
        directory=self.workdir.file('finetune', str(fraction)),
        teacher=teacher,
        desc='finetune',
      )
      ur.save(
        self.workdir.file('finetuned', str(fraction)), small, overwrite=True
      )
      validation[str(fraction)] = self._evaluate(
        self.small_forward, small, 'validation'
      )
    return {'validation': validation}

  def evaluate(self) -> dict[str, Any]:
    """The only stage that sees the test split."""
    test = lambda forward, params: self._evaluate(forward, params, 'test')
    models = [(self.forward, self.dense)]
    runs = [
      {
        'params_fraction': 1.0,
        'test_accuracy': test(self.forward, self.dense)['accuracy'],
        'test_accuracy_before_finetune': None,
      }
    ]
    for fraction in self.compress.fractions:
      raw, tuned = (self._small(fraction, tuned=t) for t in (False, True))
      models.append((self.small_forward, tuned))
      runs.append(
        {
          'params_fraction': fraction,
          'test_accuracy': test(self.small_forward, tuned)['accuracy'],
          'test_accuracy_before_finetune': test(self.small_forward, raw)[
            'accuracy'
          ],
        }
      )
    batch = next(
      iter(self.sources['test'].epoch(self.compress.latency_batch_size))
    )
    costs = _costs(models, jnp.asarray(batch['image']))
    for entry, (_, params), cost in zip(runs, models, costs, strict=True):
      entry['params'] = ur.count_params(params)
      entry['kernel_params'] = self._kernel_params(params)
      entry.update(cost)
    return {'runs': runs}

  def report(self) -> dict[str, Any]:
    report = Report.load(self.workdir.file('utilization.json'))
    runs = self.workdir.read('stages/evaluate.json')['result']['runs']
    seconds = self.workdir.seconds()
    seconds = {name: seconds[name] for name in STAGES if name in seconds}
    versions = {
      'utilized_rank': ur.__version__,
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
    mlu = report.utilization_at(self.compress.energies)
    self.workdir.write_text(
      'report.html',
      page.html(
        report.layers,
        mlu,
        runs,
        {
          'title': f'Utilized rank: {self.data_config.name}',
          'config': self.config,
          'versions': versions,
          'seconds': seconds,
          'centered': report.centered,
          'energy': report.energy,
        },
      ),
    )
    shares = '  '.join(f'{u:.1%} at {e}' for e, u in mlu.items())
    print(
      f'{report}\n\nmean layer utilization: {shares}\n\n'
      f'{tables.run_table(runs)}\n\n'
      f'report: {self.workdir.file("report.html")}'
    )
    return result

  def _evaluate(self, forward, params, split: str) -> dict[str, float]:
    batches = self.sources[split].epoch(self.compress.batch_size)
    return train.evaluate(forward, params, batches)

  def _kernel_params(self, params: Any) -> int:
    named, _ = paths.flatten(params, is_low_rank)
    return ur.count_params([named[path] for path in self.moments])


class _sized:
  """An iterator that knows how many items it will give."""

  def __init__(self, items, length: int):
    self._items, self._length = items, length

  def __iter__(self):
    return iter(self._items)

  def __len__(self) -> int:
    return self._length


def _costs(models, images: jax.Array, rounds: int = 25) -> list[dict]:
  """FLOPs per example and milliseconds per example of each model.

  The models take turns, so that a busy machine slows all of them alike.
  """
  calls, costs = [], []
  for forward, params in models:
    step = jax.jit(lambda p, x, f=forward: f(p, x, train=False, rng=None))
    compiled = step.lower(params, images).compile()
    analysis = compiled.cost_analysis() or {}
    costs.append({'flops': analysis.get('flops', 0.0) / len(images)})
    calls.append(functools.partial(compiled, params, images))
  times: list[list[float]] = [[] for _ in calls]
  for _ in range(rounds):
    for call, seconds in zip(calls, times, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(call())
      seconds.append(time.perf_counter() - start)
  for cost, seconds in zip(costs, times, strict=True):
    cost['latency_ms'] = 1e3 * statistics.median(seconds) / len(images)
    cost['latency_batch_size'] = len(images)
  return costs
