"""What is compiled in a run is kept for the rest of it."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import tempfile

import jax


@contextlib.contextmanager
def compilations() -> Iterator[None]:
  """Keeps compiled programs on disk: every recipe makes its functions anew,
  and most of them were compiled before."""
  with tempfile.TemporaryDirectory() as folder:
    jax.config.update('jax_compilation_cache_dir', folder)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
    try:
      yield
    finally:
      jax.config.update('jax_compilation_cache_dir', None)
