"""Ranks tried on data: masks stand for factors, and trials pay."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.factorization.decompose import decompose
from utilized_rank.ranks.trials import Trials
from utilized_rank.tree import paths

pytestmark = pytest.mark.slow


class Model(nn.Module):
  """A convolution, heads without biases, and a scanned stack."""

  @nn.compact
  def __call__(self, images):
    x = nn.relu(nn.Conv(12, (3, 3), name='conv')(images))
    x = x.reshape(len(x), -1, 12)
    y = nn.MultiHeadDotProductAttention(2, use_bias=False, name='heads')(x)
    stack = nn.scan(
      Block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=2,
    )
    x, _ = stack(name='blocks')(x + y, None)
    return nn.Dense(6, name='top')(x.mean(1))


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + jnp.tanh(nn.Dense(12, name='dense')(x)), None


KERNELS = [('.*kernel', True), ('.*', False)]


@pytest.fixture(scope='module')
def problem():
  rng = np.random.default_rng(0)
  # A few directions carry most of what the images differ in.
  basis = rng.normal(size=(6, 4 * 4 * 3)) * 0.6 ** np.arange(6)[:, None]
  images = (rng.normal(size=(64, 6)) @ basis).reshape(64, 4, 4, 3) + 0.2
  batches = list(jnp.asarray(images, jnp.float32).reshape(2, 32, 4, 4, 3))
  model = Model()
  params = model.init(jax.random.key(0), batches[0])
  params = jax.tree.map(lambda a: 2 * a, params)
  moments = ur.collect(
    model.apply,
    params,
    batches,
    loss=ur.sampled_cross_entropy(),
    select=KERNELS,
    progress=False,
  )
  return model.apply, params, moments, batches


def measured(fn, params, tree, batches):
  """Mean KL divergence of a tree with low-rank leaves."""
  small = jax.jit(ur.low_rank(fn))
  each = [
    ur.kl_divergence()(fn(params, x), small(tree, x), None) for x in batches
  ]
  return float(jnp.concatenate(each).mean())


@pytest.mark.parametrize('method', ['weight', 'output', 'loss'])
@pytest.mark.parametrize('mean', [True, False])
def test_masks_stand_for_factors_of_those_ranks(problem, method, mean):
  fn, params, moments, batches = problem
  families = decompose(
    params, moments, method=method, compensate_mean=mean, progress=False
  )
  trials = Trials(fn, params, moments, batches, ur.kl_divergence(), at_once=3)
  rng = np.random.default_rng(1)
  full = {p: moments[p].layout.full_rank for p in moments}
  candidates = [
    {
      p: int(rng.integers(1, r + 1))
      for p, r in full.items()
      if rng.random() < s
    }
    for s in (0.3, 0.8, 1.0, 0.6)
  ]
  found = trials.measure(candidates, families).mean(1)
  for ranks, value in zip(candidates, found, strict=True):
    tree = ur.factorize(
      params,
      moments,
      ranks,
      method=method,
      compensate_mean=mean,
      families=families,
      progress=False,
    )
    # Factors in float32, balanced and not.
    assert value == pytest.approx(
      measured(fn, params, tree, batches), rel=1e-3, abs=1e-6
    )
  (nothing,) = trials.measure([{}], families)
  assert nothing.max() < 1e-6


def masked(params, moments, families, masks):
  """Pairs A diag(mask), B, what they lose in the mean given back."""
  named, treedef = paths.flatten(params)
  for path, mask in masks.items():
    layout, entry = moments[path].layout, moments[path].entry
    mean = np.asarray(moments[path].mean, np.float32)
    mean = mean.reshape(len(mask), -1)
    pairs = [
      [v.astype(np.float32) for v in family.factors]
      for family in families[path]
    ]
    a = jnp.stack([a * k for (a, _), k in zip(pairs, mask)])
    b = jnp.stack([b for _, b in pairs])
    lost = jnp.stack(
      [(mu @ a * (1 - k)) @ b for (a, b), k, mu in zip(pairs, mask, mean)]
    )
    groups, c = layout.group_shape, None
    if entry.bias is None:
      c = lost.reshape(groups + layout.output_shape)
    else:
      bias = named[entry.bias]
      constant = entry.bias_scale * lost.reshape(bias.shape)
      named[entry.bias] = bias + constant
    leaf = ur.LowRank(
      a.reshape(groups + layout.input_shape + (-1,)),
      b.reshape(groups + (-1,) + layout.output_shape),
      c,
      layout,
    )
    named[path] = leaf
  return paths.unflatten(treedef, named)


def test_slopes_are_derivatives_by_the_masks(problem):
  fn, params, moments, batches = problem
  families = decompose(params, moments, method='loss', progress=False)
  trials = Trials(fn, params, moments, batches, ur.kl_divergence())
  ranks = {p: moments[p].layout.full_rank // 2 for p in moments}
  slopes = trials.slopes(ranks, families)
  masks = {
    path: np.tile(np.arange(layout.full_rank) < ranks[path], (n, 1)).astype(
      np.float32
    )
    for path, layout in ((p, moments[p].layout) for p in moments)
    for n in [layout.num_groups]
  }
  small = ur.low_rank(fn)

  def value(masks):
    tree = masked(params, moments, families, masks)
    each = [
      ur.kl_divergence()(fn(params, x), small(tree, x), None) for x in batches
    ]
    return jnp.concatenate(each).mean()

  want = jax.jit(jax.grad(value))(masks)
  assert set(slopes) == set(want)
  for path, slope in slopes.items():
    # Sums of float32 products, in another order.
    np.testing.assert_allclose(
      slope, want[path], rtol=1e-3, atol=1e-4 * np.abs(want[path]).max()
    )


def kept(tree, moments):
  named, _ = paths.flatten(tree, lambda v: isinstance(v, ur.LowRank))
  whole = sum(int(np.prod(moments[p].layout.shape)) for p in moments)
  return sum(ur.count_params(named[p]) for p in moments) / whole


@pytest.mark.parametrize('gauge', [None, 'identity'])
def test_tuned_ranks_are_no_worse_than_any_prediction(problem, gauge):
  fn, params, moments, batches = problem
  tuned = ur.tune_ranks(
    fn,
    params,
    moments,
    batches,
    divergence=ur.kl_divergence(),
    params_fraction=0.5,
    gauge=gauge,
    progress=False,
  )
  families = tuned.families
  tree = ur.factorize(
    params,
    moments,
    tuned,
    method=families.method,
    damping=families.damping,
    families=families,
    gauge=gauge,
    progress=False,
  )
  assert kept(tree, moments) <= 0.5
  ours = measured(fn, params, tree, batches)
  assert ours == pytest.approx(tuned.divergence, rel=1e-3)
  assert tuned.divergence == min(
    t.divergence for t in tuned.trials if t.accepted
  )
  for method, metric in (('output', 'relative'), ('loss', 'loss')):
    ranks = ur.budget_ranks(
      params,
      moments,
      params_fraction=0.5,
      method=method,
      metric=metric,
      gauge=gauge,
      progress=False,
    )
    other = ur.factorize(
      params, moments, ranks, method=method, gauge=gauge, progress=False
    )
    assert ours <= measured(fn, params, other, batches) * (1 + 1e-3)


def test_a_correction_moves_ranks_to_where_they_matter():
  """One kernel's outputs are scaled away again: predictions by output energy
  are fooled, slopes are not."""
  rng = np.random.default_rng(0)
  params = {
    name: jnp.asarray(rng.normal(size=(16, 16)), jnp.float32)
    for name in ('loud', 'quiet')
  }
  x = jnp.asarray(
    rng.normal(size=(256, 16)) * 0.8 ** np.arange(16), jnp.float32
  )

  def fn(p, x):
    return 1e-3 * (100 * x @ p['loud']) + x @ p['quiet']

  moments = ur.collect(fn, params, [x], progress=False)
  options = dict(params_fraction=0.5, progress=False)
  predicted = ur.budget_ranks(params, moments, metric='output', **options)
  tuned = ur.tune_ranks(
    fn, params, moments, [x], divergence=ur.squared_error, **options
  )
  assert tuned['loud'] < predicted['loud']
  assert tuned['quiet'] > predicted['quiet']
  assert any(t.accepted and t.allocation == 'corrected' for t in tuned.trials)


def test_tuning_needs_data(problem):
  fn, params, moments, _ = problem
  with pytest.raises(ValueError, match='at least one batch'):
    ur.tune_ranks(
      fn,
      params,
      moments,
      [],
      divergence=ur.squared_error,
      params_fraction=0.5,
    )


def test_compress_reads_an_iterator_once_and_keeps_the_budget(problem):
  fn, params, _, batches = problem
  loss = ur.sampled_cross_entropy()
  moments = ur.collect(
    fn, params, batches, loss=loss, select=KERNELS, progress=False
  )
  ways = (
    (batches, {'select': KERNELS}),
    (iter(batches), {'select': KERNELS}),
    (batches, {'moments': moments}),
  )
  results, reports = zip(
    *(
      ur.compress(
        fn,
        params,
        source,
        params_fraction=0.4,
        loss=loss,
        trial_examples=32,
        progress=False,
        **options,
      )
      for source, options in ways
    )
  )
  named, _ = paths.flatten(results[0], lambda v: isinstance(v, ur.LowRank))
  kernels = [p for p in named if p.endswith('kernel')]
  whole = sum(int(np.prod(named[p].shape)) for p in kernels)
  assert sum(ur.count_params(named[p]) for p in kernels) <= 0.4 * whole
  for other in results[1:]:
    jax.tree.map(np.testing.assert_array_equal, results[0], other)
  recipe = reports[0].recipe
  assert recipe.gauge == 'identity'
  shapes = lambda tree: jax.tree.map(lambda v: (v.shape, v.dtype), tree)
  abstract = recipe.abstract(jax.eval_shape(lambda: params))
  assert shapes(abstract) == shapes(results[0])


def scarce(seed, examples, rank):
  """A linear function of inputs in a subspace, or everywhere alike."""
  rng = np.random.default_rng(seed)
  params = {'w': jnp.asarray(rng.normal(size=(24, 16)), jnp.float32)}
  directions = rng.normal(size=(rank, 24)) if rank < 24 else np.eye(24)
  rows = rng.normal(size=(examples, rank)) @ directions
  return lambda p, x: x @ p['w'], params, jnp.asarray(rows, jnp.float32)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('split', [1, 2])
def test_few_rows_that_say_nothing_leave_the_truncated_svd(seed, split):
  """White inputs: the best factors are those of W, not of 12 examples."""
  fn, params, x = scarce(seed, 12, 24)
  small, report = ur.compress(
    fn, params, jnp.split(x, split), params_fraction=0.5, progress=False
  )
  moments = ur.collect(fn, params, [x], progress=False)
  ranks = ur.uniform_ranks(
    params, moments, params_fraction=0.5, gauge='identity'
  )
  want = ur.factorize(
    params,
    moments,
    ranks,
    method='weight',
    compensate_mean=False,
    gauge='identity',
    progress=False,
  )
  jax.tree.map(np.testing.assert_array_equal, small, want)
  assert report.recipe.method == 'weight'
  assert not report.recipe.compensate_mean


def test_few_rows_that_say_something_are_followed():
  """Inputs in two of 24 dimensions: no other direction of W is needed."""
  fn, params, x = scarce(0, 12, 2)
  small, report = ur.compress(
    fn, params, [x], params_fraction=0.25, progress=False
  )
  # 'output' and 'loss' are equally exact here: rounding decides between them.
  assert report.recipe.method != 'weight'
  other = scarce(0, 200, 2)[2]
  want = fn(params, other)
  error = np.linalg.norm(ur.low_rank(fn)(small, other) - want)
  assert error < 1e-3 * np.linalg.norm(want)  # float32 sums


def test_one_example_is_not_believed():
  fn, params, x = scarce(0, 1, 2)
  _, report = ur.compress(fn, params, [x], params_fraction=0.5, progress=False)
  assert report.recipe.method == 'weight'


def test_moments_have_their_kernels_already(problem):
  fn, params, moments, batches = problem
  with pytest.raises(ValueError, match='give one of them'):
    ur.compress(
      fn, params, batches, moments=moments, select=KERNELS, params_fraction=0.5
    )


def test_factors_fitted_behind_compressed_kernels_must_pay(problem):
  """compress takes anchored factors only where outputs come closer."""
  fn, params, _, batches = problem
  options = dict(
    params_fraction=0.3,
    loss=ur.sampled_cross_entropy(),
    select=KERNELS,
    progress=False,
  )
  plain, _ = ur.compress(fn, params, batches, anchored=False, **options)
  best, _ = ur.compress(fn, params, batches, **options)
  before, after = (measured(fn, params, t, batches) for t in (plain, best))
  assert after <= before * (1 + 1e-3)


def test_compress_leaves_out_what_is_not_selected():
  """A parameter that enters an opaque call is no hindrance then."""
  rng = np.random.default_rng(0)
  params = {
    'w': jnp.asarray(rng.normal(size=(8, 8)), jnp.float32),
    'hidden': jnp.ones(8),
  }
  x = jnp.asarray(rng.normal(size=(64, 8)) * 0.7 ** np.arange(8), jnp.float32)

  def fn(p, x):
    shape = jax.ShapeDtypeStruct((8,), jnp.float32)
    return x @ p['w'] + jax.pure_callback(np.asarray, shape, p['hidden'])

  small, _ = ur.compress(
    fn,
    params,
    [x],
    params_fraction=0.75,
    select=[('w', True), ('hidden', False)],
    progress=False,
  )
  assert small['w'].rank < 8


def attention(width=12):
  """Queries and keys of rank 7 whose heads have 2 directions in common."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape) / width**0.5
  params = {name: draw(width, width) for name in ('q', 'k', 'v', 'o', 'up')}
  features = np.linalg.qr(draw(width, width))[0]
  for name, own in (('q', range(7)), ('k', [0, 1, *range(7, 12)])):
    basis = features[:, list(own)]
    params[name] = params[name] @ basis @ basis.T
  params['head'] = draw(width, 4)

  def fn(p, x):
    scores = (x @ p['q']) @ jnp.swapaxes(x @ p['k'], 1, 2)
    y = x + (jax.nn.softmax(scores) @ (x @ p['v'])) @ p['o']
    y = y + jax.nn.relu(y @ p['up'])
    return 4 * y.mean(1) @ p['head']

  x = rng.normal(size=(4, 16, 8, width)).astype(np.float32)
  return (
    fn,
    jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params),
    list(x),
  )


