"""Padding is left out of every sum, exactly; what mixes examples is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.collection import running_sums

collect = functools.partial(ur.collect, progress=False)
D, T, V = 8, 6, 11


@pytest.fixture(scope='module')
def params():
  rng = np.random.default_rng(0)
  shapes = {
    'embed': (V, D),
    'q': (D, 2, 4),
    'k': (D, 2, 4),
    'v': (D, 2, 4),
    'o': (2, 4, D),
    'stack': (2, D, D),
    'pool': (D, D),
    'head': (D, V),
  }
  return {
    name: rng.normal(size=shape).astype(np.float32) / np.sqrt(D)
    for name, shape in shapes.items()
  }


def transformer(params, batch):
  """Embedding, masked attention, a scanned MLP, two pooled heads."""
  real = batch['real'].astype(bool)
  h = params['embed'][batch['ids']]
  q, k, v = (jnp.einsum('btd,dhe->bthe', h, params[n]) for n in 'qkv')
  scores = jnp.einsum('bthe,bshe->bhts', q, k)
  scores = jnp.where(real[:, None, None], scores, -1e9)
  a = jnp.einsum('bhts,bshe->bthe', jax.nn.softmax(scores), v)
  h = h + jnp.einsum('bthe,hed->btd', a, params['o'])
  h, _ = jax.lax.scan(
    jax.remat(lambda h, w: (h + jnp.tanh(h @ w), None)), h, params['stack']
  )
  flat = h.reshape(-1, h.shape[-1])
  logits = (flat @ params['head']).reshape(*h.shape[:2], V)
  first = jnp.tanh(h[:, 0] @ params['pool'])
  return logits, first


def token_loss(outputs, batch):
  logits, first = outputs
  nats = -jnp.take_along_axis(
    jax.nn.log_softmax(logits), batch['ids'][..., None], axis=-1
  )[..., 0]
  return (nats * batch['real']).sum(1) + (first**2).sum(1)


def sequences(n=7):
  """Sequences without padding, a batch of one each."""
  rng = np.random.default_rng(1)
  return [
    {
      'ids': rng.integers(0, V, (1, length)),
      'real': np.ones((1, length), np.float32),
    }
    for length in rng.integers(1, T + 1, n)
  ]


def padded(parts, rows):
  """The same as one batch of `rows`, filled with tokens that mean nothing."""
  ids = np.full((rows, T), 3)
  real = np.zeros((rows, T), np.float32)
  for i, part in enumerate(parts):
    length = part['ids'].shape[1]
    ids[i, :length], real[i, :length] = part['ids'][0], 1
  return {'ids': ids, 'real': real}


def assert_equal(got, want, tolerance=1e-6):
  assert list(got) == list(want)
  for path in want:
    np.testing.assert_array_equal(got[path].count, want[path].count)
    names = ['mean', 'second']
    if want[path].grad is not None:
      names += ['grad_second', 'rows_per_example']
    for name in names:
      b = np.asarray(getattr(want[path], name))
      np.testing.assert_allclose(
        getattr(got[path], name), b, atol=tolerance * np.abs(b).max()
      )


def careless_loss(outputs, batch):
  """As `token_loss`, of a user who does not think of padding."""
  return token_loss(outputs, {**batch, 'real': jnp.ones_like(batch['real'])})


@pytest.mark.parametrize('token_loss', [token_loss, careless_loss])
@pytest.mark.parametrize('devices', [1, 4])
def test_padded_tokens_do_not_count(params, devices, token_loss):
  """Equal to one sequence at a time; the last batch is uneven."""
  parts = sequences()
  want = collect(transformer, params, parts, loss=token_loss)
  batches = [padded(parts[:4], 4), padded(parts[4:], 3)]
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ('x',))
  got = collect(
    transformer, params, batches, loss=token_loss, mask='real', mesh=mesh
  )
  # float32, sums in another order; attention over more columns.
  assert_equal(got, want, 3e-6)
  n = sum(p['ids'].size for p in parts)
  assert got['head'].count == n and got['pool'].count == len(parts)


def test_padded_tokens_do_not_count_in_outputs(params):
  """T of what is real is W^T S W, for kernels of tokens and of examples."""
  parts = sequences()
  real = collect(transformer, params, parts)
  batches = [padded(parts[:4], 4), padded(parts[4:], 3)]
  got = collect(
    transformer, params, batches, mask='real', from_outputs=[('.*', True)]
  )
  for path, moment in real.items():
    w = moment.layout.to_matrices(params[path])
    want = np.swapaxes(w, -1, -2) @ moment.second @ w
    scale = np.abs(want).max()
    np.testing.assert_allclose(got[path].output_second, want, atol=3e-6 * scale)
    np.testing.assert_array_equal(got[path].count, moment.count)
    np.testing.assert_allclose(got[path].mean, moment.mean, atol=1e-5)


def mlp(params, x):
  h = jnp.tanh(x @ params['first'])
  return h @ params['second']


@pytest.fixture(scope='module')
def small():
  rng = np.random.default_rng(2)
  return {
    'first': rng.normal(size=(5, 6)).astype(np.float32),
    'second': rng.normal(size=(6, 3)).astype(np.float32),
  }


def squares(outputs, batch):
  del batch
  return (outputs**2).sum(tuple(range(1, outputs.ndim)))


@pytest.mark.parametrize('shape', [(), (4,), (2, 3)])
@pytest.mark.parametrize('pmap', [False, True])
def test_padded_examples_do_not_count(small, shape, pmap):
  """Whatever is in them, NaN too."""
  rng = np.random.default_rng(3)
  x = rng.normal(size=(16, *shape, 5)).astype(np.float32)
  real = rng.uniform(size=16) < 0.6
  want = collect(mlp, small, [x[real]], loss=squares)
  dirty = np.where(real.reshape(-1, *[1] * (x.ndim - 1)), x, np.nan)
  mask = lambda batch: np.isfinite(batch[..., 0]).all(
    tuple(range(1 + pmap, batch.ndim - 1))
  )
  if pmap:
    copies = jax.tree.map(lambda a: np.stack([a] * 4), small)
    batches = [dirty.reshape(4, 4, *shape, 5)]
    got = collect(mlp, copies, batches, loss=squares, mask=mask, pmap_axis='i')
  else:
    got = collect(mlp, small, [dirty[:9], dirty[9:]], loss=squares, mask=mask)
  assert_equal(got, want)


def test_one_compiled_step_serves_uneven_batches(small, monkeypatch):
  runs = []
  init = running_sums.RunningSums.__init__
  monkeypatch.setattr(
    running_sums.RunningSums,
    '__init__',
    lambda self, *args: (init(self, *args), runs.append(self))[0],
  )
  x = np.random.default_rng(4).normal(size=(33, 5)).astype(np.float32)
  batches = [x[:16], x[16:32], x[32:]]
  everyone = lambda batch: np.ones(len(batch))
  # Its own: steps are kept by function, and others compile for theirs.
  fn = lambda params, x: mlp(params, x)
  got = collect(fn, small, batches, mask=everyone)
  assert_equal(got, collect(mlp, small, [x]))
  assert list(runs[0]._steps) == [False]
  assert runs[0].step()._cache_size() == 1


MIXING = [
  ('reduce_sum', lambda p, x: (x - x.mean(0)) @ p),
  ('dot_general', lambda p, x: (x @ x.T) @ x @ p),
  ('dot_general', lambda p, x: jnp.einsum('bd,be->de', x, p)),
  ('cumsum', lambda p, x: jnp.cumsum(x, 0) @ p),
  ('sort', lambda p, x: jnp.sort(x, 0) @ p),
  ('rev', lambda p, x: x[::-1] @ p),
  ('concatenate', lambda p, x: jnp.concatenate([x, x]) @ p),
  ('slice', lambda p, x: (x + x[:1]) @ p),
  ('a scan over the examples', lambda p, x: jax.lax.map(lambda r: r @ p, x)),
  ('gather', lambda p, x: x[jnp.array([1, 0, 3, 2, 4])] @ p),
  ('scatter', lambda p, x: jnp.zeros_like(x).at[jnp.arange(5)].add(x) @ p),
  (
    'a while loop',
    lambda p, x: (
      jax.lax.while_loop(lambda c: c.max() > 1e3, lambda c: c / 2, x) @ p
    ),
  ),
  ('add', lambda p, x: (x + x.T) @ p),
  (
    'the product itself',
    lambda p, x: jnp.einsum('bd,bde->be', x[:, :2], p.reshape(5, 2, 2)),
  ),
]


@pytest.mark.parametrize(
  'name, fn', MIXING, ids=lambda v: v if isinstance(v, str) else ''
)
def test_functions_that_mix_examples_are_refused_by_name(name, fn):
  x = np.random.default_rng(5).normal(size=(5, 5)).astype(np.float32)
  one = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('x',))
  with pytest.raises(ValueError, match=f"'w' mixes them: {name}"):
    collect(
      lambda p, x: fn(p['w'], x),
      {'w': np.ones((5, 4) if name == 'the product itself' else (5, 5))},
      [x],
      mask=lambda batch: np.ones(5),
      mesh=one,
    )


def test_mixing_behind_the_kernels_is_no_matter(small):
  x = np.ones((4, 5), np.float32)
  fn = lambda p, x: mlp(p, x) - mlp(p, x).mean(0)
  got = collect(fn, small, [x], mask=lambda batch: np.arange(4) < 3)
  assert got['second'].count == 2 * 3


TOKENS = {
  # Rows that are no tokens: which of them is padding?
  'concatenated': (
    lambda p, x: jnp.concatenate([x[:, :1], x], 1) @ p,
    'could not be followed',
  ),
  'scanned': (
    lambda p, x: jax.lax.scan(
      lambda h, t: (jnp.tanh(h + t @ p), None), x[:, 0] * 0, x.swapaxes(0, 1)
    )[0],
    'a scan over the tokens',
  ),
  'features': (
    lambda p, x: jnp.einsum('btd,te->bde', x, p),
    'could not be followed',
  ),
}


@pytest.mark.parametrize('name', TOKENS)
def test_rows_that_are_no_tokens_are_refused_by_name(name):
  fn, message = TOKENS[name]
  x = np.ones((4, 5, 5), np.float32)
  with pytest.raises(ValueError, match=message) as error:
    collect(
      lambda p, x: fn(p['w'], x),
      {'w': np.eye(5, dtype=np.float32)},
      [x],
      mask=lambda batch: np.ones((4, 5)),
    )
  assert "'w'" in str(error.value)


def test_a_mask_of_another_shape_is_refused(small):
  x = np.ones((4, 5), np.float32)
  for shape in [(3,), (5, 4), (4, 5, 6)]:
    with pytest.raises(ValueError, match=r'mask of batch 0 has shape'):
      collect(mlp, small, [x], mask=lambda batch, s=shape: np.ones(s))


def test_compress_does_not_see_padding(small):
  """Whatever is in it, and few data or many, the tree is the same."""

  def fn(params, batch):
    return mlp(params, batch['x'])

  rng = np.random.default_rng(4)
  x = rng.normal(size=(4, 8, T, 5)).astype(np.float32)
  real = rng.uniform(size=x.shape[:-1]) < 0.7
  trees = []
  for seed in range(2):
    other = np.random.default_rng(seed).normal(size=x.shape) * 10
    dirty = np.where(real[..., None], x, other).astype(np.float32)
    batches = [{'x': a, 'real': b} for a, b in zip(dirty, real, strict=True)]
    few = [{k: v[:4] for k, v in batches[0].items()}]
    for given in (batches, few):
      tree, _ = ur.compress(
        fn,
        small,
        given,
        mask='real',
        params_fraction=0.7,
        loss=squares,
        progress=False,
      )
      trees.append(tree)
  for one, two in zip(trees[:2], trees[2:], strict=True):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_forgotten_mask_is_a_warning():
  fn = lambda p, batch: batch['x'] @ p['w']
  params = {'w': jnp.eye(3)}
  padded = np.array([[1, 1, 0, 0], [1, 1, 1, 0]])
  batch = {'x': np.ones((2, 4, 3), np.float32), 'attention_mask': padded}
  collect = functools.partial(ur.collect, fn, params, progress=False)
  with pytest.warns(UserWarning, match="'attention_mask', which hides 38%"):
    collect([batch])
  # None where it is given, or is none of padding.
  collect([batch], mask='attention_mask')
  for other in (
    np.ones((2, 4), bool),
    np.array([[1, 0, 1, 0], [1, 1, 1, 1]]),  # what a model is to predict
    np.array([[0.5, 1, 0, 0], [1, 1, 1, 0]]),
    np.tri(2, 2)[:, None],
  ):
    collect([{**batch, 'attention_mask': other}])
