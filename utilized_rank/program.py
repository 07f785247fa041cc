"""What XLA says of a compiled program."""

from __future__ import annotations

from typing import Any


def peak_bytes(compiled: Any) -> int:
  """What it takes on one device: arguments, outputs and temporaries."""
  memory = compiled.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )


def arguments_bytes(compiled: Any) -> int:
  """What the arguments that it uses take on one device."""
  return compiled.memory_analysis().argument_size_in_bytes
