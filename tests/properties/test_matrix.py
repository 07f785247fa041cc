"""Every way of writing a product, inside every kind of wrapper.

For each cell: moments equal a float64 numpy reference to 1e-5, and
`low_rank(fn)` on full-rank factors equals `fn` to 1e-5.
"""

import functools
from typing import Any
import warnings

import evaluate
import forms
import jax
import numpy as np
import pytest
from wrappers import COMPILED
from wrappers import FORMS
from wrappers import WRAPPERS
from wrappers import cell
from wrappers import close
from wrappers import full_rank
from wrappers import together

import utilized_rank as ur

# One output feature for each member of an ensemble: matrices of rank one, which
# are named and not measured, as those of a depthwise convolution.
NO_RANK = {('vmap_ensemble', 'vector')}
# What is not of these CI looks at with one JAX alone: the same rules again, or
# one primitive more, which random programs have on both.
ON_BOTH = {'plain', 'scan_stacked', 'cond', 'shard_map', 'vmap_batch'}


@functools.cache
def results(wrapper_name: str) -> dict[str, Any]:
  """What the cells of a wrapper compare, by form."""
  wrap = WRAPPERS[wrapper_name]
  cells = {
    name: cell(form, wrap, forms.seed_of(name + wrapper_name))
    for name, form in FORMS.items()
  }
  fn = wrap.wrap(together)
  params = {name: c[0] for name, c in cells.items()}
  xs = {name: c[1] for name, c in cells.items()}
  run = (
    jax.jit
    if wrapper_name in COMPILED
    else (lambda fn: functools.partial(evaluate.call, fn))
  )
  want = run(fn)(params, xs)
  outputs, moments = run(ur.capture(fn))(params, xs)
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', '.*gather')
    got = run(ur.low_rank(fn))(full_rank(params, moments.table), xs)
  return {
    name: (
      c[2],
      want[name],
      outputs[name],
      {
        path.removeprefix(name + '/'): moment
        for path, moment in moments.items()
        if path.startswith(name + '/')
      },
      got[name],
    )
    for name, c in cells.items()
  }


@pytest.mark.parametrize('name', FORMS)
@pytest.mark.parametrize(
  'wrap',
  [
    pytest.param(name, marks=() if name in ON_BOTH else pytest.mark.slow)
    for name in WRAPPERS
  ],
)
def test_cell(wrap, name):
  expected, want, outputs, moments, got = results(wrap)[name]
  close(outputs, want, 'captured outputs')
  if (wrap, name) in NO_RANK:
    expected = {}
  assert set(moments) == set(expected)
  for path, (count, mean, second) in expected.items():
    moment = moments[path]
    np.testing.assert_array_equal(moment.count, count)
    close(moment.mean, mean, f'mean of {path}')
    close(moment.second, second, f'second moment of {path}')
  close(got, want, 'low-rank outputs')
