"""The whole path on the smallest config: stages, results, restarts, errors."""

import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

import utilized_rank as ur
from utilized_rank.data import splits
from utilized_rank.experiment import pipeline
from utilized_rank.experiment import recover
from utilized_rank.experiment import settings

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]


def get_config(**overrides):
  spec = importlib.util.spec_from_file_location(
    'digits_vit', ROOT / 'configs' / 'digits_vit.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config('testing')
  config.update_from_flattened_dict(overrides)
  return config


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
  """Where the digits are prepared, once."""
  return str(tmp_path_factory.mktemp('tfds'))


@pytest.fixture(scope='module')
def config(digits):
  return get_config(**{'data.data_dir': digits})


@pytest.fixture(scope='module')
def finished(config, tmp_path_factory):
  """A finished run, and which splits each of its stages read."""
  seen = {}
  stage = []
  with pytest.MonkeyPatch.context() as patch:
    load = splits.load

    def spy(options):
      sources = load(options)
      for name, source in sources.items():
        for method in ('epoch', 'batches'):
          original = getattr(source, method)

          def called(*args, _name=name, _original=original, **kwargs):
            seen.setdefault(stage[-1], set()).add(_name)
            return _original(*args, **kwargs)

          setattr(source, method, called)
      return sources

    patch.setattr(splits, 'load', spy)
    run_stage = pipeline.Workdir.stage

    def note(self, name, run, made=()):
      stage.append(name)
      return run_stage(self, name, run, made)

    patch.setattr(pipeline.Workdir, 'stage', note)
    folder = tmp_path_factory.mktemp('run') / 'digits'
    result = pipeline.run(config, folder)
  return folder, result, seen


def test_the_report_has_what_it_promises(finished, config):
  folder, result, _ = finished
  report = json.loads((folder / 'report.json').read_text())
  assert report == json.loads(json.dumps(result))
  assert set(report['mean_layer_utilization']) == {
    '0.9',
    '0.95',
    '0.99',
    '0.999',
  }
  assert all(0 < u <= 1 for u in report['mean_layer_utilization'].values())
  assert len(report['layers']) == 6 * config.model.depth
  for layer in report['layers']:
    assert layer['rank'] == min(layer['k_in'], layer['k_out'])
    assert layer['utilization'] == layer['rank'] / min(
      layer['d_in'], layer['d_out']
    )
    assert layer['error_bound'] <= layer['error_projected'] + 1e-6
  assert report['dense']['params_fraction'] == 1.0
  fractions = [run['params_fraction'] for run in report['compressed']]
  assert fractions == list(config.compress.fractions)
  dense = report['dense']
  for run in report['compressed']:
    kept = run['kernel_params'] / dense['kernel_params']
    assert kept <= run['params_fraction']
    assert run['params'] - run['kernel_params'] == (
      dense['params'] - dense['kernel_params']
    )
    assert run['flops'] < dense['flops']
    assert run['latency_ms'] > 0
    for name in ('test_accuracy', 'test_accuracy_before_finetune'):
      assert 0 <= run[name] <= 1
  assert set(report['seconds']) == set(settings.STAGES) - {'report'}
  assert report['versions']['jax']
  assert report['config']['model']['width'] == config.model.width


def test_the_page_names_every_layer(finished):
  folder, result, _ = finished
  page = (folder / 'report.html').read_text()
  assert page.lstrip().startswith('<!doctype html>')
  assert 'kernels hold ' in page
  assert page.count('MlpBlock_3') >= 2


def test_a_collection_in_passes_measures_the_same(
  finished, digits, tmp_path, monkeypatch
):
  """The images are gone through twice, in one order."""
  limits = []
  module = importlib.import_module('utilized_rank.collection.collect')
  passes_within = module.passes_within

  def in_two(sites, *sums):
    *sums, peak, limit = sums
    limits.append(limit)
    less = peak(list(sites)) - 1000
    return passes_within(sites, *sums, peak, less)

  monkeypatch.setattr(module, 'passes_within', in_two)
  _, result, _ = finished
  config = get_config(
    **{'data.data_dir': digits, 'compress.fractions': ()},
    **{'compress.memory_limit': 10**9},
  )
  again = pipeline.run(config, tmp_path / 'run')
  assert limits == [10**9]
  assert {layer['pass'] for layer in again['layers']} == {0, 1}
  close = dict(rel=1e-4, abs=1e-4)
  for one, other in zip(again['layers'], result['layers'], strict=True):
    assert (one['path'], one['count']) == (other['path'], other['count'])
    assert one['error_bound'] == pytest.approx(other['error_bound'], **close)


def test_only_the_evaluation_sees_the_test_split(finished):
  _, _, seen = finished
  assert {stage for stage, splits in seen.items() if 'test' in splits} == {
    'evaluate'
  }
  assert seen['collect'] == {'calibration'}
  assert 'calibration' not in seen['train'] | seen['finetune/0.5']


def test_a_second_start_shows_the_result_again(
  finished, config, monkeypatch, capsys
):
  folder, result, _ = finished
  for name in settings.STAGES:
    monkeypatch.setattr(
      pipeline.Job, name, lambda self: pytest.fail('ran again')
    )
  assert pipeline.run(config, folder) == json.loads(json.dumps(result))
  shown = capsys.readouterr().out
  assert f'report: {folder / "report.html"}' in shown
  assert 'mean layer utilization: ' in shown


def test_a_report_that_was_deleted_or_changed_is_made_again(
  finished, config, tmp_path, capsys
):
  folder, result, _ = finished
  copy = tmp_path / 'copy'
  shutil.copytree(folder, copy)
  (copy / 'report.html').unlink()
  changed = (copy / 'report.json').read_text().replace('"rank": ', '"rank": 1')
  (copy / 'report.json').write_text(changed)
  again = pipeline.run(config, copy)
  assert (copy / 'report.html').exists()
  said = capsys.readouterr().err
  for name in ('report.html', 'report.json'):
    assert f'{name} is gone or was changed: it is made again' in said
  assert json.loads((copy / 'report.json').read_text()) == again
  assert again['compressed'] == json.loads(json.dumps(result['compressed']))


def test_another_fraction_keeps_what_is_there(
  finished, digits, tmp_path, monkeypatch
):
  folder, result, _ = finished
  copy = tmp_path / 'copy'
  shutil.copytree(folder, copy)
  made = []
  shrink = pipeline.shrink
  monkeypatch.setattr(
    pipeline, 'shrink', lambda *a: made.append(a[5]) or shrink(*a)
  )
  for name in ('train', 'collect', 'measure'):
    monkeypatch.setattr(
      pipeline.Job, name, lambda self: pytest.fail('ran again')
    )
  config = get_config(
    **{'data.data_dir': digits, 'compress.fractions': (0.4, 0.25)}
  )
  again = pipeline.run(config, copy)
  assert made == [0.4]
  shares = [run['params_fraction'] for run in again['compressed']]
  assert shares == [0.4, 0.25]
  there = result['compressed'][1]
  for key in ('params', 'test_correct', 'test_accuracy_before_finetune'):
    assert again['compressed'][1][key] == there[key]


def test_a_run_that_is_stopped_goes_on_at_the_next_step(
  config, tmp_path, monkeypatch, capsys
):
  """The signal comes with the second batch, in training and in collection."""
  batches = splits.Source.batches

  def interrupting(self, *args, **kwargs):
    for number, batch in enumerate(batches(self, *args, **kwargs), 1):
      if number == 2 and self is not None and armed:
        armed.pop()
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  monkeypatch.setattr(splits.Source, 'batches', interrupting)
  armed = [True]
  with pytest.raises(ur.Preempted, match='train is stopped after step 2 of 6'):
    pipeline.run(config, tmp_path / 'run')
  monkeypatch.setattr(pipeline.Job, 'measure', lambda self: 1 / 0)
  armed = [True]
  with pytest.raises(ur.Preempted, match='train is stopped after step 4 of 6'):
    pipeline.run(config, tmp_path / 'run')
  assert 'train: resuming at step 3 of 6' in capsys.readouterr().err
  with pytest.raises(ZeroDivisionError):
    pipeline.run(config, tmp_path / 'run')


def test_a_run_is_stopped_between_two_stages(config, tmp_path, monkeypatch):
  monkeypatch.setattr(pipeline.Job, 'train', lambda self: {})
  monkeypatch.setattr(pipeline.stopping, 'asked', lambda: True)
  with pytest.raises(ur.Preempted, match='stopped after the stage train'):
    pipeline.run(config, tmp_path / 'run')


def test_a_run_goes_on_after_its_last_finished_stage(
  finished, config, tmp_path
):
  folder, result, _ = finished
  copy = tmp_path / 'copy'
  shutil.copytree(folder, copy)
  for name in ('evaluate', 'report'):
    (copy / 'stages' / f'{name}.json').unlink()
  shutil.rmtree(copy / 'train')  # not needed any more
  again = pipeline.run(config, copy)
  assert again['layers'] == result['layers']
  assert (
    again['compressed'][0]['test_accuracy']
    == result['compressed'][0]['test_accuracy']
  )


def test_a_workdir_of_another_config_is_refused(finished, digits):
  folder, _, _ = finished
  other = get_config(**{'data.data_dir': digits, 'train.steps': 7})
  with pytest.raises(ValueError, match='train.steps is 6 there and 7 here'):
    pipeline.run(other, folder)


@pytest.mark.parametrize(
  'key, message',
  [
    ('modle', "config has the unknown key 'modle'"),
    ('model.widht', "config.model has the unknown key 'widht'"),
    ('train.lr', "config.train has the unknown key 'lr'"),
    ('finetune.lr', "config.finetune has the unknown key 'lr'"),
    ('data.nmae', "config.data has the unknown key 'nmae'"),
    ('compress.energys', "config.compress has the unknown key 'energys'"),
  ],
)
def test_unknown_config_keys_are_named_and_nothing_is_written(
  tmp_path, key, message
):
  config = get_config().to_dict()
  section = config
  *parts, last = key.split('.')
  for part in parts:
    section = section[part]
  section[last] = 1
  with pytest.raises(ValueError) as error:
    pipeline.run(config, tmp_path / 'run')
  assert message in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_more_devices_than_there_are_are_refused():
  with pytest.raises(ValueError, match='finetune.devices=99; there are '):
    recover._mesh(99)


def test_missing_sections_and_bad_values_are_named(tmp_path):
  config = get_config().to_dict()
  del config['finetune']
  with pytest.raises(ValueError, match="lacks the key 'finetune'"):
    pipeline.run(config, tmp_path / 'run')
  config = get_config().to_dict()
  del config['seed']
  with pytest.raises(ValueError, match="config lacks the key 'seed'"):
    pipeline.run(config, tmp_path / 'run')
  for options, message in [
    ({'fractions': (0.5, 1.5)}, r'shares in \(0, 1\)'),
    ({'memory_limit': -1}, 'memory_limit=-1: bytes, or 0'),
    ({'allocation': 'best'}, "allocation='best'"),
    (
      {'allocation': 'compress', 'method': 'output'},
      "'compress' chooses the method itself",
    ),
  ]:
    config = get_config()
    config.compress.update(options)
    with pytest.raises(ValueError, match=message):
      pipeline.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'argument, message',
  [
    (
      '--config.train.stepz=3',
      "the config has no key 'stepz', given as ['--config.train.stepz=3']",
    ),
    ('--config.compress.fractions=(2.0,)', 'error: config.compress.fractions'),
    ('--config.data.name=no_such_set', 'error: '),
  ],
)
def test_the_launcher_says_what_is_wrong_in_one_line(
  tmp_path, argument, message
):
  done = subprocess.run(
    [
      sys.executable,
      '-W',
      'ignore',
      '-m',
      'launch.main',
      '--config=digits_vit:testing',
      f'--workdir={tmp_path / "run"}',
      argument,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode
  assert message in done.stderr
  assert 'Traceback' not in done.stderr
