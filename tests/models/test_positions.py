"""Resizing position embeddings; against PyTorch it is tested in parity."""

import jax
import numpy as np
import pytest

from utilized_rank.models.positions import resize_positions

TABLE = np.random.default_rng(0).normal(size=(1, 26, 3)).astype(np.float32)


@pytest.mark.quick
@pytest.mark.parametrize('method', ['timm', 'hf', 'big_vision'])
def test_the_same_grid_is_unchanged(method):
  resized = resize_positions(TABLE, (5, 5), method)
  # The weights are 0 and 1 up to rounding.
  np.testing.assert_allclose(resized, TABLE, atol=1e-6)


@pytest.mark.parametrize('method', ['timm', 'hf', 'big_vision'])
@pytest.mark.parametrize('grid', [(3, 4), (9, 7)])
def test_constants_stay_and_the_token_too(method, grid):
  table = np.concatenate([TABLE[:, :1], np.ones((1, 25, 3))], axis=1)
  resized = resize_positions(table, grid, method)
  np.testing.assert_array_equal(resized[:, :1], TABLE[:, :1])
  np.testing.assert_allclose(resized[:, 1:], 1, atol=1e-6)


@pytest.mark.parametrize('grid', [(3, 4), (9, 7)])
def test_antialiased_is_that_of_jax_image(grid):
  resized = resize_positions(TABLE[:, 1:], grid)
  images = TABLE[:, 1:].reshape(5, 5, 3)
  expected = jax.image.resize(images, (*grid, 3), 'cubic')
  # jax computes the weights in float32.
  np.testing.assert_allclose(resized.reshape(*grid, 3), expected, atol=1e-5)


def test_bilinear_has_aligned_corners():
  resized = resize_positions(TABLE[:, 1:], (9, 5), 'big_vision')
  column = TABLE[0, 1:].reshape(5, 5, 3)[:, 2, 1]
  expected = np.interp(np.linspace(0, 4, 9), np.arange(5), column)
  np.testing.assert_allclose(
    resized.reshape(9, 5, 3)[:, 2, 1], expected, atol=1e-6
  )


def test_errors():
  with pytest.raises(ValueError, match="method='nearest'"):
    resize_positions(TABLE, (3, 3), 'nearest')
  with pytest.raises(ValueError, match='24 positions is no square grid'):
    resize_positions(TABLE[:, :24], (3, 3))
