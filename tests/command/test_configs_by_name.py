"""Experiments by name, in the checkout and where a wheel puts them."""

import pathlib
import subprocess
import sys

import pytest

from utilized_rank.command import configs

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.quick
def test_names_are_files():
  assert configs.names() == sorted(p.stem for p in ROOT.glob('configs/*.py'))
  path = str(ROOT / 'configs' / 'digits_vit.py')
  assert configs.path_of('digits_vit') == path
  assert configs.path_of('digits_vit:testing') == f'{path}:testing'
  assert configs.path_of(f'{path}:a:b') == f'{path}:a:b'
  for argv in (['--config=digits_vit'], ['--config', 'digits_vit']):
    found = configs.by_path(['x', *argv, '--config.seed=1'])
    assert found == ['x', *('='.join(argv).replace('digits_vit', path),)][
      :1
    ] + ([f'--config={path}'] if len(argv) == 1 else ['--config', path]) + [
      '--config.seed=1'
    ]


def test_an_unknown_name_is_told_what_there_is():
  says = 'no such experiment or file; did you mean digits_vit. Experiments are'
  with pytest.raises(ValueError, match=says) as error:
    configs.path_of('digit_vit:testing')
  assert all(name in str(error.value) for name in configs.names())
  with pytest.raises(ValueError, match='no such experiment or file'):
    configs.path_of('configs/no_such.py')


@pytest.mark.slow
def test_a_wheel_has_them(tmp_path):
  """Built, and used from a folder that has another `configs` in it."""
  pytest.importorskip('setuptools')
  subprocess.run(
    [sys.executable, 'setup.py', '-q', 'build_py', '-d', tmp_path / 'lib'],
    cwd=ROOT,
    check=True,
    capture_output=True,
  )
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / '__init__.py').write_text('')
  code = (
    'import sys, runpy\n'
    'from utilized_rank.command import configs\n'
    "path = configs.by_path(['--config=tfds_vit'])[0].partition('=')[2]\n"
    "print(path, runpy.run_path(path)['get_config']().data.name)\n"
  )
  done = subprocess.run(
    [sys.executable, '-W', 'ignore', '-c', code],
    cwd=tmp_path,
    env={'PYTHONPATH': str(tmp_path / 'lib')},
    capture_output=True,
    text=True,
    check=True,
  )
  where = tmp_path / 'lib/utilized_rank/command/shipped/configs/tfds_vit.py'
  assert done.stdout == f'{where} cifar10\n'
