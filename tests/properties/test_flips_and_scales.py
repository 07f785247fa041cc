"""Kernels read backwards, times a number, or in parts that are not equal.

All are layout and scale of the kernel: its S is of what meets the kernel as
it is stored, G of the gradient with respect to x W, and every factorization
runs in the function as it was written.
"""

import functools
from typing import Any
import warnings

import forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wrappers import close

import utilized_rank as ur
from utilized_rank.tree import paths

pytestmark = pytest.mark.slow

FORMS = forms.FORMS | {
  # Under `vmap` it would be one number for each example: not in the matrix.
  'scale_of_the_data': forms.Form(
    lambda p, x: x @ (p['w'] / jnp.abs(x).max()),
    dict(w=(4, 3)),
    (5, 4),
    forms.just(4),
  )
}
NAMES = [
  'flipped_inputs',
  'flipped_outputs',
  'flipped_then_cut',
  'flipped_in_part',
  'flipped_groups',
  'flipped_and_scanned',
  'flipped_and_indexed',
  'negative',
  'equalised',
  'times_one',
  'learnt_scale',
  'leaf_as_scale',
  'scale_of_the_data',
  'cell',
  'packed',
  'parts_of_the_inputs',
  'conv_transposed_kernel',
  'conv_flipped_groups',
]
# Examples lie along another axis than the first, where they are told apart.
APART = [n for n in NAMES if n not in ('flipped_groups', 'scale_of_the_data')]
f64 = functools.partial(np.asarray, dtype=np.float64)


@functools.cache
def case(name):
  form = FORMS[name]
  params, x = form.params(3), form.inputs(4)
  return form.fn, params, x


def loss(outputs, batch):
  return jnp.square(outputs - 0.3).reshape(len(batch), -1).sum(1)


@functools.cache
def collected(name, **kwargs):
  fn, params, x = case(name)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    return ur.collect(fn, params, [x], loss=loss, progress=False, **kwargs)


def error(fn, params, tree, x):
  y, z = (np.asarray(v, np.float64) for v in (fn(params, x), tree(x)))
  return np.linalg.norm(z - y) / np.linalg.norm(y)


def test_moments_under_a_scale_of_the_data():
  form, (fn, params, x) = FORMS['scale_of_the_data'], case('scale_of_the_data')
  (rows,) = form.rows(params, x).values()
  _, moments = ur.capture(fn)(params, x)
  close(moments['w'].second, forms.moments_of(rows)[2], 'second')


@pytest.mark.parametrize('name', APART)
def test_gradient_moments_say_what_a_change_of_the_kernel_does(name):
  """tr(D^T S D G) of one row is the square of the loss's change along D.

  With one example, and one row for each kernel, the gradient by W is x g^T:
  plain `jax.grad` tells g g^T up to x, whatever scale is in between.
  """
  fn, params, x = case(name)
  moments = collected(name)
  named, _ = paths.flatten(params)
  total = lambda p, x: loss(fn(p, x), x).sum()
  grads, _ = paths.flatten(jax.grad(total)(params, x))
  for path in moments:
    moment, layout = moments[path], moments[path].layout
    grad = f64(layout.to_matrices(grads[path]))
    # |sum x g^T|^2 <= (sum |x|^2) (sum |g|^2), with equality for one row.
    n = f64(moment.count)
    energy = np.einsum('...dd->...', f64(moment.second)) * n
    energy *= np.einsum('...mm->...', f64(moment.grad_second)) * n
    assert (np.square(grad).sum((-1, -2)) <= energy * (1 + 1e-5)).all()
  assert named.keys() >= set(moments)


ONE_ROW = [
  n
  for n in APART
  if n
  not in (
    'flipped_and_scanned',
    'flipped_then_cut',
    'cell',
    'packed',
    'conv_transposed_kernel',
    'conv_flipped_groups',
  )
]


