"""Warnings that point at the caller's own line."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings

import jax

# Frames of this library, and of what calls back into it in between. (From
# Python 3.12 on, `warnings.warn` takes such as `skip_file_prefixes`.)
_WITHIN = (
  os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
  os.path.dirname(os.path.abspath(jax.__file__)) + os.sep,
  contextlib.__file__,
)


def warn(message: str) -> None:
  """A UserWarning at the nearest line outside of this library.

  However deep in the library it is found, the caller is who can act on it, and
  Python shows a warning once for each line that it is said to come from.

  Args:
    message: what is wrong, and what to do about it.

  >>> import warnings
  >>> with warnings.catch_warnings(record=True) as seen:
  ...   warnings.simplefilter('always')
  ...   warn('few rows')
  >>> str(seen[0].message), seen[0].filename.endswith('warning.py')
  ('few rows', False)
  """
  level, frame = 1, sys._getframe()
  while frame.f_back and frame.f_code.co_filename.startswith(_WITHIN):
    level, frame = level + 1, frame.f_back
  warnings.warn(message, stacklevel=level)
