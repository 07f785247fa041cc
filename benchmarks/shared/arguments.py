"""The options that all benchmarks have; each adds its own."""

from __future__ import annotations

import argparse
import pathlib


def parser(
  doc: str | None,
  *,
  out: pathlib.Path | None = None,
  repeats: int | None = None,
) -> argparse.ArgumentParser:
  """A parser with `--out`, and `--repeats` where there is a default.

  Args:
    doc: the benchmark's docstring, which `--help` prints.
    out: where the result goes by default, a file or a folder of several; None
      for nowhere.
    repeats: how often times are taken by default; None for no such option.
  """
  made = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  what = 'folder' if out is not None and not out.suffix else 'file'
  made.add_argument(
    '--out', type=pathlib.Path, default=out, help=f'{what} of the result'
  )
  if repeats is not None:
    made.add_argument('--repeats', type=int, default=repeats)
  return made