@pytest.mark.parametrize('name', ONE_ROW)
def test_of_one_row_the_gradient_is_x_times_g(name):
  fn, params, x = case(name)
  x = x[:1]
  moments = ur.collect(fn, params, [x], loss=loss, progress=False)
  total = lambda p: loss(fn(p, x), x).sum()
  grads, _ = paths.flatten(jax.grad(total)(params))
  for path in moments:
    moment, layout = moments[path], moments[path].layout
    grad = f64(layout.to_matrices(grads[path]))
    rows = f64(moment.sums.total)
    square = np.einsum('...d,...d->...', rows, rows)
    g = np.einsum('...d,...dm->...m', rows, grad) / square[..., None]
    # One row: sum g g^T is g g^T; float32 sums of float32 products.
    close(moment.grad_second, np.einsum('...m,...k->...mk', g, g), path)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('gauge', [None, 'identity'])
def test_full_rank_runs_equal_and_half_rank_runs(name, gauge):
  fn, params, x = case(name)
  moments = ur.collect(fn, params, [x], progress=False)
  for share in (1.0, 0.5):
    ranks = {
      path: max(1, int(moments[path].layout.full_rank * share))
      for path in moments
    }
    small = ur.factorize(params, moments, ranks, gauge=gauge, progress=False)
    with warnings.catch_warnings():
      warnings.simplefilter('error')  # never multiplied out
      out = jax.jit(ur.low_rank(fn))(small, x)
    assert out.shape == np.shape(fn(params, x))
    if share == 1:
      close(out, fn(params, x), name)


def best(rows, w, rank):
  """The least mean square error that a rank leaves, in float64."""
  _, s, _ = np.linalg.svd(rows @ w, full_matrices=False)
  return np.square(s[rank:]).sum()


@pytest.mark.parametrize('name', ['flipped_inputs', 'equalised', 'negative'])
@pytest.mark.parametrize('centered', [False, True])
def test_the_error_is_the_least_there_is(name, centered):
  fn, params, x = case(name)
  moments = ur.collect(fn, params, [x], progress=False)
  small = ur.factorize(
    params, moments, {'w': 1}, compensate_mean=centered, progress=False
  )
  assert small['w'].c is None  # in the bias, or not asked for
  y, z = f64(fn(params, x)), f64(ur.low_rank(fn)(small, x))
  # The outputs but for their bias are linear: float64 of the same numbers.
  y -= y.mean(0) if centered else f64(params['b']) * _bias(name)
  _, s, _ = np.linalg.svd(y, full_matrices=False)
  close(np.square(z - f64(fn(params, x))).sum(), np.square(s[1:]).sum(), name)


def _bias(name):
  return 0.5 if name == 'equalised' else 1.0


@pytest.mark.parametrize('name', ['equalised', 'negative', 'times_one'])
def test_the_mean_goes_to_a_bias_with_a_scale_of_its_own(name):
  fn, params, x = case(name)
  moments = ur.collect(fn, params, [x], progress=False)
  small = ur.factorize(params, moments, {'w': 1}, progress=False)
  stock = ur.merge(small)
  assert jax.tree.map(np.shape, stock) == jax.tree.map(np.shape, params)
  close(fn(stock, x), ur.low_rank(fn)(small, x), name)
  close(f64(fn(stock, x)).mean(0), f64(fn(params, x)).mean(0), name)
  plain = ur.factorize(
    params, moments, {'w': 1}, compensate_mean=False, progress=False
  )
  assert (plain['b'] == params['b']).all()


def test_a_bias_in_another_order_than_the_outputs_is_none():
  x = FORMS['flipped_outputs'].inputs(0)
  rng = np.random.default_rng(0)
  params = {
    'w': rng.normal(size=(4, 3)).astype(np.float32),
    'b': rng.normal(size=3).astype(np.float32),
  }
  both = lambda p, x: x @ p['w'][:, ::-1] + p['b'][::-1]
  late = lambda p, x: (x @ p['w'])[:, ::-1] + p['b'][::-1]
  one = lambda p, x: x @ p['w'] + p['b'][::-1]
  for fn, bias in ((both, 'b'), (late, 'b'), (one, None)):
    moments = ur.collect(fn, params, [x], progress=False)
    assert moments['w'].entry.bias == bias
    small = ur.factorize(params, moments, {'w': 1}, progress=False)
    got = f64(ur.low_rank(fn)(small, x)).mean(0)
    close(got, f64(fn(params, x)).mean(0), 'mean')


