"""Checkpoints cut block by block, against the same in memory."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import types

import jax
import llamas
import numpy as np
import pytest
from safetensors.numpy import load_file

import utilized_rank as ur
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.models.importing import load_checkpoint
from utilized_rank.streaming import sweep
from utilized_rank.tree import paths

pytestmark = [
  pytest.mark.slow,
  # Rows are few here.
  pytest.mark.filterwarnings('ignore:.* rows for'),
]

SELECT = [(r'params/block_\d+/.*kernel', True), ('.*', False)]
QUIET = {'progress': False}


def tokens(count=4, seed=1):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 19, (4, 12)) for _ in range(count)]


def block_of(path):
  return path.split('/')[1]


def in_memory(folder, batches, fraction, anchored, compensate_mean):
  """The tree that collect, budget_ranks and factorize or anchor make."""
  model, params, _ = load_checkpoint(str(folder))
  fn = model.apply
  moments = ur.collect(fn, params, batches, select=SELECT, **QUIET)
  ranks = ur.budget_ranks(
    params,
    moments,
    params_fraction=fraction,
    compensate_mean=compensate_mean,
    **QUIET,
  )
  mean = {'compensate_mean': compensate_mean, **QUIET}
  if not anchored:
    return ranks, ur.factorize(params, moments, ranks, **mean)
  return ranks, ur.anchor(
    fn, params, batches, ranks, group=block_of, moments=moments, **mean
  )


def assert_trees_agree(found, expected, tolerance):
  found, _ = paths.flatten(found, is_low_rank)
  expected, _ = paths.flatten(expected, is_low_rank)
  assert set(found) == set(expected)
  for path, leaf in expected.items():
    assert is_low_rank(found[path]) == is_low_rank(leaf), path
    pairs = [(found[path], leaf)]
    if is_low_rank(leaf):
      # Factors of a pair may differ in signs; their product may not.
      assert found[path].rank == leaf.rank
      pairs = [(found[path].dense(), leaf.dense())]
      assert (found[path].c is None) == (leaf.c is None)
      if leaf.c is not None:
        pairs.append((found[path].c, leaf.c))
    for one, other in pairs:
      one, other = np.asarray(one), np.asarray(other)
      assert one.shape == other.shape, path
      np.testing.assert_allclose(
        one, other, rtol=0, atol=tolerance * np.abs(other).max(), err_msg=path
      )


@pytest.mark.parametrize('anchored', [False, True])
def test_it_is_what_it_would_be_in_memory(tmp_path, anchored):
  folder, out = tmp_path / 'in', tmp_path / 'out'
  llamas.write(folder, shards=3)
  batches = tokens()
  recipe = ur.compress_checkpoint(
    folder, out, batches, params_fraction=0.7, anchored=anchored, **QUIET
  )
  ranks, small = in_memory(folder, batches, 0.7, anchored, False)
  assert recipe.ranks == ranks
  model, variables, _ = load_checkpoint(str(out))
  # Sums of float32 over 192 rows, on one device in place of four.
  assert_trees_agree(variables, small, 1e-5)
  tensors = {}
  for file in out.glob('*.safetensors'):
    tensors |= load_file(file)
  name = 'model.layers.1.self_attn.q_proj'
  a, b = tensors[f'{name}.0.weight'], tensors[f'{name}.1.weight']
  query = small['params']['block_1']['query']['kernel'].dense()
  # As PyTorch has it, (outputs, inputs); heads are side by side.
  expected = np.asarray(query).reshape(16, 16).T
  np.testing.assert_allclose(b @ a, expected, atol=1e-5)
  apply = jax.jit(ur.low_rank(model.apply))
  np.testing.assert_allclose(
    apply(variables, batches[0]), apply(small, batches[0]), atol=1e-4
  )
  assert not (tmp_path / 'out.partial').exists()


def test_uniform_ranks_take_one_run(tmp_path, monkeypatch):
  folder, out = tmp_path / 'in', tmp_path / 'out'
  llamas.write(folder)
  recipe = ur.compress_checkpoint(
    folder, out, tokens(), params_fraction=0.75, uniform=True, **QUIET
  )
  # 16 x 16, 16 x 8 and 16 x 24 to 3/4 of their numbers.
  assert set(recipe.ranks.values()) == {6, 4, 7}
  assert len(recipe.ranks) == 21


def files_of(folder):
  return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


JOB = """
import os, signal, sys, warnings
import numpy as np
warnings.simplefilter('ignore')
import utilized_rank as ur
from utilized_rank.streaming import ledger

