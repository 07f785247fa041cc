"""The notebook runs from top to bottom, shows its plots, and is thin."""

import os
import pathlib

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.slow

NOTEBOOK = pathlib.Path(__file__).parents[2] / 'notebooks' / 'quickstart.ipynb'


@pytest.fixture
def notebook():
  return nbformat.read(NOTEBOOK, as_version=4)


def test_outputs_are_stripped(notebook):
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      assert cell.outputs == []
      assert cell.execution_count is None


def test_runs_and_shows_its_plots(notebook, tmp_path, monkeypatch):
  root = NOTEBOOK.parents[2]
  paths = [str(root), os.environ.get('PYTHONPATH', '')]
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, paths)))
  monkeypatch.setenv('QUICK', '1')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
  client = nbclient.NotebookClient(
    notebook, timeout=300, resources={'metadata': {'path': str(tmp_path)}}
  )
  client.execute()

  shown, printed = [], ''
  for cell in notebook.cells:
    for output in cell.get('outputs', []):
      shown += list(output.get('data', {}))
      if output.get('name') == 'stdout':
        printed += output['text']
  assert shown.count('image/png') == 2
  assert 'mean layer utilization' in printed
  assert '50% of block kernels' in printed
