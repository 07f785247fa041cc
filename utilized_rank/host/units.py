"""Numbers of this machine as text."""

from __future__ import annotations


def of_bytes(n: float) -> str:
  """A size in its own unit.

  >>> of_bytes(2_000), of_bytes(3 * 2**30)
  ('2 KiB', '3.00 GiB')
  """
  for unit in ('B', 'KiB', 'MiB'):
    if n < 1024:
      return f'{n:.0f} {unit}'
    n /= 1024
  return f'{n:.2f} GiB'
