"""A Llama-shaped checkpoint compressed block by block: the plan, and the truth.

  python -m benchmarks.streamed [--size 100M] [--plan_only]

Writes random bfloat16 weights in shards to a temporary directory, prints what
`plan_checkpoint` says of cutting them to 80 %, does it, and prints what it took
beside the plan. The plan and the work have a process each, so that the peak of
memory is that of the work. With `--plan_only` the shards are holes in a file
system that has such: all sizes can be planned on a small disk. The larger sizes
have the shapes of Llama-3.2 3B and Llama-2 7B.
Takes five minutes for 100M on two CPU cores.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import resource
import tempfile
import time
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

from benchmarks.shared import arguments
from benchmarks.shared import processes
from benchmarks.shared import record
import utilized_rank as ur
from utilized_rank.models.importing.files import safetensors_file

FRACTION = 0.8
SIZES = {
  # width, depth, hidden width, heads, heads of keys, tokens in the vocabulary
  '10M': (256, 6, 688, 8, 4, 4000),
  '100M': (768, 12, 2048, 12, 12, 16000),
  '3B': (3072, 28, 8192, 24, 8, 128256),
  '7B': (4096, 32, 11008, 32, 32, 32000),
}
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def main() -> None:
  parser = arguments.parser(__doc__)
  parser.add_argument('--size', choices=SIZES, default='100M')
  parser.add_argument('--batches', type=int, default=4)
  parser.add_argument('--batch', type=int, default=2)
  parser.add_argument('--length', type=int, default=512)
  parser.add_argument('--plan_only', action='store_true')
  parser.add_argument('--folder', help='of the two processes')
  parser.add_argument('--work', action='store_true', help='in this process')
  args = parser.parse_args()
  vocabulary = SIZES[args.size][-1]
  rng = np.random.default_rng(0)
  shape = args.batch, args.length
  batches = [rng.integers(0, vocabulary, shape) for _ in range(args.batches)]
  if args.folder is not None:
    step = work if args.work else plan
    print(json.dumps(step(pathlib.Path(args.folder), batches)))
    return
  given = ['--size', args.size, '--batches', str(args.batches)]
  given += ['--batch', str(args.batch), '--length', str(args.length)]
  with tempfile.TemporaryDirectory() as root:
    folder = pathlib.Path(root) / 'dense'
    size = write(folder, args.size, hollow=args.plan_only)
    print(f'{args.size}: {size / 2**30:.2f} GiB of weights', flush=True)
    run = lambda *more: processes.printed(
      '-W', 'ignore', '-m', 'benchmarks.streamed', *given,
      '--folder', str(folder), *more,
    )  # fmt: skip
    planned = run()
    print(planned.pop('text'), flush=True)
    result = {'size': args.size, 'file_bytes': size, 'planned': planned}
    if not args.plan_only:
      result['took'] = took = run('--work')
      for name in took:
        print(f'{name}: planned {planned[name]:,.0f}, took {took[name]:,.0f}')
  record.write(args.out, 'streamed', result)


def plan(folder: pathlib.Path, batches: list[np.ndarray]) -> dict:
  found = ur.plan_checkpoint(folder, batches, params_fraction=FRACTION)
  return {
    'text': str(found),
    'parameters': found.parameters,
    'largest_block_bytes': found.largest,
    'seconds': found.total_seconds,
    'seconds_of': dict(found.seconds),
    'peak_bytes': found.peak_bytes,
    'peak_bytes_of': dict(found.memory),
    'out_bytes': found.out_bytes,
    'work_bytes': found.work_bytes,
  }


def work(folder: pathlib.Path, batches: list[np.ndarray]) -> dict:
  """Compresses it; what a step leaves behind is seen when the next begins."""
  from utilized_rank.streaming import ledger

  out = folder.parent / 'small'
  most = [0]
  finish = ledger.Ledger.finish

  def look(self, phase, count):
    between = pathlib.Path(f'{out}.partial') / 'between'
    held = sum(f.stat().st_size for f in between.rglob('*.safetensors'))
    most[0] = max(most[0], held)
    finish(self, phase, count)

  start = time.perf_counter()
  with mock.patch.object(ledger.Ledger, 'finish', look):
    ur.compress_checkpoint(folder, out, batches, params_fraction=FRACTION)
  seconds = time.perf_counter() - start
  return {
    'seconds': seconds,
    'peak_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    'out_bytes': sum(f.stat().st_size for f in out.glob('*.safetensors')),
    'work_bytes': most[0],
  }


def shapes_of(size: str) -> dict[str, dict[str, tuple[int, ...]]]:
  """The tensors of each shard: the embedding, every block, the head."""
  width, depth, hidden, heads, kv_heads, vocabulary = SIZES[size]
  keys = width // heads * kv_heads
  shards: dict[str, dict[str, tuple[int, ...]]] = {
    'first': {'model.embed_tokens.weight': (vocabulary, width)},
    **{f'block {i}': {} for i in range(depth)},
    'last': {
      'model.norm.weight': (width,), 'lm_head.weight': (vocabulary, width),
    },
  }  # fmt: skip
  for i in range(depth):
    block = f'model.layers.{i}.'
    shards[f'block {i}'] = {
      f'{block}input_layernorm.weight': (width,),
      f'{block}post_attention_layernorm.weight': (width,),
      f'{block}self_attn.q_proj.weight': (width, width),
      f'{block}self_attn.k_proj.weight': (keys, width),
      f'{block}self_attn.v_proj.weight': (keys, width),
      f'{block}self_attn.o_proj.weight': (width, width),
      f'{block}mlp.gate_proj.weight': (hidden, width),
      f'{block}mlp.up_proj.weight': (hidden, width),
      f'{block}mlp.down_proj.weight': (width, hidden),
    }
  return shards


def write(
  folder: pathlib.Path, size: str, hollow: bool, dtype: Any = _BFLOAT16
) -> int:
  """Writes the checkpoint, shard by shard; returns its bytes.

  Args:
    folder: to be made.
    size: a key of `SIZES`.
    hollow: write no weights: files of the right size that hold zeros.
    dtype: of the weights.
  """
  width, depth, hidden, heads, kv_heads, vocabulary = SIZES[size]
  folder.mkdir()
  config = {
    'model_type': 'llama', 'hidden_act': 'silu', 'rms_norm_eps': 1e-5,
    'rope_theta': 1e4, 'vocab_size': vocabulary, 'hidden_size': width,
    'intermediate_size': hidden, 'num_hidden_layers': depth,
    'num_attention_heads': heads, 'num_key_value_heads': kv_heads,
  }  # fmt: skip
  (folder / 'config.json').write_text(json.dumps(config))
  shards = list(shapes_of(size).values())
  rng = np.random.default_rng(0)
  where: dict[str, str] = {}
  for i, shapes in enumerate(shards):
    file = f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    where |= dict.fromkeys(shapes, file)
    path = folder / file
    if hollow:
      _write_hollow(path, shapes, dtype)
      continue
    tensors = {}
    for name, shape in shapes.items():
      draw = rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5
      values = draw if len(shape) > 1 else np.ones(shape, np.float32)
      tensors[name] = values.astype(dtype)
    safetensors_file.write(str(path), tensors, {'format': 'pt'})
  index = json.dumps({'metadata': {}, 'weight_map': where})
  (folder / 'model.safetensors.index.json').write_text(index)
  return sum(os.path.getsize(f) for f in folder.glob('*.safetensors'))


def _write_hollow(path: pathlib.Path, shapes: dict, dtype: Any) -> None:
  head = safetensors_file.header({n: (dtype, s) for n, s in shapes.items()})
  size = sum(np.dtype(dtype).itemsize * math.prod(s) for s in shapes.values())
  with open(path, 'wb') as file:
    file.write(head)
    file.truncate(len(head) + size)


if __name__ == '__main__':
  main()