def test_the_gradient_of_a_learnt_scale_is_the_dense_ones():
  fn, params, x = case('learnt_scale')
  moments = ur.collect(fn, params, [x], progress=False)
  for gauge in (None, 'identity'):
    small = ur.factorize(params, moments, {'w': 3}, gauge=gauge, progress=False)
    total = lambda run, p: jnp.square(run(p, x)).sum()
    want = jax.grad(functools.partial(total, fn))(params)['s']
    got = jax.grad(functools.partial(total, ur.low_rank(fn)))(small)['s']
    close(got, want, 'gradient of the scale')


@pytest.mark.parametrize(
  'name', ['equalised', 'learnt_scale', 'cell', 'packed']
)
def test_from_the_output_side(name):
  fn, params, x = case(name)
  moments = collected(name)
  turned = ur.collect(
    fn, params, [x], from_outputs=[('.*', True)], progress=False
  )
  for path in moments:
    moment, layout = turned[path], moments[path].layout
    w = f64(layout.to_matrices(np.asarray(paths.flatten(params)[0][path])))
    s = f64(moments[path].second)
    t = np.einsum('...dm,...de,...ek->...mk', w, s, w)
    n = f64(moment.count)[..., None, None]
    close(f64(moment.sums.second) / n, t, 'second moment of x W')


def mixed(p: Any, x: Any) -> Any:
  """Layers one after the other, of every kind."""
  x = jnp.tanh(x @ (p['a'] / 4) + p['b'])
  x = x + jnp.tanh(x @ -p['c'][::-1])
  x = x + jnp.tanh(x @ p['d'][:, :32])[:, :16] * (x @ p['d'][:, 32:])
  return x @ (p['e'] * p['s'])


def mixed_case():
  rng = np.random.default_rng(5)
  draw = lambda *s: jnp.asarray(rng.normal(size=s) / 2, jnp.float32)
  params = dict(
    a=draw(16, 16) * 4,
    b=draw(16),
    c=draw(16, 16),
    d=draw(16, 48),
    e=draw(16, 16),
    s=jnp.float32(0.7),
  )
  mix = rng.normal(size=(6, 16))
  batches = [
    jnp.asarray(rng.normal(size=(64, 6)) @ mix, jnp.float32) for _ in range(3)
  ]
  return params, batches


@pytest.mark.parametrize('anchored', [False, True])
def test_compress_and_anchor_run(anchored):
  params, batches = mixed_case()
  moments = ur.collect(mixed, params, batches, loss=loss, progress=False)
  assert set(moments) == {'a', 'c', 'd', 'e'}
  assert moments['d'].layout.group_shape == (3,)
  ranks = {path: 6 for path in moments}
  tree = ur.factorize(params, moments, ranks, progress=False)
  plain = error(
    mixed, params, lambda x: ur.low_rank(mixed)(tree, x), batches[0]
  )
  if anchored:
    # The inputs have six directions: the first layer loses nothing, and those
    # behind it are fitted to what the dense function makes.
    tree = ur.anchor(mixed, params, batches, ranks, progress=False)
    fitted = error(
      mixed, params, lambda x: ur.low_rank(mixed)(tree, x), batches[0]
    )
    assert fitted < 1.1 * plain
    full = {p: 16 for p in moments}
    whole = ur.anchor(mixed, params, batches, full, progress=False)
    close(ur.low_rank(mixed)(whole, batches[0]), mixed(params, batches[0]), 'm')
    return
  small, report = ur.compress(
    mixed, params, batches, params_fraction=0.6, loss=loss, progress=False
  )
  assert ur.count_params(small) < 0.62 * ur.count_params(params)
  got = error(mixed, params, lambda x: ur.low_rank(mixed)(small, x), batches[0])
  ranks = ur.uniform_ranks(params, moments, params_fraction=0.6)
  cut = ur.factorize(
    params,
    moments,
    ranks,
    method='weight',
    compensate_mean=False,
    progress=False,
  )
  svd = error(mixed, params, lambda x: ur.low_rank(mixed)(cut, x), batches[0])
  assert got < svd
  assert report is not None


