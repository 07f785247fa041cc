"""What the commands take, print and write, in this process."""

import pathlib
import re
import sys

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_vit
import utilized_rank as ur
from utilized_rank.command import compress
from utilized_rank.command import main
from utilized_rank.command import measure
from utilized_rank.command import run
from utilized_rank.command import subject
from utilized_rank.experiment import pipeline
from utilized_rank.models.mlp import MLP
from utilized_rank.tree import paths


def called(command, *argv):
  """Runs a command as `utilized-rank` does, on flags of its own."""
  values = flags.FlagValues()
  command.define(values)
  command.main(values(['utilized-rank', *map(str, argv)]), values)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """A file of weights, and inputs that use 3 of 8 directions."""
  folder = tmp_path_factory.mktemp('weights')
  variables = MLP((16, 4)).init(jax.random.key(0), jnp.zeros((1, 8)))
  np.savez(folder / 'mlp.npz', **paths.flatten(variables['params'])[0])
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(200, 3)) @ rng.normal(size=(3, 8))
  np.save(folder / 'x.npy', inputs.astype(np.float32))
  return folder


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The folder of a run whose first stage alone is finished."""
  folder = tmp_path_factory.mktemp('run')
  config = digits_vit.get_config('testing')
  job = pipeline.Job(config, folder / 'run')
  image = jnp.zeros((1, 8, 8, 1))
  params = jax.jit(job.model.init)(jax.random.key(0), image)
  ur.save(folder / 'run' / 'dense', params)
  return folder / 'run'


@pytest.mark.quick
def test_a_file_of_weights_is_measured(weights, tmp_path, capsys):
  out = tmp_path / 'report.json'
  called(
    measure,
    weights / 'mlp.npz',
    f'--inputs={weights}/x.npy',
    '--option=activation=relu',
    f'--out={out}',
  )
  shown = capsys.readouterr().out
  assert f'report: {out}' in shown
  report = ur.Report.load(out)
  assert report['params/Dense_0/kernel'].k_in <= 3
  assert len(report) == 2


def test_a_file_of_weights_is_compressed(weights, tmp_path, capsys):
  out = tmp_path / 'small'
  arguments = (
    weights / 'mlp.npz',
    f'--inputs={weights}/x.npy',
    '--params=0.6',
    '--select=.*Dense_0/kernel',
    '--assume',
    f'--out={out}',
  )
  called(compress, *arguments)
  assert f"small = utilized_rank.load('{out}/params')" in (
    capsys.readouterr().out
  )
  small = ur.load(out / 'params')
  kernel = small['params']['Dense_0']['kernel']
  assert ur.count_params(kernel) <= 0.6 * 8 * 16
  recipe = ur.Recipe.load(out / 'recipe.json')
  assert list(recipe.ranks) == ['params/Dense_0/kernel']
  x = np.load(weights / 'x.npy')
  model = MLP((16, 4))
  opened = subject.open_subject(
    *map(str, (arguments[0], weights / 'x.npy')),
    facts=subject.Facts(assume=True),
  )
  dense = model.apply(opened.params, x)
  # Three directions are all that the inputs have: rank 3 loses rounding alone.
  np.testing.assert_allclose(
    ur.low_rank(model.apply)(small, x), dense, atol=1e-4
  )
  with pytest.raises(SystemExit, match='error: --out=.*: it is there already'):
    called(compress, *arguments)


def test_images_are_brought_to_what_the_model_takes(tmp_path):
  images = np.full((70, 9, 9, 3), 255, np.uint8)
  np.savez(tmp_path / 'images.npz', image=images)
  batches = subject._images(str(tmp_path / 'images.npz'), None, (6, 6, 3))
  for _ in range(2):
    found = list(batches())
    assert [len(b) for b in found] == [64, 6]
    np.testing.assert_array_equal(found[0], np.ones((64, 6, 6, 3), np.float32))


@pytest.mark.slow
def test_a_run_is_measured_and_compressed_as_its_config_says(
  trained, tmp_path, capsys
):
  called(measure, trained, f'--out={tmp_path}/page.html')
  shown = capsys.readouterr().out
  assert len(re.findall('encoderblock_', shown)) >= 2
  assert (tmp_path / 'page.html').read_text().startswith('<!doctype html>')
  called(compress, trained, '--params=0.5', f'--out={tmp_path}/small')
  capsys.readouterr()
  small = ur.load(tmp_path / 'small' / 'params')
  kept = ur.count_params(small) / ur.count_params(ur.load(trained / 'dense'))
  assert kept < 0.75  # the embeddings stay


@pytest.mark.parametrize(
  'argv, says',
  [
    (['no/such'], "no file or folder 'no/such'"),
    (['{mlp}'], 'is a file of weights: give --inputs=FILE'),
    (
      ['{mlp}', '--inputs={wide}', '--assume'],
      r'holds \[5, 3, 3\]; the model takes',
    ),
    (
      ['{mlp}', '--inputs={wide}'],
      'Give activation= .*: --option=NAME=VALUE, .*--assume',
    ),
    (
      ['{mlp}', '--inputs={wide}', '--option=activation'],
      '--option=activation: NAME=VALUE is wanted',
    ),
    (
      ['{mlp}', '--inputs={wide}', '--option=activation=relu', '--option=z=1'],
      '--option=activation=relu z=1: .*z',
    ),
    (
      ['{mlp}', '--inputs={wide}', '--architecture=no_such'],
      'no_such',
    ),
    (
      ['{mlp}', '--inputs={wide}', '--model_config=no/config.json'],
      'no/config.json',
    ),
    (['{folder}', '--assume'], "--assume: a run's folder"),
    (['{folder}', '--option=heads=2'], "--option=heads=2: a run's folder"),
    (['{folder}'], 'is no run with a network in it'),
    (['{folder}', '--inputs=x.npy'], "--inputs=x.npy: a run's folder"),
    (['{mlp}', '--out=report.txt'], '--out=report.txt: a file .html or .json'),
  ],
)
def test_what_is_no_subject_is_an_error_of_one_line(
  weights, tmp_path, argv, says
):
  np.save(tmp_path / 'wide.npy', np.zeros((5, 3, 3)))
  names = {
    'mlp': weights / 'mlp.npz',
    'folder': tmp_path,
    'wide': tmp_path / 'wide.npy',
  }
  with pytest.raises(SystemExit, match=f'^error: .*{says}') as error:
    called(measure, *(a.format(**names) for a in argv))
  assert '\n' not in str(error.value)


def test_the_command_says_what_there_is(monkeypatch, capsys):
  for argv in ([], ['--help']):
    monkeypatch.setattr(sys, 'argv', ['utilized-rank', *argv])
    main.main()
    assert capsys.readouterr().out == main.usage() + '\n'
  monkeypatch.setattr(sys, 'argv', ['utilized-rank', '--version'])
  main.main()
  assert capsys.readouterr().out == ur.__version__ + '\n'
  monkeypatch.setattr(sys, 'argv', ['utilized-rank', 'mesure'])
  with pytest.raises(SystemExit, match="error: no command 'mesure'\nusage"):
    main.main()


# ml_collections, when it loads the file.
@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
def test_a_run_is_given_its_flags(monkeypatch, tmp_path):
  calls = []
  monkeypatch.setattr(
    pipeline, 'run', lambda *a, **k: calls.append((*a, k['redo']))
  )
  values = flags.FlagValues()
  argv = [
    'utilized-rank run',
    '--config=digits_vit:testing',
    '--config.seed=3',
    f'--workdir={tmp_path}',
    '--redo=measure',
  ]
  monkeypatch.setattr(sys, 'argv', run.configs.by_path(argv))
  run.define(values)
  run.main(values(sys.argv), values)
  ((config, workdir, redo),) = calls
  assert (config.seed, config.train.steps) == (3, 6)
  assert (workdir, redo) == (str(tmp_path), 'measure')
  assert pathlib.Path(sys.argv[1]).name == 'digits_vit.py:testing'


def test_words_that_no_command_takes(tmp_path):
  with pytest.raises(app.UsageError, match=r"unexpected arguments \['more'\]"):
    run.main(['utilized-rank run', 'more'], flags.FlagValues())
  for argv in (['measure'], ['measure', 'one', 'two']):
    with pytest.raises(app.UsageError, match='one CHECKPOINT is wanted, got'):
      subject.checkpoint_of(argv)


def test_a_key_that_the_config_has_not(monkeypatch, tmp_path):
  argv = [
    'run',
    '--config=digits_vit:testing',
    f'--workdir={tmp_path}',
    '--config.train.stepz=3',
  ]
  monkeypatch.setattr(sys, 'argv', argv)
  refuse = AttributeError("'stepz'")
  monkeypatch.setattr(app, 'parse_flags_with_usage', _raising(refuse))
  with pytest.raises(SystemExit, match="no key 'stepz', given as .*stepz=3"):
    run.parse(argv)


def test_a_command_whose_packages_are_missing(monkeypatch):
  error = ModuleNotFoundError("x is not installed: pip install '.[all]'")
  monkeypatch.setattr(main.importlib, 'import_module', _raising(error))
  monkeypatch.setattr(sys, 'argv', ['utilized-rank', 'measure'])
  with pytest.raises(SystemExit, match='^error: x is not installed'):
    main.main()


def _raising(error):
  def fail(*args, **kwargs):
    raise error

  return fail
