"""The notebooks run from top to bottom, show their plots, and are thin."""

import os
import pathlib

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
# Name: pictures, and what is printed or is a cell's value.
SHOWN = {
  'quickstart': (2, ['mean layer utilization', '50% of block kernels']),
  'inspect_a_checkpoint': (2, ['mean layer utilization', 'MLP of Flax']),
  'compress_and_finetune': (0, ['mean layer utilization', ' of 360']),
}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
  return request.param


def test_outputs_are_stripped(path):
  for cell in nbformat.read(path, as_version=4).cells:
    if cell.cell_type == 'code':
      assert cell.outputs == []
      assert cell.execution_count is None


def test_runs_and_shows_its_plots(path, tmp_path, monkeypatch):
  paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, paths)))
  monkeypatch.setenv('QUICK', '1')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook, timeout=600, resources={'metadata': {'path': str(tmp_path)}}
  )
  client.execute()

  shown, printed = [], ''
  for cell in notebook.cells:
    for output in cell.get('outputs', []):
      data = output.get('data', {})
      shown += list(data)
      printed += output.get('text', '') + data.get('text/plain', '')
  pictures, texts = SHOWN[path.stem]
  assert shown.count('image/png') == pictures
  assert all(text in printed for text in texts)
