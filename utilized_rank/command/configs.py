"""Experiments by name: `digits_vit` is `configs/digits_vit.py`.

An installation from a wheel has them in this room (`setup.py`), a checkout
beside the package.
"""

from __future__ import annotations

from collections.abc import Sequence
import difflib
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
_FLAG = '--config'


def root() -> str:
  """The folder that `configs/` is in."""
  shipped = os.path.join(_HERE, 'shipped')
  if os.path.isdir(shipped):
    return shipped
  return os.path.dirname(os.path.dirname(_HERE))


def names() -> list[str]:
  """The experiments there are.

  >>> 'digits_vit' in names()
  True
  """
  files = os.listdir(os.path.join(root(), 'configs'))
  return sorted(n[:-3] for n in files if n.endswith('.py') and n[0] != '_')


def path_of(value: str) -> str:
  """The file that a value of `--config` names, its argument behind it.

  Args:
    value: a name or a path, and `:argument` if there is one.

  Raises:
    ValueError: there is no such experiment, or file.

  >>> path_of('digits_vit:testing').endswith('configs/digits_vit.py:testing')
  True
  """
  name, colon, argument = value.partition(':')
  if name.endswith('.py') and os.path.isfile(name):
    return value
  known = names()
  if name not in known:
    close = difflib.get_close_matches(name, known, 1)
    hint = f'; did you mean {close[0]}?' if close else ''
    raise ValueError(
      f'--config={value}: no such experiment or file{hint} Experiments are '
      f'{", ".join(known)}'
    )
  return os.path.join(root(), 'configs', f'{name}.py') + colon + argument


def by_path(argv: Sequence[str]) -> list[str]:
  """The command line with the path in place of an experiment's name.

  Experiments import each other as `configs.NAME`: ours are found first then.
  """
  out = list(argv)
  for at, argument in enumerate(out):
    if argument.startswith(f'{_FLAG}='):
      out[at] = f'{_FLAG}={path_of(argument.partition("=")[2])}'
    elif argument == _FLAG and at + 1 < len(out):
      out[at + 1] = path_of(out[at + 1])
    else:
      continue
    if out[at : at + 2] != list(argv[at : at + 2]) and root() not in sys.path:
      sys.path.insert(0, root())
  return out
