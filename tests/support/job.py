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
from utilized_rank.collection import running_sums
from utilized_rank.factorization import certify
from utilized_rank.factorization import shared_left
from utilized_rank.host import processes
from utilized_rank.linalg import best_pairs

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


def refusal(call, kind=ValueError):
  try:
    call()
  except kind as error:
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
    running_sums._MOST_ROWS = 5
  out['overflow'] = numbers(collect(batches(index), loss=loss))
  costs = ur.plan(model, params(), batches(index)[0][:8], loss=loss)
  limits = [int(0.9 * costs.peak_bytes), 10**9]
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
  uneven = list(EVEN[index][: 1 + index])
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


def network():
  """q, k and v of one value, a stack, and a kernel in bfloat16."""
  draw = np.random.default_rng(0).normal
  shapes = dict(q=(6, 8), k=(6, 6), v=(6, 4), up=(4, 5), stack=(3, 5, 5))
  tree = {n: draw(size=s).astype(np.float32) for n, s in shapes.items()}
  tree['bias'] = np.ones(5, np.float32)
  tree['down'] = jax.numpy.asarray(draw(size=(5, 3)), jax.numpy.bfloat16)
  return tree


def deep(params, x):
  q, k, v = (x @ params[name] for name in 'qkv')
  h = jax.numpy.tanh(v * q[:, :4] + k[:, 2:]) @ params['up'] + params['bias']
  step = lambda h, w: (h + jax.numpy.tanh(h @ w), None)
  h, _ = jax.lax.scan(step, h, params['stack'])
  return h @ params['down']


OWN = dict(q=3, k=2, v=2, up=3, stack=(1, 2, 4), down=2)
SHARED = {('q', 'k', 'v'): 4, 'up': 3, 'stack': (1, 2, 4), 'down': 2}


class Calls:
  """Counts what a function of a module is called with, by kernel."""

  def __init__(self, module, name, names):
    self.module, self.name, self.names = module, name, names
    self.was = getattr(module, name)

  def __enter__(self):
    self.found = []

    def counted(first, *args):
      self.found.append(self.names(first))
      return self.was(first, *args)

    setattr(self.module, self.name, counted)
    return self.found

  def __exit__(self, *_):
    setattr(self.module, self.name, self.was)


def is_same(got, want):
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  return jax.tree.structure(got) == jax.tree.structure(want) and all(
    a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs
  )


