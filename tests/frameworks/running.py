"""What the tests of every framework's models share."""

from __future__ import annotations

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

import utilized_rank as ur


def jitted(fn, params):
  """`fn(params, batch)` compiled; leaves that are no arrays stay static."""
  leaves, treedef = jax.tree.flatten(params)
  moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

  # These run once, so most of their time would be spent on optimizing them.
  @functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
  )
  def run(arrays, batch):
    whole = list(leaves)
    for i, array in zip(moving, arrays, strict=True):
      whole[i] = array
    return fn(jax.tree.unflatten(treedef, whole), batch)

  def call(params, batch):
    leaves = jax.tree.leaves(params)
    return run([leaves[i] for i in moving], batch)

  return call


def assert_same(got, want):
  """To 1e-5 of the largest number of each array."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    scale = max(float(jnp.max(jnp.abs(b))), 1e-3)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)


def assert_kernels(model):
  """Those of the case, and a reason for every other leaf that it names."""
  sites = ur.find_sites(model.fn, model.params, model.batch)
  found = {
    path: site.layout.group_shape + site.matrix_shape
    for path, site in sites.items()
  }
  assert found == dict(model.kernels)
  for path, reason in model.unseen.items():
    assert reason in sites.unseen[path]
  return sites


def assert_moments(moments, inputs):
  """S and the mean are those of the inputs; 1e-5 is float32's sums of rows."""
  for path in moments:
    x = inputs[path]
    assert np.all(moments[path].count == x.shape[-2])
    second = np.swapaxes(x, -1, -2) @ x / x.shape[-2]
    scale = np.abs(second).max()
    np.testing.assert_allclose(
      moments[path].second, second, rtol=0, atol=1e-5 * scale
    )
    np.testing.assert_allclose(
      moments[path].mean, x.mean(-2), rtol=0, atol=1e-5 * np.sqrt(scale)
    )


def factorized(model, moments, share, compensate_mean=False):
  """The model with factors of this share of every full rank."""
  ranks = {
    path: max(1, int(share * moments[path].layout.full_rank))
    for path in moments
  }
  return ur.factorize(
    model.params, moments, ranks, compensate_mean=compensate_mean
  )


@contextlib.contextmanager
def compiled_fast():
  """Programs that run once are not worth XLA's optimizations."""
  option = 'jax_disable_most_optimizations'
  before = jax.config.values[option]
  jax.config.update(option, True)
  try:
    yield
  finally:
    jax.config.update(option, before)


def assert_compresses(model):
  """To half of the kernels' parameters, and it merges into the stock model.

  The batch comes four times: four rows for every feature are not few. How near
  training brings it is tested elsewhere: a few updates show that it runs.
  """
  with compiled_fast():
    small, report = ur.compress(
      model.fn, model.params, [model.batch] * 4, params_fraction=0.5,
      compensate_mean=False, refine=20, progress=False,
    )  # fmt: skip
    assert {re.sub(r'\[[\d, ]*\]$', '', name) for name in report} == set(
      model.kernels
    )
    size = sum(math.prod(shape) for shape in model.kernels.values())
    left = ur.count_params(small) - ur.count_params(model.params) + size
    assert 0.3 * size < left <= 0.5 * size
    merged = ur.merge(small)
    assert jax.tree.structure(merged) == jax.tree.structure(model.params)
    got = jitted(ur.low_rank(model.fn), small)(small, model.batch)
    assert_same(got, jitted(model.fn, merged)(merged, model.batch))
