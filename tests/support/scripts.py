"""The scripts of docs/from_training_to_serving.md, run as a newcomer would."""

import pathlib
import re
import runpy
import subprocess
import sys
from unittest import mock

import numpy as np

import utilized_rank as ur

PAGE = pathlib.Path(__file__).parents[2] / 'docs/from_training_to_serving.md'
ALONE = "import sys\nsys.modules['utilized_rank'] = None  # no import of it\n"


def _script(name: str) -> str:
  """The block of the page that begins with this file's name."""
  found = re.search(
    rf'^```python\n(# {name}\n.*?)^```$', PAGE.read_text('utf-8'), re.M | re.S
  )
  assert found is not None, name
  return found[1]


def assert_leads_from_training_to_serving(
  framework: str, folder: pathlib.Path
) -> None:
  """Trains here, exports in a second process, serves in a third one.

  What the third gives is compared with `low_rank(fn)` of the tree before it was
  saved. The folder is the working directory.
  """
  path = folder / f'with_{framework}.py'
  path.write_text(_script(path.name))
  assert len([v for v in path.read_text().splitlines() if v.strip()]) <= 40
  names = runpy.run_path(str(path))
  with mock.patch.object(ur, 'save', wraps=ur.save) as save:
    names['train']()
  tuned = save.call_args.args[1]

  x = np.random.default_rng(1).normal(size=(64, 16)).astype(np.float32)
  np.save(folder / 'x.npy', x)
  (folder / 'serve.py').write_text(ALONE + _script('serve.py'))
  for command in ([path.name, 'export'], ['serve.py']):
    subprocess.run(
      [sys.executable, '-W', 'ignore', *command],
      cwd=folder, check=True, timeout=300,
    )  # fmt: skip
  got = np.load(folder / 'y.npz')
  for i, n in enumerate((1, 7, 64)):
    want = ur.low_rank(names['fn'])(tuned, {'x': x[:n]})
    # The same products in float32, compiled for another number of rows.
    np.testing.assert_allclose(got[f'arr_{i}'], want, rtol=1e-6, atol=1e-6)