def factorized(index):
  """Kernels shared out: the same trees, refusals, and errors of one process."""
  tree = network()
  out = {name: {} for name in ('equal', 'trees', 'made', 'refused', 'failed')}
  mine = jax.sharding.Mesh(np.array(jax.local_devices()), ('x',))
  moments = ur.collect(
    deep, tree, batches(0), loss=loss, mesh=mine, progress=False
  )
  both = dict(processes=True, progress=False)
  alone = dict(progress=False)

  def compare(name, ranks, **options):
    want = ur.factorize(tree, moments, ranks, **options, **alone)
    with Calls(certify, 'check', lambda k: k.name) as out['made'][name]:
      got = ur.factorize(tree, moments, ranks, **options, **both)
    out['equal'][name] = is_same(got, want)
    out['trees'][name] = [np.asarray(v) for v in jax.tree.leaves(got)]

  compare('output', OWN)
  compare('loss', OWN, method='loss')
  compare('utilized', OWN, method='utilized', compensate_mean=False)
  compare('gauge', OWN, gauge='identity')
  processes._ROUND = 100  # many rounds for each matrix
  compare('shared', SHARED)
  compare('shared loss', SHARED, method='loss')
  options = dict(method='loss', only=[*SHARED, 'q'])
  families = ur.decompose(tree, moments, **options, **alone)
  with Calls(shared_left, 'family', lambda g: g[0].name) as out['made'][
    'decompose'
  ]:
    told = ur.decompose(tree, moments, **options, **both)
  out['equal']['decompose'] = list(told) == list(families) and all(
    is_same(told[key], families[key]) for key in families
  )
  compare('from families', SHARED, method='loss', families=told)
  costs = ur.decompose(tree, moments, keep_factors=False, **both)
  out['equal']['costs'] = costs['q'][0].factors is None and is_same(
    {key: costs[key] for key in costs},
    {
      key: [f._replace(factors=None) for f in family]
      for key, family in ur.decompose(tree, moments, **alone).items()
    },
  )
  none = ur.factorize(tree, moments, {}, **both)
  out['equal']['none'] = is_same(none, jax.tree.map(jax.numpy.asarray, tree))

  def refused(name, params=tree, sums=moments, ranks=OWN, **options):
    """Process 1 alone is given what is said here."""
    arguments = (params, sums, ranks) if index else (tree, moments, OWN)
    options = options if index else {}
    call = lambda: ur.factorize(*arguments, **options, **both)
    out['refused'][name] = refusal(call)

  refused('method', method='weight')
  refused('misspelt', method='sum', gauge='none')
  refused('ranks', ranks={**OWN, 'up': 2})
  refused('fewer', ranks={'up': 3})
  up = tree['up'].copy()
  up[1, 2] = np.nextafter(up[1, 2], 2, dtype=np.float32)
  refused('params', params={**tree, 'up': up})
  refused('moments', sums=ur.merge_moments(moments, moments))
  refused('families', families=ur.decompose(tree, moments, **alone))
  out['refused']['decompose'] = refusal(
    lambda: ur.decompose(tree, moments, only=['qk'[index]], **both)
  )
  out['refused']['all wrong'] = refusal(
    lambda: ur.factorize(tree, moments, OWN, method='sum', **both)
  )
  was = best_pairs.balanced
  for kind, wrong in (
    (FloatingPointError, lambda pair: was(pair)._replace(a=1.1 * pair.a)),
    (RuntimeError, lambda pair: pair.nothing),
  ):
    best_pairs.balanced = wrong if index else was  # in process 1 alone
    call = lambda: ur.factorize(tree, moments, OWN, **both)
    out['failed'][kind.__name__] = refusal(call, kind)
  best_pairs.balanced = was
  # Bytes of all values; sizes that rounds cut anywhere, and none at all.
  sizes, senders = [0, 1, 700, 49, 50, 51, 0, 300], [0, 1, 1, 0, 0, 1, 1, 1]
  said = [bytes(i * j % 256 for j in range(n)) for i, n in enumerate(sizes)]
  with Calls(processes, '_tell', len) as rounds:
    own = [m for m, s in zip(said, senders, strict=True) if s == index]
    out['bytes'] = list(processes.gathered(own, senders)) == said
  out['rounds'] = rounds[1:]
  return out


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


class Streams:
  """The same batches as often as they are asked for."""

  def __init__(self, seconds=0.0):
    self.seconds = seconds

  def __iter__(self):
    return Stream(self.seconds)


LENGTH = 40


def in_passes():
  """Options with which the streams are collected in two passes."""
  return dict(loss=loss, memory_limit=2_000)


def main():
  index, count, port = map(int, sys.argv[1:4])
  case, folder = sys.argv[4:]
  if port:
    jax.distributed.initialize(
      f'localhost:{port}', num_processes=count, process_id=index
    )
  if case.startswith('interrupted'):
    print('ready', flush=True)
    passes = case == 'interrupted in passes'
    moments = collect(
      Streams(0.05) if passes else Stream(0.05),
      checkpoint_dir=f'{folder}/sums',
      checkpoint_every=2,
      **(in_passes() if passes else {}),
    )
    out = numbers(moments)
  else:
    out = globals()[case](index)
  with open(f'{folder}/{index}.pkl', 'wb') as file:
    pickle.dump(out, file)


if __name__ == '__main__':
  main()
