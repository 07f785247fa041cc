"""Many devices and processes against one: the same moments, one reduction.

  python -m benchmarks.spread --out benchmarks/results/spread.json

A small transformer (embedding, attention, a scan over blocks) on random tokens,
collected with gradient moments on one device, on 8 simulated CPU devices by
`shard_map` and by `pmap`, with parameters fully sharded and tensor-parallel on
meshes of 8, with padded tokens masked, and by 2 processes of 2 devices each.
Prints JSON: the largest difference of any moment, relative to the moment's
largest number (bar 1e-6), and the collectives in the compiled programs. Takes a
minute or two on two CPU cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import pickle
import socket
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from benchmarks.shared import arguments
from benchmarks.shared import record
import utilized_rank as ur
from utilized_rank.collection.devices import Devices
from utilized_rank.collection.running_sums import RunningSums
from utilized_rank.moments.capture import count
from utilized_rank.moments.counting import EVERY

BAR = 1e-6
ROOT = pathlib.Path(__file__).parents[2]
D, HEADS, LAYERS, TOKENS, VOCAB = 32, 4, 2, 16, 64
SIZES = (32, 32, 21)


def params():
  rng = np.random.default_rng(0)
  shapes = {
    'embed': (VOCAB, D),
    'qkv': (LAYERS, D, 3, HEADS, D // HEADS),
    'out': (LAYERS, HEADS, D // HEADS, D),
    'up': (LAYERS, D, 4 * D),
    'down': (LAYERS, 4 * D, D),
    'head': (D, VOCAB),
  }
  return {
    name: (rng.normal(size=shape) / D**0.5).astype(np.float32)
    for name, shape in shapes.items()
  }


def model(params, batch):
  real = batch['real'] != 0

  def block(h, p):
    q, k, v = jnp.moveaxis(jnp.einsum('btd,dnhe->nbthe', h, p['qkv']), 0, 0)
    scores = jnp.einsum('bthe,bshe->bhts', q, k) / D**0.5
    scores = jnp.where(real[:, None, None], scores, -1e9)
    a = jnp.einsum('bhts,bshe->bthe', jax.nn.softmax(scores), v)
    h = h + jnp.einsum('bthe,hed->btd', a, p['out'])
    return h + jax.nn.gelu(h @ p['up']) @ p['down'], None

  stack = {n: params[n] for n in ('qkv', 'out', 'up', 'down')}
  h, _ = jax.lax.scan(block, params['embed'][batch['ids']], stack)
  return h @ params['head']


def loss(outputs, batch):
  nats = -jnp.take_along_axis(
    jax.nn.log_softmax(outputs), batch['ids'][..., None], axis=-1
  )[..., 0]
  return (nats * batch['real']).sum(1)


def batches(padding=False):
  """Sequences; with padding, some are short."""
  rng = np.random.default_rng(1)
  out = []
  for size in SIZES:
    lengths = rng.choice([5, TOKENS] if padding else [TOKENS], size)
    real = np.arange(TOKENS) < lengths[:, None]
    ids = rng.integers(0, VOCAB, (size, TOKENS))
    out.append({'ids': ids, 'real': real.astype(np.float32)})
  return out


def sums(moments):
  return {
    path: [np.asarray(a) for a in (m.count, m.mean, m.second, m.grad_second)]
    for path, m in moments.items()
  }


def difference(got, want):
  """The largest difference of a moment, by its largest number."""
  worst = 0.0
  for path in want:
    for a, b in zip(got[path], want[path], strict=True):
      b = b.astype(np.float64)
      worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
  return worst


def collectives(text):
  """Collective operations of a compiled program, by kind."""
  kinds = ('all-reduce', 'all-gather', 'all-to-all', 'reduce-scatter')
  count = lambda kind: text.count(f' {kind}(') + text.count(f' {kind}-start(')
  return {kind: count(kind) for kind in kinds if count(kind)}


def programs():
  """Collectives of the two steps and of the last program, on all devices."""
  named = params()
  names = sorted(named)

  def measure(values, batch):
    return count(model, EVERY, dict(zip(names, values, strict=True)), batch)

  spread = Devices([named[n] for n in names], jax.devices())
  run, out = RunningSums(measure, spread), {}
  for part, whole in spread.split(batches()[-1]):
    state = run.zeros(part)
    lowered = run.step(whole).lower(state, spread.params, part)
    name = 'step of what is left over' if whole else 'step'
    out[name] = collectives(lowered.compile().as_text())
  last = spread.reducer(state).lower(state).compile()
  out['reduction at the end'] = collectives(last.as_text())
  return out


def on_devices():
  """Every way of spreading one collection over this process's devices."""
  collect = functools.partial(ur.collect, model, loss=loss, progress=False)
  devices = np.array(jax.devices())
  alone = jax.sharding.Mesh(devices[:1], ('x',))
  want = sums(collect(params(), batches(), mesh=alone))
  out = {'shard_map': difference(sums(collect(params(), batches())), want)}

  even = batches()[:-1]
  n = len(devices)
  split = lambda a: a.reshape(n, -1, *a.shape[1:])
  copies = jax.tree.map(lambda a: np.stack([a] * n), params())
  mapped = collect(
    copies, [jax.tree.map(split, b) for b in even], pmap_axis='i'
  )
  out['pmap'] = difference(
    sums(mapped), sums(collect(params(), even, mesh=alone))
  )

  for name, shape, specs in [
    (
      'fully sharded',
      (n, 1),
      {
        'embed': P(None, 'data'),
        'qkv': P(None, 'data'),
        'out': P(None, None, None, 'data'),
        'up': P(None, 'data'),
        'down': P(None, 'data'),
        'head': P('data'),
      },
    ),
    (
      'tensor parallel',
      (n // 4, 4),
      {
        'embed': P(),
        'qkv': P(None, None, None, 'model'),
        'out': P(None, 'model'),
        'up': P(None, None, 'model'),
        'down': P(None, 'model'),
        'head': P(None, 'model'),
      },
    ),
  ]:
    mesh = jax.make_mesh(
      shape, ('data', 'model'), axis_types=(AxisType.Auto,) * 2
    )
    placed = {
      k: jax.device_put(v, NamedSharding(mesh, specs[k]))
      for k, v in params().items()
    }
    got = collect(placed, batches(), mesh=mesh)
    out[name] = difference(sums(got), want)

  masked = sums(collect(params(), batches(padding=True), mask='real'))
  singles = [
    jax.tree.map(lambda a, i=i, n=n: a[i : i + 1, :n], b)
    for b in batches(padding=True)
    for i, n in enumerate(b['real'].sum(1).astype(int))
  ]
  by_length = {}
  for one in singles:
    by_length.setdefault(one['ids'].shape[1], []).append(one)
  joined = [
    jax.tree.map(lambda *a: np.concatenate(a), *group)
    for group in by_length.values()
  ]
  out['padded tokens, against none'] = difference(
    masked, sums(collect(params(), joined, mesh=alone))
  )
  return {'difference': out, 'collectives': programs()}


def in_process(index):
  mine = batches()[index::2] if index else batches()[::2]
  return sums(ur.collect(model, params(), mine, loss=loss, progress=False))


def worker(index, port, devices, folder):
  if port:
    jax.distributed.initialize(
      f'localhost:{port}', num_processes=2, process_id=index
    )
  out = in_process(index) if port else on_devices()
  if not port:
    out['jax'] = jax.__version__
    out['devices'] = devices
    alone = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('x',))
    out['want'] = sums(
      ur.collect(
        model, params(), batches(), loss=loss, mesh=alone, progress=False
      )
    )
  pathlib.Path(folder, f'{index}-{bool(port)}.pkl').write_bytes(
    pickle.dumps(out)
  )


