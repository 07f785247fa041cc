"""Type checkers read the package's annotations: a user's code, checked."""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
CODE = """\
import jax
import utilized_rank as ur


def fn(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
  return x @ params['w']


def main(params: dict[str, jax.Array], x: jax.Array) -> float:
  moments = ur.collect(fn, params, [x])
  report = ur.measure(params, moments)
  small, _ = ur.compress(fn, params, [x], params_fraction=0.5)
  ur.low_rank(fn)(small, x)
  return report.mean_layer_utilization
"""


def checked(folder, code):
  (folder / 'user.py').write_text(code)
  return subprocess.run(
    [sys.executable, '-m', 'mypy', '--strict', '--follow-imports=silent']
    + ['user.py'],
    cwd=folder,
    env={**os.environ, 'MYPYPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  ).stdout


def test_a_users_code_is_checked(tmp_path):
  assert 'Success' in checked(tmp_path, CODE)
  wrong = checked(tmp_path, CODE.replace('-> float:', '-> str:'))
  assert 'got "float", expected "str"' in wrong