folder, out, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
rng = np.random.default_rng(1)
batches = [rng.integers(0, 19, (4, 12)) for _ in range(4)]
finish, count = ledger.Ledger.finish, [0]

def counted(self, phase, number):
  count[0] += 1
  if count[0] == kill_at:  # all is written but this
    os.kill(os.getpid(), signal.SIGKILL)
  finish(self, phase, number)

ledger.Ledger.finish = counted
ur.compress_checkpoint(
  folder, out, batches, params_fraction=0.7, progress=False)
"""


def test_a_killed_job_goes_on_to_the_same_bytes(tmp_path):
  folder = tmp_path / 'in'
  llamas.write(folder, shards=2)
  ur.compress_checkpoint(
    folder, tmp_path / 'whole', tokens(), params_fraction=0.7, **QUIET
  )
  out = tmp_path / 'out'
  job = [sys.executable, '-c', JOB, folder, out]
  # In the first run, and in the second after the rest of the first.
  for kill_at in ('3', '5'):
    killed = subprocess.run([*job, kill_at], timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
  ledger = json.loads((tmp_path / 'out.partial/ledger.json').read_text())
  assert ledger['done'] == {'measure': 5, 'fit': 1}
  options = {'params_fraction': 0.7, **QUIET}
  with pytest.raises(ValueError, match='anchored=True; this run has False'):
    ur.compress_checkpoint(folder, out, tokens(), anchored=False, **options)
  with pytest.raises(ValueError, match='begun with batches='):
    ur.compress_checkpoint(folder, out, tokens(seed=2), **options)
  ur.compress_checkpoint(folder, out, tokens(), **options)
  assert files_of(out) == files_of(tmp_path / 'whole')


def test_what_is_on_disk(tmp_path):
  folder, out = tmp_path / 'in', tmp_path / 'out'
  llamas.write(folder, dtype=llamas.BFLOAT16)
  (folder / 'LICENSE').write_text('free')
  (folder / 'notes.bin').write_bytes(b'')
  recipe = ur.compress_checkpoint(
    folder, out, tokens(), params_fraction=0.7, **QUIET
  )
  for name in ('config.json', 'tokenizer.json', 'LICENSE'):
    assert (out / name).read_bytes() == (folder / name).read_bytes()
  assert not (out / 'notes.bin').exists()
  index = json.loads((out / 'model.safetensors.index.json').read_text())
  tensors = {}
  for file in sorted(set(index['weight_map'].values())):
    found = load_file(out / file)
    assert {index['weight_map'][name] for name in found} == {file}
    tensors |= found
  assert {x.dtype for x in tensors.values()} == {np.dtype(llamas.BFLOAT16)}
  before = load_file(folder / 'model.safetensors')
  for name in before:
    stem = name.removesuffix('.weight')
    if name in tensors:
      np.testing.assert_array_equal(tensors[name], before[name])
      continue
    a, b = tensors[f'{stem}.0.weight'], tensors[f'{stem}.1.weight']
    assert (b.shape[0], a.shape[1]) == before[name].shape
    assert a.shape[0] == b.shape[1]
  pairs = [n for n in tensors if n.endswith('.0.weight')]
  assert len(pairs) == len(recipe.ranks)
  made = index['metadata']['utilized_rank']['recipe']
  assert made == json.loads(json.dumps(recipe.json()))
  size = sum(x.nbytes for x in tensors.values())
  assert index['metadata']['total_size'] == size


def with_biases(folder):
  """Qwen 2: q, k and v have biases."""
  config, tensors = llamas.state()
  config |= {'model_type': 'qwen2'}
  rng = np.random.default_rng(5)
  for name in list(tensors):
    if re.search(r'\.[qkv]_proj\.weight', name):
      bias = rng.normal(size=len(tensors[name])).astype(np.float32)
      tensors[name.replace('.weight', '.bias')] = bias
  llamas.write_state(folder, config, tensors)


def with_fused(folder):
  """Phi-3: q, k and v side by side, gate and up too."""
  config, tensors = llamas.state()
  config |= {'model_type': 'phi3'}
  for i in range(3):
    block = f'model.layers.{i}.'
    for new, parts in (
      ('self_attn.qkv_proj', [f'self_attn.{x}_proj' for x in 'qkv']),
      ('mlp.gate_up_proj', ['mlp.gate_proj', 'mlp.up_proj']),
    ):
      pieces = [tensors.pop(f'{block}{part}.weight') for part in parts]
      tensors[f'{block}{new}.weight'] = np.concatenate(pieces)
  llamas.write_state(folder, config, tensors)


def gpt2(folder):
  """GPT-2: layers that are (inputs, outputs), all with biases."""
  rng = np.random.default_rng(6)
  draw = lambda *shape: rng.normal(scale=0.3, size=shape).astype(np.float32)
  width, mlp = 16, 24
  tensors = {
    'transformer.wte.weight': draw(19, width),
    'transformer.wpe.weight': draw(16, width),
    'transformer.ln_f.weight': 1 + draw(width),
    'transformer.ln_f.bias': draw(width),
  }
  for i in range(2):
    block = f'transformer.h.{i}.'
    for name, d, m in (
      ('attn.c_attn', width, 3 * width),
      ('attn.c_proj', width, width),
      ('mlp.c_fc', width, mlp),
      ('mlp.c_proj', mlp, width),
    ):
      tensors[f'{block}{name}.weight'] = draw(d, m)
      tensors[f'{block}{name}.bias'] = draw(m)
    for name in ('ln_1', 'ln_2'):
      tensors[f'{block}{name}.weight'] = 1 + draw(width)
      tensors[f'{block}{name}.bias'] = draw(width)
  config = {
    'model_type': 'gpt2', 'n_head': 4, 'n_embd': width, 'n_layer': 2,
    'n_positions': 16, 'vocab_size': 19, 'n_inner': mlp,
  }  # fmt: skip
  llamas.write_state(folder, config, tensors)


@pytest.mark.parametrize('anchored', [False, True])
@pytest.mark.parametrize('write', [with_biases, with_fused, gpt2])
def test_other_families_are_no_branch(tmp_path, write, anchored):
  folder, out = tmp_path / 'in', tmp_path / 'out'
  write(folder)
  batches = tokens()
  recipe = ur.compress_checkpoint(
    folder,
    out,
    batches,
    params_fraction=0.75,
    anchored=anchored,
    compensate_mean=True,
    **QUIET,
  )
  ranks, small = in_memory(folder, batches, 0.75, anchored, True)
  assert recipe.ranks == ranks
  _, variables, _ = load_checkpoint(str(out))
  # As above, where some eigenvalues of few rows are close to each other.
  assert_trees_agree(variables, small, 1e-4)


MEMORY = """
import pathlib, resource, sys, warnings
import numpy as np
warnings.simplefilter('ignore')
sys.path.insert(0, sys.argv[1])
import llamas
import utilized_rank as ur