def launch(jobs, devices, folder):
  """Runs workers at once, each with so many devices."""
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
  }
  started = [
    subprocess.Popen(
      [sys.executable, '-m', 'benchmarks.spread', '--worker']
      + [json.dumps([index, port, devices, folder])],
      env=environment,
      cwd=ROOT,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index, port in jobs
  ]
  for process in started:
    _, printed = process.communicate(timeout=1200)
    if process.returncode:
      raise RuntimeError(printed)


def main():
  parser = arguments.parser(__doc__)
  parser.add_argument('--worker', type=json.loads, help=argparse.SUPPRESS)
  args = parser.parse_args()
  worker_args = args.worker
  if worker_args:
    worker(*worker_args)
    return
  with tempfile.TemporaryDirectory() as folder:
    read = lambda name: pickle.loads(pathlib.Path(folder, name).read_bytes())
    launch([(0, 0)], 8, folder)
    out = read('0-False.pkl')
    want = out.pop('want')
    with socket.socket() as probe:
      probe.bind(('localhost', 0))
      port = probe.getsockname()[1]
    launch([(0, port), (1, port)], 2, folder)
    for i in range(2):
      out['difference'][f'2 x 2 processes, on process {i}'] = difference(
        read(f'{i}-True.pkl'), want
      )
  worst = max(out['difference'].values())
  out |= {'worst': worst, 'bar': BAR, 'within': worst <= BAR}
  print(json.dumps(out, indent=1))
  record.write(args.out, 'spread', out)


if __name__ == '__main__':
  main()
