"""What `compress` says that it chose is what the tree holds."""

import contextlib
import io

import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.compression import describe
from utilized_rank.host import progress

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
PARAMS = {
  'a': draw(8, 12) / 3,
  'b': draw(12, 8) / 3,
  'thin': draw(8, 1) / 3,
  'out': draw(8, 4),
  'table': draw(4, 3),
}
X = draw(96, 8) * jnp.arange(1, 9) / 8


def fn(p, x):
  h = jnp.tanh(x @ p['a']) @ p['b']
  logits = (h * (h @ p['thin'])) @ p['out']
  return logits + p['table'][jnp.zeros(len(x), int)].sum(1, keepdims=True)


SELECT = [('out', False), ('table', False), ('.*', True)]


@pytest.fixture(scope='module')
def made():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(progress, 'LINE_INTERVAL', 0.2)
    with contextlib.redirect_stderr(io.StringIO()) as said:
      small, report = ur.compress(
        fn,
        PARAMS,
        [X[:48], X[48:]],
        params_fraction=0.6,
        select=SELECT,
        loss=ur.sampled_cross_entropy(),
        gauge=None,
        layers=False,
      )
  return small, report, said.getvalue()


def test_every_kernel_is_told(made):
  small, report, _ = made
  known = {kept.path: kept for kept in report.choice.kernels}
  assert set(known) >= {'a', 'b', 'thin', 'out'}
  for path in ('a', 'b'):
    kept = known[path]
    assert kept.kind == 'pair' and kept.rank == small[path].rank
    assert kept.most == 8 and kept.before == 96
    assert kept.after == ur.count_params(small[path])
    assert kept.predicted > 0
  # One column: no pair is smaller.
  assert known['thin'].why == describe.NO_PAIR
  assert known['out'].why == 'not selected'
  total = sum(known[path].after for path in ('a', 'b', 'thin'))
  assert f'kept {100 * total / 200:.1f} % of 200: 2 pairs' in report.choice.line


def test_predictions_are_those_of_predict_loss(made):
  _, report, _ = made
  choice = report.choice
  if choice.method != 'loss':
    pytest.skip('other factors were nearer')
  moments = ur.collect(
    fn,
    PARAMS,
    [X[:48], X[48:]],
    loss=ur.sampled_cross_entropy(),
    select=SELECT,
    progress=False,
  )
  want = ur.predict_loss(
    PARAMS,
    moments,
    {k.path: k.rank for k in choice.changed},
    damping=choice.damping,
  )
  got = sum(kept.predicted for kept in choice.changed)
  # The same sums in another order.
  assert got == pytest.approx(want, rel=1e-5)


def test_stages_and_contenders_are_told(made):
  _, report, said = made
  choice = report.choice
  names = [stage.name for stage in choice.stages]
  assert names == [
    'collect', 'measure', 'ranks', 'anchor', 'refine', 'compress'
  ]  # fmt: skip
  ranks = choice.stages[2]
  assert ranks.seconds > 0 and ranks.after is not None
  assert choice.contenders[0].name == 'pairs'
  assert choice.unit == 'nats'
  assert said.splitlines()[-1] == choice.line
  # Compiling takes longer than a fifth of a second.
  assert any(line.startswith('collect') for line in said.splitlines())
  assert 'ranks: ' in said
  assert max(map(len, said.splitlines())) <= 100
  assert str(report).count(choice.line) == 1


def test_trials_tell_what_the_cut_directions_cost():
  """Against finite differences: a direction of a kernel is given back a bit."""
  batches = [X]
  moments = ur.collect(fn, PARAMS, batches, select=SELECT, progress=False)
  tuned = ur.tune_ranks(
    fn,
    PARAMS,
    moments,
    batches,
    divergence=ur.squared_error,
    params_fraction=0.6,
    compensate_mean=False,
    rounds=1,
    progress=False,
  )
  assert tuned.effects
  at = lambda ranks: ur.merge(
    ur.factorize(
      PARAMS,
      moments,
      ranks,
      families=tuned.families,
      method=tuned.families.method,
      compensate_mean=False,
    )
  )
  cut, full = at(tuned), at({path: 8 for path in tuned})
  step = 1e-2
  for path, effect in tuned.effects.items():
    each = [
      ur.squared_error(
        fn(PARAMS, X),
        fn(cut | {path: cut[path] + s * (full[path] - cut[path])}, X),
        X,
      ).mean()
      for s in (-step, step)
    ]
    want = max(0.0, float(each[0] - each[1]) / (2 * step))
    # Central differences of float32 means.
    assert effect == pytest.approx(want, rel=0.05, abs=1e-4)


@pytest.mark.parametrize('given', [False, True])
def test_no_batch_is_said(given):
  moments = None
  if given:
    with pytest.warns(UserWarning, match='rows'):
      moments = ur.collect(fn, PARAMS, [X[:6]], select=SELECT, progress=False)
      ur.measure(PARAMS, moments, progress=False)
  with pytest.raises(ValueError, match='at least one batch to try ranks on'):
    ur.compress(
      fn, PARAMS, [], moments=moments, params_fraction=0.5, progress=False
    )


def test_silence_where_it_is_asked_for(capsys):
  anew = lambda params, x: fn(params, x)  # nothing is compiled for it yet
  _, report = ur.compress(
    anew, PARAMS, [X], params_fraction=0.7, progress=False, select=SELECT,
    anchored=False, refine=20,
  )  # fmt: skip
  assert capsys.readouterr() == ('', '')
  assert report.choice.unit == "of the outputs' energy"
