"""Settings of every test, and the names that docstring examples may use."""

import os
import tempfile

_WORKER = 'PYTEST_XDIST_WORKER' in os.environ
if not _WORKER:
  _CACHE = tempfile.TemporaryDirectory(prefix='utilized_rank_xla_')
  # XLA's compile time is most of the suite's. Equal programs compile once in a
  # run: workers, and what tests start, have these from the environment.
  os.environ |= {
    'JAX_COMPILATION_CACHE_DIR': _CACHE.name,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }
# Before jax makes its devices: collection and sharding are tested on four.
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '4')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest_plugins = ['quick']
# They need what may not be there, and hold no examples.
collect_ignore_glob = [
  'tests/frameworks/*_models.py',
  'utilized_rank/torch/*.py',
]

# `UTILIZED_RANK_SETTING=rank_promotion pytest ...`: the suite under a setting
# that users may have made.
_SETTINGS = {
  'rank_promotion': ('jax_numpy_rank_promotion', 'raise'),
  'dtype_promotion': ('jax_numpy_dtype_promotion', 'strict'),
  'transfer_guard': ('jax_transfer_guard', 'disallow'),
}


def pytest_configure(config):
  del config
  setting = os.environ.get('UTILIZED_RANK_SETTING')
  if setting:
    jax.config.update(*_SETTINGS[setting])


def pytest_unconfigure(config):
  del config
  if not _WORKER:
    _CACHE.cleanup()


@pytest.fixture(autouse=True)
def _example_names(doctest_namespace):
  doctest_namespace.update(jax=jax, jnp=jnp, np=np)
