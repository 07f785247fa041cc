"""Sums over rows against float64 numpy, in blocks of columns and patches."""

import forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.linalg import eigh
from utilized_rank.linalg import gram
from utilized_rank.products import convolution

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
CONVOLUTIONS = [name for name in forms.FORMS if name.startswith('conv_')]


@pytest.mark.quick
@pytest.mark.parametrize(
  'shape', [(200, 512), (130, 515), (2, 150, 530), (20, 512)]
)
def test_the_upper_triangle_is_enough(shape):
  x = RNG.normal(size=shape).astype(np.float32) + 0.5
  total, second = jax.jit(gram.gram)(x)
  wide = x.astype(np.float64)
  want = np.einsum('...nd,...ne->...de', wide, wide)
  # float32 sums of at most 200 products of size 1.
  np.testing.assert_allclose(second, want, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(total, wide.sum(-2), rtol=1e-5, atol=1e-4)
  # Blocks on the diagonal are products like others, symmetric up to rounding.
  np.testing.assert_allclose(
    second, np.swapaxes(second, -1, -2), rtol=1e-5, atol=1e-4
  )


@pytest.mark.parametrize('shape', [(200, 512), (2, 150, 530), (50, 12)])
def test_what_is_read_on_the_host_is_symmetric_exactly(shape):
  x = jnp.asarray(RNG.normal(size=shape).astype(np.float32) + 0.5)
  panels = jax.tree.map(np.asarray, gram.panels(x)[1])
  second = gram.whole(panels)
  np.testing.assert_array_equal(second, np.swapaxes(second, -1, -2))
  d = shape[-1]
  np.testing.assert_array_equal(
    np.tril(second[..., :d, : d // 8]),
    np.tril(np.asarray(gram.gram(x)[1])[..., :d, : d // 8]),
  )


def test_wide_bfloat16_rows_are_summed_in_float32():
  x = jnp.ones((3000, 512), jnp.bfloat16)
  total, second = gram.gram(x)
  assert second.dtype == total.dtype == jnp.float32
  # Exact in float32; a bfloat16 sum of ones stops at 256.
  assert (second == 3000).all() and (total == 3000).all()


def test_a_bfloat16_model_keeps_float32_moments():
  w = jnp.ones((4, 4), jnp.bfloat16)
  x = jnp.asarray(RNG.normal(size=(600, 4)) + 3, jnp.bfloat16)
  moments = ur.collect(lambda p, x: x @ p, w, [x] * 3, progress=False)
  wide = np.asarray(x, np.float64)
  assert moments[''].second.dtype == np.float32
  np.testing.assert_allclose(moments[''].second, wide.T @ wide / 600, rtol=1e-6)


@pytest.mark.parametrize('n, d', [(200, 512), (130, 515), (10, 512), (10, 8)])
def test_flops_are_those_of_the_compiled_program(n, d):
  compiled = jax.jit(lambda x: gram.panels(x)[1]).lower(
    jax.ShapeDtypeStruct((n, d), jnp.float32)
  )
  counted = compiled.compile().cost_analysis()['flops']
  assert counted == pytest.approx(gram.panel_flops(n, d), rel=0.01)
  assert gram.panel_flops(n, d) >= n * d * (d + 1)


@pytest.mark.parametrize('most', [1, 60])
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_patches_are_read_in_blocks(name, most, monkeypatch):
  """Every block size gives the sums of numpy's im2col."""
  monkeypatch.setattr(convolution, '_MOST_PATCHES', most)
  form = forms.FORMS[name]
  params, x = form.params(0), form.inputs(0)
  jaxpr = str(jax.make_jaxpr(ur.capture(form.fn))(params, x))
  _, moments = jax.jit(ur.capture(form.fn))(params, x)
  assert most > 1 or 'while' in jaxpr or 'scan' in jaxpr
  for path, rows in form.rows(params, x).items():
    want = np.einsum('...nd,...ne->...de', rows, rows)
    np.testing.assert_allclose(
      moments[path].sums.second, want, rtol=1e-5, atol=1e-5
    )
    assert (np.asarray(moments[path].count) == rows.shape[-2]).all()


def test_large_patches_never_exist_at_once():
  """The program's memory is that of one block, not of k * k images."""
  w = jax.ShapeDtypeStruct((3, 3, 64, 8), jnp.float32)
  x = jax.ShapeDtypeStruct((4, 128, 128, 64), jnp.float32)
  fn = lambda w, x: jax.lax.conv_general_dilated(
    x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  sums = lambda w, x: ur.capture(fn)(w, x)[1]
  memory = jax.jit(sums).lower(w, x).compile().memory_analysis()
  patches = 4 * 128 * 128 * 9 * 64 * 4
  # A block of a ninth, and XLA's copies of its columns for every panel.
  assert memory.temp_size_in_bytes < patches / 2


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_moments_that_are_not_finite_have_no_spectrum(bad):
  matrix = np.eye(3)
  matrix[1, 1] = bad
  with pytest.raises(FloatingPointError, match=r'a \(3, 3\) moment holds NaN'):
    eigh.spectrum(matrix)
