"""What settings outside of a program do to its speed on a CPU.

  python -m benchmarks.settings --out benchmarks/results/settings.json

ViT-B/16 at 224 px: dense, captured, and factorized to 25 %. Options of the
compiler (as `XLA_FLAGS` has them) are compared in one run, in turns: which
library multiplies, and which makes fused loops. Those of the C library decide
whether memory that a run frees is given back and must be cleared anew by the
next one; each row says how many pages were. They are of a whole process:

  MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 \\
    python -m benchmarks.settings --batches 64
"""

from __future__ import annotations

import functools
import resource

import jax

from benchmarks.shared import record
from benchmarks.shared import timing
from benchmarks.shared import vits
import utilized_rank as ur

_REDUCE = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'}
SETTINGS = {
  'default': {},
  'ynn_for_reductions': _REDUCE,
  'ynn_for_reductions_onednn': {
    **_REDUCE,
    'xla_cpu_experimental_onednn_custom_call': True,
  },
}


def pages(run) -> int:
  """How many pages of memory a call is given anew."""
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  jax.block_until_ready(run())
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def main():
  parser = vits.parser(__doc__, repeats=6)
  parser.add_argument('--batches', type=int, nargs='*', default=[8])
  args = parser.parse_args()
  model, trees = vits.trees(args.variant, args.pixels, (0.25,))
  fn = ur.low_rank(model.apply)
  capture = ur.capture(model.apply)
  programs = {
    'dense': (fn, trees['dense']),
    'captured': (lambda *args: capture(*args)[1], trees['dense']),
    '25%': (fn, trees['25%']),
  }
  rows = []
  for batch in args.batches:
    images = vits.random_images(batch, args.pixels)
    for what, (program, params) in programs.items():
      runs = {
        name: functools.partial(
          jax.jit(program, compiler_options=options), params, images
        )
        for name, options in SETTINGS.items()
      }
      took = timing.interleaved(runs, max(2, args.repeats * 8 // batch))
      for name, run in runs.items():
        row = {
          'batch': batch,
          'program': what,
          'setting': name,
          'seconds_per_image': took[name]['wall'] / batch,
          'over_default': took[name]['wall'] / took['default']['wall'],
          'pages': pages(run),
        }
        print(row, flush=True)
        rows.append(row)
  result = {'variant': args.variant, 'settings': SETTINGS, 'rows': rows}
  record.write(args.out, 'settings', result)


if __name__ == '__main__':
  main()
