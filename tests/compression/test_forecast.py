"""What `compress` will take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.compression import forecast
from utilized_rank.report.choice import Choice
from utilized_rank.report.choice import Stage

PARAMS = {'a': jnp.ones((8, 6)), 'b': jnp.ones((6, 8))}
X = jnp.ones((16, 8))


def fn(p, x):
  return jnp.tanh(x @ p['a']) @ p['b']


class Report:
  """What `compress` would take: seconds for each batch, and at the start."""

  def __init__(self, cold, batches, kept):
    start = 10.0 if cold else 1.0
    made = lambda name, each: Stage(
      name, start + each, 2 * (start + each), int(1000 + 10 * each)
    )
    self.choice = Choice(
      method='loss',
      damping=0.1,
      stages=(made('collect', 0.5 * batches), made('ranks', 2.0 * kept)),
    )


@pytest.fixture
def runs(monkeypatch):
  done = []

  def compress(fn, params, batches, *, few, progress, **options):
    done.append((len(batches), few))
    count = len(batches)
    return params, Report(len(done) == 1, count, min(count, 64))

  monkeypatch.setattr(forecast.compressing, 'compress', compress)
  return done


def test_further_batches_take_what_the_difference_says(runs):
  # 4 rows for each of 8 features are two batches; 1600 examples are 100, of
  # which 64 are kept to try ranks on.
  costs = ur.plan(fn, PARAMS, X, compress=True, examples=1600)
  assert runs == [(2, False), (2, False), (4, False)]
  collect, ranks = costs.stages
  assert collect.seconds == pytest.approx(10 + 0.5 * 100)
  assert ranks.seconds == pytest.approx(10 + 2.0 * 64)
  assert costs.cpu_seconds == pytest.approx(2 * costs.seconds)
  assert costs.host_bytes == pytest.approx(1000 + 10 * 2 * 64, abs=1)
  text = str(costs)
  assert '198 s, 396 s of all cores' in text and 'no limit' in text
  plain = ur.plan(fn, PARAMS, X)
  assert costs.sums_bytes == plain.sums_bytes
  assert not hasattr(plain, 'stages')


def test_few_examples_are_run_as_they_are(runs):
  costs = ur.plan(fn, PARAMS, X, compress=True, examples=16)
  assert runs == [(1, True)]
  assert [stage.seconds for stage in costs.stages] == [10.5, 12.0]


def test_shapes_cannot_be_run():
  shapes = jax.eval_shape(lambda: PARAMS)
  assert ur.plan(fn, shapes, X).sums_bytes
  with pytest.raises(ValueError, match='give arrays'):
    ur.plan(fn, shapes, X, compress=True)


def test_a_real_one_has_the_stages_of_compress():
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda v: jnp.asarray(rng.normal(size=v.shape), v.dtype), PARAMS
  )
  x = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
  options = {'params_fraction': 0.6, 'heads': False}
  costs = ur.plan(fn, params, x, compress=True, examples=64, **options)
  _, report = ur.compress(fn, params, [x], progress=False, **options)
  names = [stage.name for stage in report.choice.stages]
  assert [stage.name for stage in costs.stages] == names
  assert costs.seconds > 0 and costs.host_bytes > 2**20
