"""How benchmarks write down what they found."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

import jax

RESULTS = pathlib.Path(__file__).parent / 'results'


def write(path: Any, command: str, result: dict[str, Any]) -> None:
  """Writes a result with its command, date, machine and versions."""
  names = ('jax', 'jaxlib', 'flax', 'numpy')
  head = {
    'command': command,
    'date': datetime.date.today().isoformat(),
    'machine': f'{os.cpu_count()} cores, {platform.machine()}, '
    f'{jax.devices()[0].device_kind}',
    'versions': {name: importlib.metadata.version(name) for name in names},
  }
  text = json.dumps({**head, **result}, indent=1)
  pathlib.Path(path).write_text(text + '\n', encoding='utf-8')
