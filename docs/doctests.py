"""Docstrings as the site has them: `>>>` examples become blocks of code."""

import re
from typing import Any

import griffe

# From a prompt to the next empty line.
_EXAMPLE = re.compile(r'^>>> .*?(?=\n\s*\n|\Z)', re.MULTILINE | re.DOTALL)


def _fenced(match: re.Match[str]) -> str:
  return f'```pycon\n{match[0]}\n```'


class Doctests(griffe.Extension):
  """Fences the examples of every docstring that is read."""

  def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
    if obj.docstring is not None:
      obj.docstring.value = _EXAMPLE.sub(_fenced, obj.docstring.value)
