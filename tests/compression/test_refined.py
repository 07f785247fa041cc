"""Trees are trained before or after they are compared, as `then` says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.compression import compress as compressing
from utilized_rank.compression.candidates import Beginning
from utilized_rank.compression.candidates import Compressed
from utilized_rank.compression.journal import Journal
from utilized_rank.compression.problem import Budget
from utilized_rank.compression.problem import Problem
from utilized_rank.compression.refined import rehearsed
from utilized_rank.refit.distill import hold_out

RNG = np.random.default_rng(0)
X = RNG.normal(size=(320, 8)).astype(np.float32) * np.arange(1, 9) / 4


def draw(*shape):
  return RNG.normal(size=shape).astype(np.float32) / 2


def fn(p, x):
  h = jax.nn.relu(x @ p['up'] + p['bias'])
  return jax.nn.relu(h @ p['middle']) @ p['down']


PARAMS = {
  'up': draw(8, 16), 'bias': draw(16), 'middle': draw(16, 16),
  'down': draw(16, 4),
}  # fmt: skip
OPTIONS = dict(
  params_fraction=0.4, loss=ur.sampled_cross_entropy(), refine=60,
  progress=False,
)  # fmt: skip


def far(tree, batches):
  """Float64, KL divergences of examples, by formula."""
  x = np.concatenate(batches)
  run = lambda p: np.asarray(ur.low_rank(fn)(p, jnp.asarray(x)), np.float64)
  log_p, log_q = (
    y - np.log(np.exp(y).sum(-1, keepdims=True))
    for y in (run(PARAMS), run(tree))
  )
  return np.sum(np.exp(log_p) * (log_p - log_q), -1)


@pytest.mark.slow
def test_what_training_brings_nearest_is_taken():
  """No further off, after training, than what is nearest before it."""
  batches = [X]
  before, _ = ur.compress(fn, PARAMS, batches, **OPTIONS)
  after, report = ur.compress(
    fn, PARAMS, batches, then='finetune', **OPTIONS
  )  # fmt: skip
  _, held = hold_out(batches)
  mine, other = far(after, held), far(before, held)
  error = (mine - other).std() / len(mine) ** 0.5
  # Another kind replaces the first only beyond the standard error.
  assert mine.mean() <= other.mean() + error + 1e-6
  choice = report.choice
  trained = [c for c in choice.contenders if c.judged.endswith('training')]
  names = [c.name for c in trained]
  assert names[0].startswith('pairs') and 'pairs of one prediction' in names
  chosen = [c for c in trained if c.chosen][-1]
  assert chosen.divergence == pytest.approx(mine.mean(), rel=1e-4)
  stages = [stage.name for stage in choice.stages]
  assert {f'refine {name}' for name in names} <= set(stages)
  assert 'refine' not in stages
  # The choice is told as always: on the examples that are kept.
  assert choice.divergence == pytest.approx(far(after, [X]).mean(), rel=1e-4)
  kept = sum(ur.count_params(after[k]) for k in ('up', 'middle', 'down'))
  assert kept <= 0.4 * sum(PARAMS[k].size for k in ('up', 'middle', 'down'))


def test_the_nearest_before_may_lose():
  """A tree whose factor can be given back, and a nearer one that has none."""
  true = draw(8, 4)
  run = lambda p, x: x @ p['w']
  layout = ur.Layout.of((8, 4), inputs=(0,), outputs=(1,))
  pair = lambda rank, scale: ur.LowRank(
    jnp.asarray(scale * true[:, :rank]), jnp.eye(rank, 4), None, layout
  )
  trees = {'near': pair(3, 1.0), 'far': pair(4, 0.35)}
  batches = [jnp.asarray(X)]
  problem = Problem(
    fn=run, params={'w': jnp.asarray(true)}, start=None, moments=None,
    batches=batches, training=batches, budget=Budget(params_fraction=0.9),
    divergence=ur.squared_error, loss=None, anchored=False, progress=False,
    journal=Journal(), few=False,
  )  # fmt: skip

  def begin(name):
    made = Compressed(tree={'w': trees[name]}, ranks={}, method='', name=name)
    glance = lambda: problem.glance(made.tree)
    search = lambda: made.judged(problem.divergences(made.tree, batches))
    return Beginning(name, glance, search)

  kind = lambda problem: [begin('near'), begin('far')]
  choose = lambda is_tuned: (
    compressing._choose(problem, [kind], 400, is_tuned).name
  )
  assert (
    begin('near').glance()
    < begin('far').glance()
    < 2 * (begin('near').glance())
  )
  assert (choose(False), choose(True)) == ('near', 'far')


def test_examples_that_train_do_not_judge():
  true = draw(8, 4)
  layout = ur.Layout.of((8, 4), inputs=(0,), outputs=(1,))
  small = {'w': ur.LowRank(jnp.asarray(true[:, :2]), jnp.eye(2, 4), None,
                           layout)}  # fmt: skip
  batches = [jnp.asarray(x) for x in np.split(X, 10)]
  problem = Problem(
    fn=lambda p, x: x @ p['w'], params={'w': jnp.asarray(true)}, start=None,
    moments=None, batches=batches[:3], training=batches,
    budget=Budget(params_fraction=0.9), divergence=ur.squared_error, loss=None,
    anchored=False, progress=False,
  )  # fmt: skip
  made = Compressed(tree=small, ranks={}, method='', name='it')
  found = rehearsed(problem, made, 5)
  assert len(found.divergences) == 64  # every fifth of ten batches of 32


@pytest.mark.parametrize(
  ('options', 'says'),
  [
    ({'then': 'serve'}, "then='serve'; 'finetune' chooses"),
    ({'then': 'finetune', 'refine': 0}, 'refine=0: give a number'),
  ],
)
def test_what_cannot_be_compared_is_said(options, says):
  with pytest.raises(ValueError, match=says):
    ur.compress(fn, PARAMS, [X], **{**OPTIONS, **options})
