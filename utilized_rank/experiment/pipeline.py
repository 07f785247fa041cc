"""The whole path: train, collect, measure, factorize, finetune, evaluate,
report. Every stage leaves its result in the run's directory, and a run that is
started again goes on after the last finished one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import functools
import importlib.metadata
import itertools
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp

from utilized_rank import version
from utilized_rank.collection.collect import collect
from utilized_rank.data import splits
from utilized_rank.experiment import costs
from utilized_rank.experiment import occupied
from utilized_rank.experiment.recover import recover
from utilized_rank.experiment.settings import Settings
from utilized_rank.experiment.shrink import shrink
from utilized_rank.experiment.workdir import Workdir
from utilized_rank.factorization import methods
from utilized_rank.host import progress
from utilized_rank.host import stopping
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
from utilized_rank.training.config import TrainConfig
from utilized_rank.training.parts import take_apart
from utilized_rank.tree import paths

# Enough to forget all statistics from before, see `batch_statistics`.
_STATISTICS_BATCHES = 100
_REPORTS = ('report.json', 'report.html')
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')


def run(
  config: Any, workdir: str | os.PathLike[str], *, redo: str | None = None
) -> dict[str, Any]:
  """Runs every stage that is not done yet, and prints what came out.

  Ctrl-C and SIGTERM end the run at its next step, which is saved.

  Args:
    config: an `ml_collections.ConfigDict` such as `configs/digits_vit.py`
      makes. Its sections are `model`, `data`, `compress`; `train` or, for
      trained weights, `checkpoint`; and `finetune` where anything is made
      smaller.
    workdir: the run's directory.
    redo: a stage that is run again, with those after it.

  Returns:
    What is in `report.json`.

  Raises:
    Preempted: a signal asked; the same call goes on.
    ValueError: an unknown or missing key of the config (named), a directory
      of another run or of one that is under way, or a damaged checkpoint.
  """
  settings = Settings.of(config)  # all of it, before anything is written
  with occupied.occupied(workdir), stopping.on_signals():
    job = Job(settings, workdir, redo=redo)
    occupied.sign(workdir)
    if changed := job.workdir.changed('report', _REPORTS):
      for file in changed:
        progress.say(f'{file} is gone or was changed: it is made again')
      job.workdir.forget('report')
    for name in settings.stages:
      done = job.workdir.finished(name)
      progress.say(f'stage {name}{" (done before)" if done else ""}')
      made = _REPORTS if name == 'report' else ()
      result = job.workdir.stage(name, getattr(job, name), made)
      if stopping.asked() and name != settings.stages[-1]:
        raise stopping.Preempted(f'stopped after the stage {name}')
    print(job.summary())
  return result


class Job:
  """The stages of one run, each with what it needs from those before."""

  def __init__(
    self,
    config: Any,
    workdir: str | os.PathLike[str],
    *,
    redo: str | None = None,
  ):
    self.settings = settings = Settings.of(config)
    self.compress = settings.compress
    self.workdir = Workdir(
      workdir,
      settings.plain,
      stages=settings.stages,
      first_reader=settings.first_reader,
      redo=redo,
    )

  # --- what stages share ---

  @functools.cached_property
  def sources(self) -> dict[str, splits.Source]:
    data = self.settings.data
    if data.name == 'sk_digits' and data.data_dir is None:
      # TFDS would prepare them in the home folder.
      data = dataclasses.replace(data, data_dir=self.workdir.file('data'))
    return splits.load(data)

  @functools.cached_property
  def model(self) -> Any:
    """The module; of a checkpoint, as its shapes describe it."""
    if self.settings.checkpoint is not None:
      return self._restored[0]
    return self.settings.model.build(self.sources['train'].num_classes)

  @functools.cached_property
  def _restored(self) -> tuple[Any, Any]:
    assert self.settings.checkpoint is not None  # or the stage would be 'train'
    size = self.sources['train'].image_shape[0]
    return self.settings.model.restore(self.settings.checkpoint, size)

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
    params = jax.jit(self.model.init)(jax.random.key(self.settings.seed), image)
    config = self.settings.train
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
    examples, batches = self.calibration()
    moments = collect(
      self.of_batch,
      self.dense,
      batches,
      loss=self.loss,
      fisher_rows=self.compress.method == 'fisher_rows',
      coupled=self.compress.method == 'coupled',
      select=self.compress.select,
      checkpoint_dir=self.workdir.file('collect'),
      memory_limit=self.compress.memory_limit or None,
    )
    save(self.workdir.file('moments'), moments, overwrite=True)
    return {'examples': examples, 'kernels': len(moments)}

  def of_batch(self, params: Any, batch: Mapping[str, Any]) -> jax.Array:
    """The dense model on a batch."""
    return self.forward(params, batch['image'])

  @property
  def loss(self) -> Any:
    """What moments of gradients are of; None where there are none."""
    if self.compress.method not in methods.OF_LOSS:
      return None
    return sampled_cross_entropy(seed=self.settings.seed)

  def calibration(self) -> tuple[int, Any]:
    """How many images there are to calibrate on, and they in batches."""
    source = self.sources['calibration']
    size = self.compress.batch_size
    examples = self.compress.calibration_images or len(source)
    steps = -(-examples // size)

    def stream():
      if not self.compress.calibration_images:
        return source.epoch(size)
      return source.batches(
        size, seed=self.settings.seed, augment=self.compress.calibration_augment
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
    return {'ranks': self._each('factorize', self._factorize)}

  def _factorize(self, fraction: float) -> dict[str, int]:
    small, ranks = shrink(
      self.of_batch,
      self.dense,
      self.moments,
      lambda: self.calibration()[1],
      self.loss,
      fraction,
      self.compress,
    )
    save(self.workdir.file('factorized', str(fraction)), small, overwrite=True)
    return ranks

  def finetune(self) -> dict[str, Any]:
    return {'validation': self._each('finetune', self._finetune)}

  def _finetune(self, fraction: float) -> dict[str, float]:
    config = self.settings.finetune
    assert config is not None  # there are fractions
    small = recover(
      self.model,
      self._small(fraction, tuned=False),
      self.dense,
      self._batches(config),
      lambda: self.sources['validation'].epoch(self.compress.batch_size),
      config,
      self.workdir.file('finetune', str(fraction)),
    )
    save(self.workdir.file('finetuned', str(fraction)), small, overwrite=True)
    return self._evaluate(self.small_forward, small, 'validation')

  def _each(self, stage: str, work: Callable[[float], Any]) -> dict[str, Any]:
    """What each fraction's part of a stage gives; parts are kept, too."""
    return {
      str(f): self.workdir.stage(f'{stage}/{f}', functools.partial(work, f))
      for f in self.compress.fractions
    }

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
    seconds = {k: seconds[k] for k in self.settings.stages if k in seconds}
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
      'config': self.settings.plain,
      'seconds': seconds,
    }
    data, page = _REPORTS
    self.workdir.write(data, result)
    self.workdir.write_text(
      page,
      report.html(
        runs,
        {
          'title': f'Utilized rank: {self.settings.data.name}',
          'config': self.settings.plain,
          'versions': versions,
          'seconds': seconds,
        },
        self.compress.energies,
      ),
    )
    return result

  def summary(self) -> str:
    """What a terminal shows of a finished run, and where its report is."""
    report = Report.load(self.workdir.file('utilization.json'))
    runs = self.workdir.read('stages/evaluate.json')['result']['runs']
    mlu = report.utilization_at(self.compress.energies)
    shares = '  '.join(f'{u:.1%} at {e}' for e, u in mlu.items())
    return (
      f'{report}\n\nmean layer utilization: {shares}\n\n'
      f'{tables.run_table(runs)}\n\n'
      f'report: {self.workdir.file("report.html")}'
    )

  def _evaluate(self, forward, params, split: str) -> dict[str, float]:
    source = self.sources[split]
    if self.model.num_classes != source.num_classes:
      return {}  # features, or classes of another set
    batches = source.epoch(self.compress.batch_size)
    return train.evaluate(forward, params, batches)

  def _kernel_params(self, params: Any) -> int:
    named, _ = paths.flatten(params, is_low_rank)
    return count_params([named[path] for path in self.moments])


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