def test_heads_are_narrowed_where_that_is_nearer(tmp_path):
  fn, params, batches = attention()
  select = [('head', False), ('.*', True)]
  options = dict(
    params_fraction=0.6,
    loss=ur.sampled_cross_entropy(),
    select=select,
    progress=False,
  )
  plain, _ = ur.compress(fn, params, batches, heads=False, **options)
  small, report = ur.compress(fn, params, batches, **options)
  assert isinstance(small['q'], ur.NarrowHeads)
  assert small['q'].rank == small['k'].rank <= 6
  kernels = [n for n in params if n != 'head']
  left = sum(ur.count_params(small[n]) for n in kernels)
  assert left <= 0.6 * sum(params[n].size for n in kernels)
  before, after = (measured(fn, params, t, batches) for t in (plain, small))
  assert after < before
  report.recipe.save(tmp_path / 'recipe.json')
  recipe = ur.Recipe.load(tmp_path / 'recipe.json')
  shapes = lambda tree: jax.tree.map(lambda v: (v.shape, v.dtype), tree)
  abstract = recipe.abstract(jax.eval_shape(lambda: params))
  assert shapes(abstract) == shapes(small)
  assert recipe.ranks['q'] == small['q'].rank


def test_attention_alone_is_narrowed():
  fn, params, batches = attention()
  kernels = ('q', 'k', 'v', 'o')
  small, report = ur.compress(
    fn,
    params,
    batches,
    params_fraction=0.6,
    gauge=None,
    loss=ur.sampled_cross_entropy(),
    select=[(f'({"|".join(kernels)})', True), ('.*', False)],
    progress=False,
  )
  # Two directions are all that scores depend on: with them the rest may stay.
  assert report.recipe.ranks == {'q': 2, 'k': 2}
  assert isinstance(small['q'], ur.NarrowHeads) and small['v'] is params['v']
  left = sum(ur.count_params(small[name]) for name in kernels)
  assert left <= 0.6 * sum(params[name].size for name in kernels)
  assert measured(fn, params, small, batches) < 1e-6


@pytest.mark.parametrize(
  'options',
  [
    {'params_fraction': 0.6},
    {'flops_fraction': 0.6, 'loss': ur.sampled_cross_entropy()},
  ],
)
def test_heads_want_gradients_and_a_share_of_parameters(options):
  fn, params, batches = attention()
  loss = options.get('loss')
  moments = ur.collect(fn, params, batches, loss=loss, progress=False)
  small, _ = ur.compress(
    fn, params, batches, moments=moments, progress=False, **options
  )
  assert not any(isinstance(leaf, ur.NarrowHeads) for leaf in small.values())


def test_several_processes_are_refused(monkeypatch):
  fn, params, batches = attention()
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(ValueError, match='there are 2: collect'):
    ur.compress(fn, params, batches, params_fraction=0.5, progress=False)