folder, depth = pathlib.Path(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(1)
batches = [rng.integers(0, 19, (2, 64)) for _ in range(2)]
# One of each block: time is in what they are fitted by.
ranks = {f'params/block_{i}/mlp/up/kernel': 8 for i in range(depth)}
ur.compress_checkpoint(
  folder, f'{folder}-out', batches, ranks=ranks, progress=False)
# Not ru_maxrss, which a child has from its parent.
line = [s for s in open('/proc/self/status') if s.startswith('VmHWM')][0]
print(int(line.split()[1]) * 1024)
"""


@pytest.mark.skipif(
  not sys.platform.startswith('linux'), reason='reads /proc/self/status'
)
def test_memory_does_not_grow_with_depth(tmp_path):
  support = pathlib.Path(llamas.__file__).parent
  peaks, sizes = {}, {}
  for depth in (4, 16):
    folder = tmp_path / str(depth)
    llamas.write(folder, depth=depth, width=256, mlp_dim=1024)
    sizes[depth] = os.path.getsize(folder / 'model.safetensors')
    done = subprocess.run(
      [sys.executable, '-c', MEMORY, support, folder, str(depth)],
      capture_output=True,
      text=True,
      timeout=600,
      # Else the C library keeps what each thread gave back for that thread.
      env={**os.environ, 'MALLOC_ARENA_MAX': '1'},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peaks[depth] = int(done.stdout)
  more = sizes[16] - sizes[4]
  assert more > 45e6
  # What grows: traced equations, and what the C library keeps for later.
  assert peaks[16] - peaks[4] < more / 3, peaks


def test_what_is_refused(tmp_path):
  folder, out = tmp_path / 'in', tmp_path / 'out'
  llamas.write(folder)
  run = lambda **options: ur.compress_checkpoint(
    folder, out, tokens(), **{'params_fraction': 0.7, **QUIET, **options}
  )
  with pytest.raises(ValueError, match='give one of them'):
    run(ranks={'params/block_0/query/kernel': 2})
  with pytest.raises(ValueError, match='params_fraction is a share'):
    run(params_fraction=1.5)
  with pytest.raises(ValueError, match='ridge must be a number'):
    run(ridge=-1)
  with pytest.raises(ValueError, match='are for a budget'):
    run(uniform=True, limits=[('.*', (1, 4))])
  with pytest.raises(ValueError, match='did you mean'):
    run(params_fraction=None, ranks={'params/block_0/quer/kernel': 2})
  with pytest.raises(ValueError, match='has no kernel to make a pair of'):
    run(select=[('.*', False)])
  assert not (tmp_path / 'out.partial').exists()
  with pytest.raises(ValueError, match='at least one batch'):
    ur.compress_checkpoint(folder, out, [], params_fraction=0.5, **QUIET)
  (tmp_path / 'else').mkdir()
  (tmp_path / 'else/thing').write_text('')
  with pytest.raises(ValueError, match='no job that was interrupted'):
    run(work_dir=tmp_path / 'else')
  out.mkdir()
  with pytest.raises(FileExistsError, match='out'):
    run()


def test_a_kernel_that_was_asked_for_and_is_no_layer_is_named():
  site = types.SimpleNamespace(also=('gather',))
  target = types.SimpleNamespace(layer=None, name='w.weight')
  match = types.SimpleNamespace(targets={'w': target})
  opened = types.SimpleNamespace(match=match, path='folder')
  with pytest.raises(
    ValueError, match='w cannot be a pair of layers: it is al'
  ):
    sweep._chosen({'w': site}, opened, by_default=False)


def test_what_is_compressed_is_not_compressed_again(tmp_path):
  folder, out = tmp_path / 'in', tmp_path / 'out'
  llamas.write(folder, depth=1)
  kernel = 'params/block_0/mlp/up/kernel'
  ur.compress_checkpoint(folder, out, tokens(), ranks={kernel: 3}, **QUIET)
  _, variables, _ = load_checkpoint(str(out))
  assert variables['params']['block_0']['mlp']['up']['kernel'].rank == 3
  with pytest.raises(ValueError, match='is compressed already'):
    ur.compress_checkpoint(
      out, tmp_path / 'again', tokens(), params_fraction=0.5, **QUIET
    )
