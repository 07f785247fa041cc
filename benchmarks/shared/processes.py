"""Measurements in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def printed(*words: str) -> Any:
  """What Python prints last, read as JSON, when run with these words.

  Raises:
    subprocess.CalledProcessError: it failed; it has said why.

  >>> printed('-c', 'print("made"); print([1, 2])')
  [1, 2]
  """
  done = subprocess.run(
    [sys.executable, *words], stdout=subprocess.PIPE, text=True, check=True
  )
  return json.loads(done.stdout.splitlines()[-1])
