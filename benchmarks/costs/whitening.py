"""What streamed factors lose and cost beside SVD-LLM's whitening.

  python -m benchmarks.whitening [--data_root DIR] [--size 10M]

A random Llama-shaped checkpoint in float32 is cut to half of its kernels'
parameters with uniform ranks (`compress_checkpoint(anchored=False)`), and once
more with SVD-LLM's decomposition (`shared/svd_llm.py`: Cholesky in float64, SVD
in float32, as the paper's code) in place of ours and all else the same. Each of
the two jobs has a process. For each kernel the squared error at the outputs is
compared on sums that a third, in-memory run has collected, also with SVD-LLM in
float64; CPU seconds and memory are of the jobs, and of the decompositions in
them, the BLAS on one thread. Three more things are seen with `--data_root`, a
directory with networks/ and data/: the same for stories260k, calibrated on
8,192 tokens and on 40 (fewer rows than features); and that its streamed factors
are those that `factorize` and, by default, `anchor` make in memory.
Takes four minutes on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Iterator
import json
import pathlib
import shutil
import tempfile
import time
from typing import Any
from unittest import mock
import warnings

import jax
import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.costs import streamed
from benchmarks.networks import common
from benchmarks.shared import arguments
from benchmarks.shared import memory
from benchmarks.shared import processes
from benchmarks.shared import record
from benchmarks.shared import svd_llm
import utilized_rank as ur
from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.models.importing import load_checkpoint
from utilized_rank.models.importing.files import safetensors_file
from utilized_rank.streaming import fitting
from utilized_rank.streaming.sweep import block_of
from utilized_rank.tree import paths

FRACTION = 0.5
METHODS = ('ours', 'svd_llm')
_BATCHES = 'batches.npy'
_STORIES = 'stories260k'


def main() -> None:
  parser = arguments.parser(__doc__)
  parser.add_argument('--data_root', help='also stories260k, which is there')
  parser.add_argument('--size', choices=streamed.SIZES, default='10M')
  parser.add_argument('--folder', help='of one of the processes')
  parser.add_argument('--method', choices=METHODS)
  args = parser.parse_args()
  warnings.filterwarnings('ignore', message='.* rows for')
  if args.folder is not None:
    print(json.dumps(job(pathlib.Path(args.folder), args.method)))
    return
  result: dict[str, Any] = {}
  with tempfile.TemporaryDirectory() as root:
    for name, folder in problems(pathlib.Path(root), args):
      result[name] = found = beside(folder)
      print(f'{name}: {json.dumps(found)}', flush=True)
    if args.data_root is not None:
      folder = pathlib.Path(root) / _STORIES
      result[_STORIES]['in_memory'] = found = in_memory(folder)
      print(f'streamed and in memory: {json.dumps(found)}')
  record.write(args.out, 'whitening', result)


def problems(
  root: pathlib.Path, args: Any
) -> Iterator[tuple[str, pathlib.Path]]:
  """Folders with a checkpoint `dense` and batches to calibrate on."""
  folder = root / 'random'
  folder.mkdir()
  vocabulary = streamed.SIZES[args.size][-1]
  tokens = np.random.default_rng(0).integers(0, vocabulary, (4, 2, 512))
  np.save(folder / _BATCHES, tokens)
  streamed.write(folder / 'dense', args.size, False, np.float32)
  yield f'random {args.size}', folder
  if args.data_root is None:
    return
  own = common.read(args.data_root, 'data', 'stories_selfgen64.npz')['tokens']
  for name, tokens in (
    (_STORIES, own[:32, :256].reshape(4, 8, 256)),
    (f'{_STORIES}, 40 tokens', own[:1, :40][None]),
  ):
    folder = root / name
    folder.mkdir()
    np.save(folder / _BATCHES, tokens.astype(np.int32))
    if not (root / _STORIES / 'dense').exists():
      write_stories(folder / 'dense', args.data_root)
    else:
      shutil.copytree(root / _STORIES / 'dense', folder / 'dense')
    yield name, folder


def write_stories(folder: pathlib.Path, root: str) -> None:
  """stories260k as Hugging Face has a Llama; its logits are checked.

  Its own code turns neighbours of a head by one angle, that of Hugging Face
  the halves: rows of q and k are in another order.
  """
  at = common.read(root, 'networks', 'stories260k.npz')
  heads, width = 8, at['wq'].shape[1]
  depth, hidden = at['w1'].shape[:2]
  size = width // heads
  halves = lambda w: (
    w.reshape(-1, size // 2, 2, width).swapaxes(1, 2).reshape(w.shape)
  )
  tensors = {
    'model.embed_tokens.weight': at['tok_emb'],
    'model.norm.weight': at['final_norm'],
  }
  for i in range(depth):
    block = f'model.layers.{i}.'
    tensors |= {
      f'{block}input_layernorm.weight': at['att_norm'][i],
      f'{block}post_attention_layernorm.weight': at['ffn_norm'][i],
      f'{block}self_attn.q_proj.weight': halves(at['wq'][i]),
      f'{block}self_attn.k_proj.weight': halves(at['wk'][i]),
      f'{block}self_attn.v_proj.weight': at['wv'][i],
      f'{block}self_attn.o_proj.weight': at['wo'][i],
      f'{block}mlp.gate_proj.weight': at['w1'][i],
      f'{block}mlp.up_proj.weight': at['w3'][i],
      f'{block}mlp.down_proj.weight': at['w2'][i],
    }
  config = {
    'architectures': ['LlamaForCausalLM'], 'model_type': 'llama',
    'hidden_act': 'silu', 'rms_norm_eps': 1e-5, 'rope_theta': 1e4,
    'vocab_size': len(at['tok_emb']), 'hidden_size': width,
    'intermediate_size': hidden, 'num_hidden_layers': depth,
    'num_attention_heads': heads,
    'num_key_value_heads': at['wk'].shape[1] // size,
    'max_position_embeddings': 512, 'tie_word_embeddings': True,
  }  # fmt: skip
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(config))
  file = str(folder / 'model.safetensors')
  safetensors_file.write(file, tensors, {'format': 'pt'})
  golden = common.read(root, 'networks', 'golden', 'stories260k.npz')
  model, params, _ = load_checkpoint(str(folder))

  def fn(params: Any, batch: common.Batch) -> Any:
    return model.apply(params, batch['x'])

  tokens, logits = golden['tokens'][None], golden['logits']
  common.check_golden(fn, params, tokens, logits, 1e-4)


def job(folder: pathlib.Path, method: str) -> dict[str, float]:
  """Cuts a checkpoint, and what that and its decompositions took."""
  run: Any = by_svd_llm if method == 'svd_llm' else fitting.factorize
  spent: dict[str, float] = {'cpu_seconds': 0, 'peak_bytes': 0}
  most = [0]
  # Else what libraries keep from their first call on is one decomposition's.
  draws = np.random.default_rng(0).normal(size=(400, 400))
  square = (draws @ draws.T + 400 * np.eye(400)).astype(np.float32)
  for warm in (np, jax.numpy):
    warm.linalg.svd(warm.linalg.cholesky(square))
    warm.linalg.eigh(square)

  def measured(*args: Any, **options: Any) -> Any:
    most.append(memory.resident('VmHWM'))
    memory.forget_peak()
    start, before = time.process_time(), memory.resident()
    made = run(*args, **options)
    spent['cpu_seconds'] += time.process_time() - start
    more = memory.resident('VmHWM') - before
    spent['peak_bytes'] = max(spent['peak_bytes'], more)
    return made

  start = time.process_time()
  # On one thread each: those that wait would count, by how busy others are.
  with (
    threadpool_limits(1),
    mock.patch.object(fitting, 'factorize', measured),
  ):
    ur.compress_checkpoint(
      folder / 'dense',
      folder / method,
      list(np.load(folder / _BATCHES)),
      params_fraction=FRACTION,
      uniform=True,
      anchored=False,  # whose factors are not of the same covariances
      progress=False,
    )
  return {
    'cpu_seconds': round(time.process_time() - start, 2),
    'peak_bytes': max(*most, memory.resident('VmHWM')),
    **{f'decompositions_{name}': round(x, 2) for name, x in spent.items()},
  }


def by_svd_llm(now: Any, moments: Any, ranks: Any, **options: Any) -> Any:
  """In place of `factorize`, for kernels that read the same inputs."""
  del options
  new = dict(now)
  white = svd_llm.whitening(moments[next(iter(ranks))].sums.second)
  for path, rank in ranks.items():
    layout = moments[path].layout
    w = np.asarray(now[path]).reshape(layout.matrix_shape)
    a, b = svd_llm.factors(w, white, rank, np.float32)
    new[path] = LowRank(
      a.reshape(*layout.input_shape, rank),
      b.reshape(rank, *layout.output_shape),
      None,
      layout,
    )
  return new


def beside(folder: pathlib.Path) -> dict[str, Any]:
  """Both jobs: ratios of what they took, and of the errors that they leave."""
  words = '-W', 'ignore', '-m', 'benchmarks.whitening', '--folder', str(folder)
  took = {
    method: processes.printed(*words, '--method', method) for method in METHODS
  }
  ours = {
    name: round(value / took['svd_llm'][name], 3)
    for name, value in took['ours'].items()
  }
  return {**errors(folder), 'took': took, 'ours_to_svd_llm': ours}


def errors(folder: pathlib.Path) -> dict[str, Any]:
  """Ours divided by SVD-LLM's, over all kernels."""
  model, params, moments = collected(folder)
  dense, _ = paths.flatten(params)
  small = {
    method: paths.flatten(
      load_checkpoint(str(folder / method))[1], is_low_rank
    )[0]
    for method in METHODS
  }
  found: dict[str, list[float]] = {'float32': [], 'float64': []}
  parts, jitters = [], 0
  for path in moments:
    matrix = moments[path].layout.matrix_shape
    second = np.asarray(moments[path].sums.second, np.float64)
    white = svd_llm.whitening(second)
    jitters += white.jitter > 0
    w = np.asarray(dense[path], np.float64).reshape(matrix)
    a, b = svd_llm.factors(w, white, small['ours'][path].rank)
    of = lambda other: svd_llm.error(
      w,  # noqa: B023 (used before the next)
      np.asarray(other, np.float64).reshape(matrix),  # noqa: B023
      second,  # noqa: B023
    )
    ours = of(small['ours'][path].dense())
    found['float32'].append(ours / of(small['svd_llm'][path].dense()))
    found['float64'].append(ours / of(a @ b))
    parts.append(round(ours / of(np.zeros(matrix)), 5))
  return {
    'kernels': len(parts),
    'kernels_with_jitter': jitters,
    'rows': int(moments[path].count),
    'error_of_outputs': {
      'least': min(parts), 'median': float(np.median(parts)), 'most': max(parts)
    },
    'error_ours_to_svd_llm': {
      f'{dtype}_{name}': round(float(of(ratios)), 9)
      for dtype, ratios in found.items()
      for name, of in (('max', np.max), ('median', np.median))
    },
  }  # fmt: skip


