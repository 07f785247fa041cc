"""What the tests of every framework's models share."""

from __future__ import annotations

import functools

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


def assert_compresses(model):
  """Half of the parameters are left, and the function still runs."""
  small, report = ur.compress(
    model.fn, model.params, [model.batch], params_fraction=0.5, progress=False
  )
  assert set(report) <= set(model.kernels)
  assert ur.count_params(small) < ur.count_params(model.params)
  outputs = jitted(ur.low_rank(model.fn), small)(small, model.batch)
  assert all(np.all(np.isfinite(out)) for out in jax.tree.leaves(outputs))
  return small
