"""Kinds of compression that `compress` tries, and which one it keeps."""

import dataclasses
import time

import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.compression.candidates import Beginning
from utilized_rank.compression.candidates import Tried
from utilized_rank.compression.candidates import nearest
from utilized_rank.compression.candidates import promising
from utilized_rank.compression.factor_pairs import factor_pairs
from utilized_rank.compression.journal import Journal
from utilized_rank.compression.narrower_heads import narrower_heads
from utilized_rank.compression.problem import Budget
from utilized_rank.compression.problem import Problem


def tried(name, *divergences):
  return Tried(
    tree=name, ranks={}, method='output', divergences=np.array(divergences)
  )


def problem(rows=64, **budget):
  """tanh(x A) B, of which `rows` rows are known."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {'a': draw(6, 8), 'b': draw(8, 6)}
  fn = lambda p, x: jnp.tanh(x @ p['a']) @ p['b']
  squares = lambda outputs, batch: (outputs**2).sum(-1)
  batches = [draw(rows, 6)]
  return Problem(
    fn=fn,
    params=params,
    start=params,
    moments=ur.collect(fn, params, batches, loss=squares, progress=False),
    batches=batches,
    training=batches,
    budget=Budget(**budget),
    divergence=ur.squared_error,
    loss=squares,
    anchored=True,
    progress=False,
  )


@pytest.mark.quick
def test_a_later_one_must_come_closer_by_more_than_chance():
  first = tried('first', 2.0, 4.0)
  same = tried('same', 2.0, 4.0)
  chance = tried('chance', 3.0, 1.0)  # nearer by 1, the error is 1.41
  closer = tried('closer', 1.0, 3.5)
  farther = tried('farther', 1.5, 3.8)
  assert nearest(first, []) is first
  assert nearest(first, [None, same, chance]) is first
  assert nearest(first, [chance, closer, None, farther]) is closer


def test_comparisons_are_written_down():
  journal = Journal()
  two = [tried('b', 1.0, 3.0), tried('c', 9.0, 9.0)]
  two = [dataclasses.replace(one, name=one.tree) for one in two]
  nearest(tried('a', 2.0, 5.0), two, journal)
  first, second = journal.contenders
  assert (first.name, first.divergence, first.gain) == ('b', 2.0, 1.5)
  assert first.error == pytest.approx(0.5 / 2**0.5)
  assert (first.chosen, second.chosen, second.gain) == (True, False, -7.0)


def test_stages_have_their_own_time():
  journal = Journal()
  with journal.stage('all'), journal.stage('one') as at:
    with journal.stage('two'):
      time.sleep(0.1)
    at.before, at.after = 2.0, 1.0
  names = [stage.name for stage in journal.stages]
  assert names == ['one: two', 'one', 'all']
  two, one, whole = journal.stages
  assert two.seconds >= 0.1
  # Not what is inside; starting a thread takes under a tenth of a second.
  assert one.seconds < 0.1 and whole.seconds < 0.1
  assert (one.before, one.after, two.after) == (2.0, 1.0, None)


def test_others_are_made_one_by_one():
  """Each is judged before the next is made, so its tree can be let go."""
  made = []

  def make(name, each):
    made.append(name)
    return tried(name, each, each)

  others = (make(name, 1.0 / i) for i, name in enumerate('abc', 1))
  assert nearest(tried('first', 2.0, 2.0), others).tree == 'c'
  assert made == ['a', 'b', 'c']


def test_pairs_of_what_is_left_keep_what_is_done():
  """Another kind took A; B alone is compressed, judged with A as it is now."""
  whole = problem(params_fraction=0.5, multiple_of=2, gauge='identity')
  start = whole.params | {'a': 0.9 * whole.params['a']}
  left = whole.left(start, whole.moments.only(['b']), 0.8)
  assert left.budget == Budget(0.8, None, 2, 'identity')
  found = factor_pairs(left)
  assert found.tree['a'] is start['a'] and list(found.ranks) == ['b']
  assert ur.count_params(found.tree['b']) <= 0.8 * whole.params['b'].size
  y = np.asarray(whole.fn(whole.params, whole.batches[0]), np.float64)
  small = ur.low_rank(whole.fn)(found.tree, whole.batches[0])
  error = np.sum((y - np.asarray(small)) ** 2, 1)
  want = error / np.mean(np.sum(y**2, 1))
  # Tuned with masks over factors of full rank: float32 sums in another order.
  np.testing.assert_allclose(found.divergences, want, rtol=1e-5)


@pytest.mark.parametrize(
  'rows, budget',
  [
    (64, {'params_fraction': 0.5}),  # no attention
    (12, {'params_fraction': 0.5}),  # few rows
    (64, {'flops_fraction': 0.5}),
  ],
)
def test_no_heads_are_no_candidate(rows, budget):
  assert narrower_heads(problem(rows, **budget)) == []


def test_a_budget_is_one_share():
  assert Budget(params_fraction=0.3).fraction == 0.3
  for options in ({}, {'params_fraction': 0.5, 'flops_fraction': 0.5}):
    with pytest.raises(ValueError, match='give one of them'):
      Budget(**options)


@pytest.mark.parametrize(
  ('glances', 'names'),
  [
    ([4.0, 1.0, 2.0], 'bc'),
    # Below zero is rounding, as is what is as far above.
    ([1e-8, -2e-8, 3e-8, 1.0], 'abc'),
    ([np.nan, 1.0, np.inf], 'b'),
    # None of them tells.
    ([np.nan, np.nan], 'ab'),
  ],
)
def test_where_a_search_begins(glances, names):
  begin = lambda name, far: Beginning(name, lambda: far, lambda: None)
  found = promising(list(map(begin, 'abcd', glances)))
  assert ''.join(one.name for one in found) == names
