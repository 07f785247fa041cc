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
  first = Workdir(tmp_path / 'run', {'train': {'steps': 3}, 'seed': 0})
  first.stage('train', lambda: 1)
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


def test_files_that_a_stage_made_are_compared(tmp_path):
  run = Workdir(tmp_path / 'run', {})
  names = ('a.json', 'b.html')
  assert run.changed('report', names) == []  # of a stage that is to come

  def work():
    for name in names:
      run.write_text(name, 'made')

  run.stage('report', work, names)
  assert run.changed('report', names) == []
  run.write_text('a.json', 'mbde')
  assert run.changed('report', names) == ['a.json']
  (tmp_path / 'run' / 'b.html').unlink()
  assert run.changed('report', names) == ['a.json', 'b.html']
  run.forget('report')
  run.stage('report', work)  # as before 0.2.0, without digests
  run.write_text('a.json', 'mbde')
  assert run.changed('report', names) == []


def test_a_damaged_config_is_not_to_be_removed(tmp_path):
  """Without it the folder holds no run."""
  Workdir(tmp_path / 'run', {'seed': 0})
  (tmp_path / 'run' / 'config.json').write_text('{"seed')
  with pytest.raises(ValueError, match=r'damaged .*; give a new --workdir'):
    Workdir(tmp_path / 'run', {'seed': 0})


def test_nothing_half_written_remains(tmp_path):
  run = Workdir(tmp_path / 'run', {})
  run.write('deep/er/file.json', [1, 2])
  assert json.loads((tmp_path / 'run/deep/er/file.json').read_text()) == [1, 2]
  assert not list(tmp_path.rglob('*.tmp'))


STAGES = ('train', 'collect', 'factorize', 'report')
READERS = {'lr': 'train', 'rows': 'collect', 'compress': 'factorize'}


def opened(path, redo=None, lr=1, rows=2, fractions=(0.5,)):
  return Workdir(
    path,
    {'lr': lr, 'rows': rows, 'compress': {'fractions': fractions}},
    stages=STAGES,
    first_reader=lambda key: READERS[key.partition('.')[0]],
    redo=redo,
  )


def finished(path, **config):
  run = opened(path, **config)
  for name in (*STAGES, 'factorize/0.5'):
    run.stage(name, lambda: 1)
  return run


def left(run):
  return [name for name in (*STAGES, 'factorize/0.5') if run.finished(name)]


def test_a_start_before_any_stage_does_not_bind(tmp_path):
  opened(tmp_path / 'run')
  (tmp_path / 'run' / 'train').mkdir()
  (tmp_path / 'run' / 'train' / 'metrics.jsonl').write_text('')
  again = opened(tmp_path / 'run', lr=3)
  assert again.read('config.json')['lr'] == 3
  # Steps that are saved are of a training that someone may want to go on with.
  (tmp_path / 'run' / 'train' / '1000').mkdir()
  with pytest.raises(ValueError, match='or --redo=train: that and what'):
    opened(tmp_path / 'run', lr=1)
  opened(tmp_path / 'run', lr=1, redo='train')
  assert not (tmp_path / 'run' / 'train').exists()


def test_a_start_that_was_cut_short_does_not_block(tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.json.tmp').write_text('{"lr')
  (tmp_path / 'run' / 'process.json').write_text('')
  assert opened(tmp_path / 'run').read('config.json')['lr'] == 1


def test_other_fractions_keep_what_they_share(tmp_path):
  finished(tmp_path / 'run')
  again = opened(tmp_path / 'run', fractions=(0.5, 0.3))
  assert left(again) == ['train', 'collect', 'factorize/0.5']
  assert again.read('config.json')['compress']['fractions'] == [0.5, 0.3]


def test_redo_forgets_a_stage_and_those_after_it(tmp_path):
  run = finished(tmp_path / 'run')
  (tmp_path / 'run' / 'collect').mkdir()
  assert left(opened(tmp_path / 'run', redo='report')) == left(run)[:3] + [
    'factorize/0.5'
  ]
  again = opened(tmp_path / 'run', redo='collect', rows=5)
  assert left(again) == ['train']
  assert not (tmp_path / 'run' / 'collect').exists()
  with pytest.raises(ValueError, match='rows is 5 there and 6 here.*=collect'):
    opened(tmp_path / 'run', redo='factorize', rows=6)
  with pytest.raises(ValueError, match="no stage 'colect'; there are train,"):
    opened(tmp_path / 'run', redo='colect')
