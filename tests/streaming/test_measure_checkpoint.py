"""A checkpoint measured block by block, against the same in memory."""

import llamas
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.models.importing import load_checkpoint
from utilized_rank.streaming import ledger

# Rows are few here.
pytestmark = pytest.mark.filterwarnings('ignore:.* rows for')

SELECT = [(r'params/block_\d+/.*kernel', True), ('.*', False)]


def tokens():
  rng = np.random.default_rng(1)
  return [rng.integers(0, 19, (4, 12)) for _ in range(4)]


def test_it_is_what_it_would_be_in_memory(tmp_path, monkeypatch):
  folder, work = tmp_path / 'in', tmp_path / 'work'
  llamas.write(folder)
  model, params, _ = load_checkpoint(str(folder))
  moments = ur.collect(
    model.apply, params, tokens(), select=SELECT, progress=False
  )
  expected = ur.measure(params, moments, energy=0.9, progress=False)

  class Stop(Exception):
    pass

  finish = ledger.Ledger.finish

  def stopped(self, phase, count):
    if count == 3:
      raise Stop
    finish(self, phase, count)

  run = lambda: ur.measure_checkpoint(
    folder, tokens(), energy=0.9, work_dir=work, progress=False
  )
  monkeypatch.setattr(ledger.Ledger, 'finish', stopped)
  with pytest.raises(Stop):
    run()
  monkeypatch.setattr(ledger.Ledger, 'finish', finish)
  report = run()
  assert not work.exists()
  assert list(report) == list(expected)
  assert report.coverage.kernels == expected.coverage.kernels
  assert report.coverage.total == expected.coverage.total
  for name, layer in expected.items():
    found = report[name]
    assert (found.k_in, found.k_out, found.count) == (
      layer.k_in, layer.k_out, layer.count,
    )  # fmt: skip
    # Sums of float32 over 192 rows, on one device in place of four.
    np.testing.assert_allclose(
      found.spectrum_out, layer.spectrum_out, atol=1e-5 * layer.spectrum_out[0]
    )
    assert found.error_projected is None
  assert 'block_0/query' in str(report)


@pytest.mark.quick
def test_without_a_folder_it_leaves_nothing(tmp_path, monkeypatch):
  folder = tmp_path / 'in'
  llamas.write(folder, depth=1)
  monkeypatch.setenv('TMPDIR', str(tmp_path))
  monkeypatch.setattr('tempfile.tempdir', None)
  report = ur.measure_checkpoint(folder, tokens(), progress=False)
  assert len(report) == 7
  assert [p.name for p in tmp_path.iterdir()] == ['in']
