"""Image models of tiny width: arrays, files, and what every one must hold."""

import pathlib
from typing import Any

import jax
import numpy as np

import utilized_rank as ur
from utilized_rank.models.importing import load_checkpoint
from utilized_rank.tree import paths


def images(count: int = 8, side: int = 16) -> np.ndarray:
  rng = np.random.default_rng(1)
  return rng.normal(size=(count, side, side, 3)).astype(np.float32)


def randomised(model: Any, x: Any) -> Any:
  """Variables of which none is what it is initialised with."""
  rng = np.random.default_rng(0)

  def drawn(path: Any, like: Any) -> np.ndarray:
    values = rng.normal(size=like.shape)
    if path[-1].key == 'var':
      return (abs(values) + 0.5).astype(np.float32)
    scale = max(np.prod(like.shape[:-1]), 4) ** -0.5
    return (scale * values).astype(np.float32)

  like = jax.eval_shape(model.init, jax.random.key(0), x)
  return jax.tree_util.tree_map_with_path(drawn, like)


class State(dict[str, np.ndarray]):
  """Random weights under names of PyTorch."""

  def __init__(self):
    super().__init__()
    self._rng = np.random.default_rng(0)

  def draw(self, name: str, *shape: int) -> None:
    self[name] = self._rng.normal(size=shape).astype(np.float32)

  def layer(self, name: str, *shape: int) -> None:
    """A weight, outputs first, and its bias."""
    self.draw(f'{name}.weight', *shape)
    self.draw(f'{name}.bias', shape[0])


def load(folder: pathlib.Path, state: dict[str, np.ndarray], **options: Any):
  np.savez(folder / 'w.npz', **state)
  return load_checkpoint(str(folder / 'w.npz'), **options)


def check_kernels_are_seen(
  model: Any, x: np.ndarray, without_rank: frozenset[str] = frozenset()
) -> dict[str, str]:
  """All kernels but some are measured, and factors of full rank are equal.

  Args:
    model: of Linen.
    x: images.
    without_rank: the others.

  Returns:
    Why kernels are not measured, by path.
  """
  variables = randomised(model, x)
  sites = ur.find_sites(model.apply, variables, x)
  leaves, _ = paths.flatten(variables)
  assert (
    set(sites) == {p for p in leaves if p.endswith('kernel')} - without_rank
  )
  moments = ur.collect(model.apply, variables, [x], progress=False)
  assert set(ur.measure(variables, moments)) == set(sites)
  full = {p: min(site.matrix_shape) for p, site in sites.items()}
  small = ur.factorize(variables, moments, full)
  actual = jax.jit(ur.low_rank(model.apply))(small, x)
  expected = jax.jit(model.apply)(variables, x)
  # Two products in place of one, in single precision.
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
  return sites.unseen


def check_is_halved(model: Any, kernel: str, **options: Any) -> None:
  """`compress` keeps half of the parameters of the kernels that it measures.

  Args:
    model: of Linen, of three classes.
    kernel: path of one of them, which is in the report.
    options: of `compress`.
  """
  x = images(64)
  variables = randomised(model, x)
  small, report = ur.compress(
    model.apply,
    variables,
    [x],
    params_fraction=0.5,
    progress=False,
    **options,
  )
  # The others stay as they are.
  measured = sum(layer.d_in * layer.d_out for layer in report.layers)
  removed = ur.count_params(variables) - ur.count_params(small)
  assert measured / 2 <= removed < 0.6 * measured
  assert jax.jit(ur.low_rank(model.apply))(small, x).shape == (64, 3)
  assert kernel in report
