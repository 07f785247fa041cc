"""Settings of every test, and the names that docstring examples may use."""

import os
import tempfile

# Before jax makes its devices: collection and sharding are tested on four.
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '4')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import jax
import jax.numpy as jnp
import numpy as np
import pytest

_CACHE = tempfile.TemporaryDirectory(prefix='utilized_rank_xla_')


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
  # XLA's compile time is most of the suite's: equal programs compile once.
  jax.config.update('jax_compilation_cache_dir', _CACHE.name)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def pytest_unconfigure(config):
  del config
  _CACHE.cleanup()


@pytest.fixture(autouse=True)
def _example_names(doctest_namespace):
  doctest_namespace.update(jax=jax, jnp=jnp, np=np)
