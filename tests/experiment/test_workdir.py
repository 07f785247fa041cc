"""A run's directory: whole files, finished stages, one config."""

import json

import pytest

from utilized_rank.experiment.workdir import Workdir


def test_stages_run_once_and_keep_their_results(tmp_path):
  calls = []

  def work():
    calls.append(1)
    return {'value': 3}

  for _ in range(2):
    run = Workdir(tmp_path / 'run', {'a': (1, 2)})
    assert run.stage('train', work) == {'value': 3}
  assert calls == [1]
  assert list(run.seconds()) == ['train']


def test_a_stage_that_fails_leaves_no_mark(tmp_path):
  run = Workdir(tmp_path / 'run', {})

  def fail():
    raise RuntimeError('no')

  with pytest.raises(RuntimeError):
    run.stage('train', fail)
  assert run.stage('train', lambda: 1) == 1


def test_a_workdir_of_another_config_names_the_difference(tmp_path):
  Workdir(tmp_path / 'run', {'train': {'steps': 3}, 'seed': 0})
  with pytest.raises(ValueError) as error:
    Workdir(tmp_path / 'run', {'train': {'steps': 4}, 'seed': 0})
  assert 'train.steps is 3 there and 4 here' in str(error.value)
  with pytest.raises(ValueError, match=r"model is '\(absent\)' there"):
    Workdir(tmp_path / 'run', {'train': {'steps': 3}, 'seed': 0, 'model': 1})


def test_a_directory_that_is_no_run_is_left_alone(tmp_path):
  (tmp_path / 'thesis.tex').write_text('...')
  with pytest.raises(ValueError, match='not empty and holds no run'):
    Workdir(tmp_path, {})
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


def test_damaged_results_are_named(tmp_path):
  run = Workdir(tmp_path / 'run', {})
  run.stage('train', lambda: 1)
  path = tmp_path / 'run' / 'stages' / 'train.json'
  path.write_text(path.read_text()[:5])
  with pytest.raises(ValueError, match=r'stages/train.json.* is damaged'):
    run.stage('train', lambda: 1)


def test_nothing_half_written_remains(tmp_path):
  run = Workdir(tmp_path / 'run', {})
  run.write('deep/er/file.json', [1, 2])
  assert json.loads((tmp_path / 'run/deep/er/file.json').read_text()) == [1, 2]
  assert not list(tmp_path.rglob('*.tmp'))