def collected(folder: pathlib.Path) -> tuple[Any, Any, Any]:
  """The dense model, its parameters, and the moments of what is a pair."""
  model, params, _ = load_checkpoint(str(folder / 'dense'))
  pairs = _pairs(load_checkpoint(str(folder / 'ours'))[1])
  rules = [(path, True) for path in pairs] + [('.*', False)]
  batches = list(np.load(folder / _BATCHES))
  moments = ur.collect(
    model.apply, params, batches, select=rules, progress=False
  )
  return model, params, moments


def in_memory(folder: pathlib.Path) -> dict[str, dict[str, float]]:
  """Largest differences of streamed factors to those made in memory.

  Returns:
    By the way that factors are made: of the products, relative to the largest
    number of each; and of the logits, to the largest.
  """
  model, params, moments = collected(folder)
  batches = list(np.load(folder / _BATCHES))
  ranks = {
    path: leaf.rank
    for path, leaf in _pairs(load_checkpoint(str(folder / 'ours'))[1]).items()
  }
  # Streamed factors have no constants.
  quiet: dict[str, Any] = {'compensate_mean': False, 'progress': False}
  alone = ur.factorize(params, moments, ranks, **quiet)
  found = {'factorize': _differ(model, folder / 'ours', alone, batches[0])}
  out = folder / 'anchored'
  recipe = ur.compress_checkpoint(
    folder / 'dense', out, batches, params_fraction=FRACTION, progress=False
  )
  ranks = ur.budget_ranks(params, moments, params_fraction=FRACTION, **quiet)
  differ = sum(ranks[path] != rank for path, rank in recipe.ranks.items())
  anchored = ur.anchor(
    model.apply,
    params,
    batches,
    recipe.ranks,
    group=block_of,
    moments=moments,
    **quiet,
  )
  found['anchor'] = _differ(model, out, anchored, batches[0])
  found['anchor']['ranks_that_differ'] = differ
  return found


def _pairs(tree: Any) -> dict[str, Any]:
  leaves, _ = paths.flatten(tree, is_low_rank)
  return {path: leaf for path, leaf in leaves.items() if is_low_rank(leaf)}


def _differ(
  model: Any, folder: pathlib.Path, small: Any, batch: Any
) -> dict[str, float]:
  _, read, _ = load_checkpoint(str(folder))
  one, other = _pairs(read), _pairs(small)
  assert set(one) == set(other)
  run = jax.jit(ur.low_rank(model.apply))
  return {
    'products': max(
      _relative(one[path].dense(), other[path].dense()) for path in one
    ),
    'logits': _relative(run(read, batch), run(small, batch)),
  }


def _relative(one: Any, other: Any) -> float:
  one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
  return float(np.abs(one - other).max() / np.abs(other).max())


if __name__ == '__main__':
  main()
