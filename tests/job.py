"""One process of a job of several: `python job.py INDEX COUNT PORT CASE OUT`.

The tests start it and read what it leaves in OUT.
"""

import os
import pickle
import sys
import time

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '2'

import jax
import numpy as np

import utilized_rank as ur
from utilized_rank import running

SHAPES = {'first': (6, 8), 'second': (8, 4)}
# Batches of each process: unequal in number and in size.
SIZES = [[16, 16, 16, 7], [16, 1]]


def params():
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in SHAPES.items()
  }


def model(params, x):
  return jax.numpy.tanh(x @ params['first']) @ params['second']


def loss(outputs, batch):
  del batch
  return (outputs**2).sum(-1)


def batches(index):
  rng = np.random.default_rng(1 + index)
  return [rng.normal(size=(n, 6)).astype(np.float32) for n in SIZES[index]]


def collect(batches, **kwargs):
  return ur.collect(model, params(), batches, progress=False, **kwargs)


def numbers(moments):
  """Plain arrays, by path."""
  return {
    path: (m.count, m.mean, m.second, m.grad_second, m.row_fisher)
    for path, m in moments.items()
  }


def refusal(call):
  try:
    call()
  except ValueError as error:
    return str(error)
  return None


def local(index):
  """Every process its own batches, no communication but at the end."""
  out = {'moments': numbers(collect(batches(index), loss=loss))}
  options = dict(loss=loss, fisher_rows=True, accumulate='compensated')
  out['compensated'] = numbers(collect(batches(index), **options))
  copies = jax.tree.map(lambda a: np.stack([a] * 2), params())
  out['pmap'] = numbers(
    ur.collect(
      model,
      copies,
      [b[: len(b) // 2 * 2].reshape(2, -1, 6) for b in batches(index)[:1]],
      pmap_axis='i',
      progress=False,
    )
  )
  if index:
    # The sums of this process alone go through the host.
    running._MOST_ROWS = 5
  out['overflow'] = numbers(collect(batches(index), loss=loss))
  costs = ur.plan(model, params(), batches(index)[0][:8], loss=loss)
  limits = [costs.peak_bytes - 10, costs.peak_bytes]
  passes = lambda limit: collect(batches(index), loss=loss, memory_limit=limit)
  out['passes'] = numbers(passes(limits[0]))
  out['other limits'] = refusal(lambda: passes(limits[index]))
  out['empty'] = refusal(lambda: collect(batches(index) if index else []))
  rules = [('first' if index else '.*', True)]
  out['different'] = refusal(lambda: collect(batches(index), select=rules))
  mine = jax.sharding.Mesh(np.array(jax.local_devices()), ('x',))
  if index:
    out['alone'] = numbers(collect(batches(index), mesh=mine))
  return out


def joint(index):
  """Parameters that are spread over the devices of both processes."""
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec as P

  mesh = jax.make_mesh(
    (4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  specs = {'first': P(None, 'data'), 'second': P('data')}
  spread = {
    name: jax.make_array_from_callback(
      v.shape, NamedSharding(mesh, specs[name]), lambda at, v=v: v[at]
    )
    for name, v in params().items()
  }
  run = lambda x, **more: ur.collect(
    model, spread, x, mesh=mesh, loss=loss, progress=False, **more
  )
  own = jax.sharding.Mesh(np.array(jax.local_devices()), ('data',))
  x = [b[:16] for b in EVEN[index]]
  uneven = EVEN[index][: 1 + index]
  return {
    'moments': numbers(run(x)),
    'uneven': refusal(lambda: run(uneven)),
    'folder': refusal(lambda: run(x, checkpoint_dir='sums')),
    'low': refusal(lambda: run(x, accumulate='compensated')),
    'unsaid': numbers(ur.collect(model, spread, x, loss=loss, progress=False)),
    'elsewhere': refusal(
      lambda: ur.collect(model, spread, x, mesh=own, progress=False)
    ),
  }


EVEN = np.random.default_rng(9).normal(size=(2, 2, 16, 6)).astype(np.float32)


class Stream:
  """Batches one by one, slowly, from a place that can be told and set."""

  def __init__(self, seconds=0.0):
    self.at, self.seconds = 0, seconds

  def __iter__(self):
    return self

  def __next__(self):
    if self.at == LENGTH:
      raise StopIteration
    self.at += 1
    time.sleep(self.seconds)
    rng = np.random.default_rng(self.at)
    return rng.normal(size=(6, 6)).astype(np.float32)

  def get_state(self):
    return {'at': self.at}

  def set_state(self, state):
    self.at = state['at']


LENGTH = 40


def main():
  index, count, port = map(int, sys.argv[1:4])
  case, folder = sys.argv[4:]
  if port:
    jax.distributed.initialize(
      f'localhost:{port}', num_processes=count, process_id=index
    )
  if case == 'interrupted':
    print('ready', flush=True)
    moments = collect(
      Stream(0.05), checkpoint_dir=f'{folder}/sums', checkpoint_every=2
    )
    out = numbers(moments)
  else:
    out = globals()[case](index)
  with open(f'{folder}/{index}.pkl', 'wb') as file:
    pickle.dump(out, file)


if __name__ == '__main__':
  main()
