"""Public calls that take a tree of parameters, on one small network."""

import os
import pathlib
import tempfile

from hypothesis import HealthCheck
from hypothesis import Phase
from hypothesis import settings
import jax
import jax.numpy as jnp
import numpy as np

import utilized_rank as ur

QUIET = dict(progress=False)
HALF = dict(params_fraction=0.5)
_rng = np.random.default_rng(0)
KERNELS = {
  'bias': _rng.normal(size=10),
  'down': _rng.normal(size=(10, 4)) / 10**0.5,
  'up': _rng.normal(size=(6, 10)) / 6**0.5,
}
BATCHES = [_rng.normal(size=(64, 6)).astype(np.float32) for _ in range(2)]
LOSS = ur.sampled_squared_error()


# 25 by default.
examples = settings(
  max_examples=int(os.environ.get('UTILIZED_RANK_EXAMPLES', '500')) // 20,
  deadline=None,
  derandomize=True,
  # A smaller failure takes minutes to find, and its parts have names.
  phases=[Phase.generate],
  suppress_health_check=list(HealthCheck),
)


def network(params, x):
  return jnp.tanh(x @ params['up'] + params['bias']) @ params['down']


def float32():
  """The kernels as JAX's arrays."""
  return {k: jnp.asarray(v, jnp.float32) for k, v in KERNELS.items()}


def half_ranks(params, moments):
  return ur.uniform_ranks(params, moments, **HALF)


def small_of(params, moments):
  return ur.factorize(params, moments, half_ranks(params, moments), **QUIET)


def _spec(leaf):
  del leaf
  return jax.sharding.PartitionSpec()


def _reopened(tree):
  with tempfile.TemporaryDirectory() as folder:
    ur.save(folder + '/tree', tree)
    return ur.load(folder + '/tree')


def _safe(fn, params, moments):
  del fn
  with tempfile.TemporaryDirectory() as folder:
    ur.save_safetensors(folder + '/tree', small_of(params, moments))
    return sum(
      len(p.read_bytes()) > 0 for p in pathlib.Path(folder).rglob('*.*')
    )


def _widths(fn, params, moments):
  hidden = ur.find_hidden(fn, params, BATCHES[0])
  widths = ur.budget_widths(params, moments, hidden, **HALF)
  return ur.narrow_hidden(params, moments, hidden, widths)


# `call(fn, params, moments)`.
CALLS = {
  'find_sites': lambda f, p, m: len(ur.find_sites(f, p, BATCHES[0])),
  'plan': lambda f, p, m: ur.plan(f, p, BATCHES[0]).forward_flops,
  'find_attention': lambda f, p, m: len(ur.find_attention(f, p, BATCHES[0])),
  'find_hidden': lambda f, p, m: len(ur.find_hidden(f, p, BATCHES[0])),
  'capture': lambda f, p, m: ur.capture(f)(p, BATCHES[0])[0],
  'collect': lambda f, p, m: ur.collect(f, p, BATCHES, **QUIET),
  'measure': lambda f, p, m: ur.measure(p, m, **QUIET),
  'uniform_ranks': lambda f, p, m: half_ranks(p, m),
  'budget_ranks': lambda f, p, m: ur.budget_ranks(p, m, **HALF, **QUIET),
  'energy_ranks': lambda f, p, m: ur.energy_ranks(p, m, energy=0.9),
  'predict_loss': lambda f, p, m: ur.predict_loss(p, m, half_ranks(p, m)),
  'project': lambda f, p, m: ur.project(p, m, energy=0.9),
  'factorize': lambda f, p, m: small_of(p, m),
  'write_out': lambda f, p, m: ur.write_out(small_of(p, m)),
  'merge': lambda f, p, m: ur.merge(
    ur.factorize(p, m, half_ranks(p, m), compensate_mean=False, **QUIET)
  ),
  'count_params': lambda f, p, m: ur.count_params(small_of(p, m)),
  'low_rank': lambda f, p, m: ur.low_rank(f)(small_of(p, m), BATCHES[0]),
  'narrow_hidden': _widths,
  'anchor': lambda f, p, m: ur.anchor(f, p, BATCHES, half_ranks(p, m), **QUIET),
  'tune_ranks': lambda f, p, m: ur.tune_ranks(
    f, p, m, BATCHES, divergence=ur.squared_error, rounds=1, **HALF, **QUIET
  ),
  'distill': lambda f, p, m: ur.distill(
    f, p, small_of(p, m), BATCHES, divergence=ur.squared_error, steps=2, **QUIET
  ),
  'finetune': lambda f, p, m: ur.finetune(
    f,
    small_of(p, m),
    p,
    BATCHES,
    divergence=ur.squared_error,
    steps=2,
    **QUIET,
  ),
  'shardings': lambda f, p, m: (
    len(jax.tree.leaves(ur.shardings(small_of(p, m), jax.tree.map(_spec, p))))
    - len(jax.tree.leaves(p))
  ),
  'save': lambda f, p, m: _reopened(small_of(p, m)),
  'save_safetensors': _safe,
}

# Calls that give a tree like the one that they were given.
TREES = {
  'project',
  'factorize',
  'write_out',
  'merge',
  'narrow_hidden',
  'anchor',
  'distill',
  'finetune',
  'save',
}


def numbers(result):
  """The numbers of what a call returned, in its order."""
  if isinstance(result, ur.Report):
    return [(layer.rank, layer.utilization) for layer in result.layers]
  if isinstance(result, ur.Moments):
    return [result[path].mean for path in result]
  if isinstance(result, ur.TunedRanks):
    return list(result.values())
  return jax.tree.leaves(result)