def test_masks_reach_the_parts():
  _, params, x = case('packed')
  mask = np.ones((2, 5), bool)
  mask[1, 3:] = False
  project = lambda p, x: jnp.concatenate(
    [x @ p['w'][:4].T, jnp.sin(x) @ p['w'][4:].T], -1
  )
  batch = {'x': x, 'mask': mask}
  moments = ur.collect(
    lambda p, b: project(p, b['x']),
    params,
    [batch],
    mask='mask',
    progress=False,
  )
  real = f64(x)[mask]
  rows = np.stack([real, np.sin(real), np.sin(real)])
  count, mean, second = forms.moments_of(rows)
  np.testing.assert_array_equal(moments['w'].count, count)
  close(moments['w'].mean, mean, 'mean')
  close(moments['w'].second, second, 'second')


# --- as layers write it ---


def deconvolution(p, x):
  """Keras' Conv2DTranspose: (h, w, out, in), flipped, and muP's 1/m."""
  y = jax.lax.conv_transpose(
    x,
    p['kernel'] * (1 / np.sqrt(8)),
    (2, 2),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    transpose_kernel=True,
  )
  return y + p['bias']


def test_a_deconvolution_becomes_two():
  rng = np.random.default_rng(2)
  draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
  params = {'kernel': draw(3, 3, 5, 2), 'bias': draw(5)}
  x = draw(4, 4, 4, 2)
  moments = ur.collect(deconvolution, params, [x], progress=False)
  assert moments['kernel'].layout.matrix_shape == (18, 5)
  small = ur.factorize(params, moments, {'kernel': 5}, progress=False)
  close(
    ur.low_rank(deconvolution)(small, x), deconvolution(params, x), 'outputs'
  )
  # Of rank 3, against the best that there is, by the dense outputs' SVD.
  small = ur.factorize(
    params, moments, {'kernel': 3}, compensate_mean=False, progress=False
  )
  y = f64(deconvolution(params, x)) - f64(params['bias'])
  z = f64(ur.low_rank(deconvolution)(small, x)) - f64(params['bias'])
  _, s, _ = np.linalg.svd(y.reshape(-1, 5), full_matrices=False)
  close(np.square(z - y).sum(), np.square(s[3:]).sum(), 'error')
  close(deconvolution(ur.merge(small), x), z + f64(params['bias']), 'merged')


def standardised(p, x):
  w = p['kernel']
  mean, std = w.mean((0, 1, 2)), w.std((0, 1, 2))
  return jax.lax.conv_general_dilated(
    x,
    (w - mean) / (std + 1e-5) * p['gain'],
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def test_a_standardised_kernel_is_named():
  params = {'kernel': np.ones((3, 3, 2, 5)), 'gain': np.ones(5)}
  params = jax.tree.map(np.float32, params)
  sites = ur.find_sites(standardised, params, np.ones((2, 4, 4, 2), np.float32))
  assert not sites
  assert 'used by' in sites.unseen['kernel'] and 'sub' in sites.unseen['kernel']


# --- what is not followed is named ---

W = np.random.default_rng(7).normal(size=(6, 20)).astype(np.float32)


@pytest.mark.parametrize(
  'fn, reason',
  [
    (
      lambda p, x: (x @ p['w'][:, :13]).sum() + (x @ p['w'][:, 13:]).sum(),
      r'HOLE: .*not one of equal parts \(13 of 20\).*\(7 of 20\)',
    ),
    (
      lambda p, x: x @ jnp.split(p['w'], [13], 1)[1].T.T,
      r'HOLE: .*\(7 of 20\)',
    ),
    (
      lambda p, x: x[:, :5] @ p['w'][:5, :12],
      r'HOLE: .*\(5 of 6, 12 of 20\)',
    ),
    (lambda p, x: x @ (p['w'] * jnp.arange(20)), 'more than one number'),
    (lambda p, x: x @ (p['w'] / jnp.arange(1, 7)[:, None]), 'more than one'),
    (lambda p, x: x @ (p['w'] * p['w']), 'used by mul'),
    (lambda p, x: x @ (1 / p['w']), 'used by div'),
    (lambda p, x: x[:, :1] + p['w'][:, 3:4], 'used by add'),
  ],
)
def test_what_is_no_layout_of_a_kernel_is_named(fn, reason):
  x = np.ones((6, 6), np.float32)
  sites = ur.find_sites(fn, {'w': W}, x)
  assert not sites
  with pytest.raises(KeyError, match=reason):
    sites['w']
  out, moments = ur.capture(fn)({'w': W}, x)
  close(out, fn({'w': W}, x), 'outputs')
  assert not len(moments)
