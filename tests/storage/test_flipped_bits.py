"""One bit of a file is another: it is refused, or reads as it was written.

Arrays of a checkpoint are in test_checkpoint.py. Tensors of a safetensors file
have no checksum by its format, so that here it is its header alone.
"""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.experiment.workdir import Workdir
from utilized_rank.models.importing.files import safetensors_file
from utilized_rank.ranks.latency import LatencyTable
from utilized_rank.storage import checkpoint

RNG = np.random.default_rng(0)
FLIPS = 80


@pytest.fixture(scope='module')
def made():
  fn = lambda p, x: jnp.tanh(x @ p['w'] + p['b']) @ p['v']
  draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
  params = {'w': draw(6, 8), 'b': draw(8), 'v': draw(8, 3)}
  moments = ur.collect(fn, params, [draw(64, 6)], progress=False)
  ranks = dict.fromkeys(moments, 2)
  small = ur.factorize(params, moments, ranks, gauge='identity', progress=False)
  return params, moments, small, ur.Recipe.of(small, moments, ranks)


def tensors(path):
  found, others = safetensors_file.read(path)
  return {name: (t.shape, t.read().tobytes()) for name, t in found.items()}


def written(kind, made, folder):
  """The file, how many of its bytes are flipped, and what reads it."""
  params, moments, small, recipe = made
  path = folder / kind
  if kind in ('moments', 'tree'):
    ur.save(path, moments if kind == 'moments' else small, metadata={'step': 3})
    read = lambda: (ur.load(path), checkpoint.load_metadata(path))
    return path / '_CHECKPOINT_METADATA', None, read
  if kind == 'file of one process':
    checkpoint.save_file(path, jax.device_get(moments), {'a': 1})
    return path, None, lambda: checkpoint.load_file(path)
  if kind == 'recipe':
    recipe.save(path)
    return path, None, lambda: ur.Recipe.load(path).json()
  if kind == 'report':
    ur.measure(params, moments).save(path)
    return path, None, lambda: ur.Report.load(path).json()
  if kind == 'latency table':
    LatencyTable({}, {(4, 3, 2): (0.5, (1,), (0.25,))}, {'a': 1}).save(path)
    return path, None, lambda: vars(LatencyTable.load(path))
  if kind == 'result of a stage':
    run = Workdir(path, {})
    read = lambda: run.stage('train', lambda: {'loss': 3.25, 'name': 'dense'})
    read()
    return path / 'stages/train.json', None, read
  ur.save_safetensors(path, small, recipe=recipe)
  file = path / 'model.safetensors'
  header = 8 + int.from_bytes(file.read_bytes()[:8], 'little')
  return file, header, lambda: tensors(file)


def same(one, two):
  leaves = [jax.tree.leaves(tree) for tree in (one, two)]
  return jax.tree.structure(one) == jax.tree.structure(two) and all(
    np.array_equal(a, b, equal_nan=isinstance(a, (float, np.ndarray)))
    for a, b in zip(*leaves, strict=True)
  )


@pytest.mark.parametrize(
  'kind',
  [
    'moments',
    'tree',
    'file of one process',
    'recipe',
    'report',
    'latency table',
    'result of a stage',
    'safetensors',
  ],
)
def test_a_flipped_bit_is_refused_or_harmless(kind, made, tmp_path):
  path, most, read = written(kind, made, tmp_path)
  want, content = read(), path.read_bytes()
  draw = random.Random(0)
  refused = 0
  for _ in range(FLIPS):
    flipped = bytearray(content)
    flipped[draw.randrange(most or len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(flipped)
    try:
      got = read()
    except ValueError:
      refused += 1
    else:
      if kind == 'safetensors':  # a name, or the recipe in its metadata
        got = dict(zip(want, got.values(), strict=True))
      assert same(got, want)
  assert refused
  path.write_bytes(content)
  assert same(read(), want)
