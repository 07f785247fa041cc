"""`measure` and `compress` of a directory of Hugging Face."""

import llamas
import numpy as np
import pytest
from test_commands import called

import utilized_rank as ur
from utilized_rank.command import compress
from utilized_rank.command import measure
from utilized_rank.models.importing import load_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def directory(tmp_path):
  llamas.write(tmp_path / 'llama', depth=2, shards=2)
  tokens = np.random.default_rng(0).integers(0, 19, (40, 12))
  np.save(tmp_path / 'x.npy', tokens)
  return tmp_path


def test_a_directory_is_measured(directory, capsys):
  out = directory / 'report.json'
  called(
    measure,
    directory / 'llama',
    f'--inputs={directory}/x.npy',
    '--select=.*query/kernel',
    f'--out={out}',
  )
  assert f'report: {out}' in capsys.readouterr().out
  assert len(ur.Report.load(out)) == 2
  assert not (directory / 'report.json.partial').exists()


def test_a_directory_is_compressed(directory, capsys):
  out = directory / 'small'
  arguments = (
    directory / 'llama', f'--inputs={directory}/x.npy', f'--out={out}',
  )  # fmt: skip
  called(compress, *arguments, '--params=0.7')
  shown = capsys.readouterr()
  assert f'load_checkpoint({str(out)!r})' in shown.out
  for said in ('2 blocks', 'time', 'memory', 'disk'):
    assert said in shown.err
  _, small, _ = load_checkpoint(str(out))
  _, dense, _ = load_checkpoint(str(directory / 'llama'))
  assert ur.count_params(small) < ur.count_params(dense)
  with pytest.raises(SystemExit, match='it is there already'):
    called(compress, *arguments, '--params=0.7')


def test_what_a_directory_cannot_have(directory):
  llama, out = directory / 'llama', f'--out={directory}/small'
  inputs = f'--inputs={directory}/x.npy'
  with pytest.raises(SystemExit, match='give --params'):
    called(compress, llama, out, inputs, '--flops=0.5')
  with pytest.raises(SystemExit, match='give --inputs=FILE, .npy'):
    called(compress, llama, out, '--params=0.5')
  with pytest.raises(SystemExit, match='--option=hats=2'):
    called(compress, llama, out, inputs, '--params=0.5', '--option=hats=2')
