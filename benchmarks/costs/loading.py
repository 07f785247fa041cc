"""Memory and time of loading ViT-L/16 (1.2 GB) from files of every format.

  python -m benchmarks.loading --out benchmarks/results/loading.json

Writes a checkpoint of random weights under timm's names as .npz, .safetensors,
Flax .msgpack and, where torch is installed, .pth, each to a temporary
directory, and loads it in a process of its own. Bar: what loading adds to the
process, at its peak, is at most 1.2 x the size of the file. Needs 2.5 GB of
memory and 1.3 GB of disk.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile

import numpy as np

from benchmarks.shared import arguments
from benchmarks.shared import processes
from benchmarks.shared import record

BAR = 1.2
FORMATS = ('npz', 'safetensors', 'msgpack', 'pth')

LOAD = """
import json, sys, time
from benchmarks.shared.memory import resident
from utilized_rank.models.importing import load_checkpoint

# Imports, and the tracer's first use.
load_checkpoint(sys.argv[1], heads=2, assume=True)
before, start = resident(), time.perf_counter()
model, variables, _ = load_checkpoint(sys.argv[2], assume=True)
seconds = time.perf_counter() - start
peak = resident('VmHWM')  # not ru_maxrss, which a child has from its parent
print(json.dumps({'before': before, 'peak': peak, 'seconds': seconds}))
"""


def timm_state(width, depth, mlp_dim, patch, grid, classes):
  """Random weights of a ViT under timm's names."""
  rng = np.random.default_rng(0)
  shapes = {
    'cls_token': (1, 1, width),
    'pos_embed': (1, grid * grid + 1, width),
    'patch_embed.proj.weight': (width, 3, patch, patch),
    'patch_embed.proj.bias': (width,),
  }
  layers = {'norm': (width,), 'head': (classes, width)}
  for i in range(depth):
    layers |= {
      f'blocks.{i}.norm1': (width,),
      f'blocks.{i}.attn.qkv': (3 * width, width),
      f'blocks.{i}.attn.proj': (width, width),
      f'blocks.{i}.norm2': (width,),
      f'blocks.{i}.mlp.fc1': (mlp_dim, width),
      f'blocks.{i}.mlp.fc2': (width, mlp_dim),
    }
  for name, shape in layers.items():
    shapes |= {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
  return {k: rng.standard_normal(s, np.float32) for k, s in shapes.items()}


def write(state, path: str, form: str) -> None:
  if form == 'npz':
    np.savez(path, **state)
  elif form == 'safetensors':
    from safetensors.numpy import save_file

    save_file(state, path)
  elif form == 'msgpack':
    from flax import serialization

    with open(path, 'wb') as file:
      file.write(serialization.msgpack_serialize(state))
  else:
    import torch

    torch.save({k: torch.from_numpy(v) for k, v in state.items()}, path)


def measure(state, warm: str, form: str, folder: str) -> dict:
  path = os.path.join(folder, f'large.{form}')
  write(state, path, form)
  size = os.path.getsize(path)
  found = processes.printed('-W', 'ignore', '-c', LOAD, warm, path)
  os.remove(path)
  row = {
    'format': form,
    'file_bytes': size,
    'peak_bytes': found['peak'],
    'process_before_bytes': found['before'],
    'added_over_file': round((found['peak'] - found['before']) / size, 4),
    'seconds': round(found['seconds'], 2),
  }
  row['within_bar'] = row['added_over_file'] <= BAR
  print(
    f'{form:12} {size / 1e9:.3f} GB, adds {row["added_over_file"]:.3f} x that, '
    f'peak of the process {found["peak"] / 1e9:.3f} GB, '
    f'{row["seconds"]:.1f} s',
    flush=True,
  )
  return row


def main():
  parser = arguments.parser(__doc__)
  parser.add_argument('--depth', type=int, default=24)
  parser.add_argument('--formats', nargs='+', choices=FORMATS)
  args = parser.parse_args()
  torch = importlib.util.find_spec('torch') is not None
  formats = args.formats or [f for f in FORMATS if f != 'pth' or torch]
  with tempfile.TemporaryDirectory() as folder:
    warm = os.path.join(folder, 'warm.npz')
    write(timm_state(8, 1, 12, 2, 2, 5), warm, 'npz')
    state = timm_state(1024, args.depth, 4096, 16, 14, 1000)
    rows = [measure(state, warm, form, folder) for form in formats]
  result = {'bar': BAR, 'rows': rows}
  record.write(args.out, 'loading', result)


if __name__ == '__main__':
  main()
