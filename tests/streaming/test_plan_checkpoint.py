"""What a plan says beside what the work takes."""

import os

import llamas
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.streaming import ledger
from utilized_rank.streaming import plan_checkpoint as module

pytestmark = [
  pytest.mark.slow,
  # Rows are few here.
  pytest.mark.filterwarnings('ignore:.* rows for'),
]


def tokens(count=2):
  rng = np.random.default_rng(1)
  return [rng.integers(0, 19, (4, 12)) for _ in range(count)]


def test_a_plan_knows_the_disk(tmp_path, monkeypatch):
  folder, out = tmp_path / 'in', tmp_path / 'out'
  llamas.write(folder, dtype=llamas.BFLOAT16, width=32, mlp_dim=64)
  plan = ur.plan_checkpoint(folder, tokens(), params_fraction=0.7)
  most = [0]
  finish = ledger.Ledger.finish

  def look(self, phase, count):
    between = (tmp_path / 'out.partial/between').rglob('*.safetensors')
    most[0] = max(most[0], sum(f.stat().st_size for f in between))
    finish(self, phase, count)

  monkeypatch.setattr(ledger.Ledger, 'finish', look)
  ur.compress_checkpoint(
    folder, out, tokens(), params_fraction=0.7, progress=False
  )
  # Two runs, the values behind a block and before it, of 2 x 48 tokens.
  assert plan.work_bytes == 2 * 2 * 2 * 48 * 32 * 4
  headers = 8 * 100  # of eight files
  assert plan.work_bytes <= most[0] <= plan.work_bytes + headers
  written = sum(os.path.getsize(f) for f in out.glob('*.safetensors'))
  # Ranks are whole, headers name twice as many tensors.
  assert 0.9 * plan.out_bytes < written < 1.1 * plan.out_bytes


def test_a_plan_grows_with_the_work(tmp_path, monkeypatch):
  rates = module._Rates(1e-9, 1e-9, 1e-8)
  monkeypatch.setattr(module._Rates, 'tried', lambda: rates)
  llamas.write(tmp_path / 'small')
  llamas.write(tmp_path / 'deep', depth=6)
  of = lambda name, **options: ur.plan_checkpoint(
    tmp_path / name, tokens(), params_fraction=0.7, **options
  )
  small, deep = of('small'), of('deep')
  assert (small.blocks, deep.blocks) == (3, 6)
  # Of a block: q, k, v and out, 16 x (16 + 8 + 8 + 16); MLP, 3 x 16 x 24.
  block = 16 * 48 + 3 * 16 * 24
  assert small.kernels == 3 * block
  assert small.parameters == 3 * (block + 32) + 16 + 2 * 19 * 16
  # The last one has the last norm, which is as large as what it norms.
  assert small.largest == deep.largest == 4 * (block + 32 + 16)
  for kind in ('forward', 'moments', 'decompositions'):
    assert deep.seconds[kind] == pytest.approx(2 * small.seconds[kind])
  fewer = of('small', uniform=True, anchored=False)
  assert set(fewer.memory) < set(small.memory) | set(fewer.memory)
  assert 'fits' in small.memory and 'fits' not in fewer.memory
  assert fewer.work_bytes == small.work_bytes / 2
  text = str(small)
  assert text.startswith('3 blocks, 6,')
  assert [line.split()[0] for line in text.splitlines()[1:]] == [
    'time', 'memory', 'disk',
  ]  # fmt: skip
