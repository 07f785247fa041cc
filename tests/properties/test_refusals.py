"""What is no kernel, inside every kind of wrapper: named, never half seen.

The other half of the matrix in `test_matrix.py`: for each cell `find_sites`
says why the leaf is no kernel, and selecting it is an error that says so too.
"""

import re

import jax
import numpy as np
import pytest
from refused import REFUSED
from refused import X
import wrappers

import utilized_rank as ur

WRAPPERS = wrappers.WRAPPERS
# Some wrappers look for a part of this name to make a predicate of.
PART = 'matmul'


def reasons(wrap, name, reason):
  """The reason, or what stands for it where a wrapper comes before."""
  # Other leaves are named by their whole paths.
  whole = re.sub(r'\b(with|of) v$', rf'\1 {PART}/v', reason)
  if wrap.startswith('custom_'):
    # Entered only where a product is inside; else its own rule survives.
    return whole, f'used by {wrap}_call'
  if (wrap, name) == ('fori_loop_indexed', 'bias'):
    # A slice at a traced index is no bias that a constant could move to.
    return (whole, 'used by add')
  return (whole,)


def shapes(tree, lead):
  return jax.tree.map(
    lambda v: jax.ShapeDtypeStruct((*lead, *np.shape(v)), np.float32), tree
  )


@pytest.mark.parametrize('name', REFUSED)
@pytest.mark.parametrize('wrap', WRAPPERS)
def test_a_refusal_names_leaf_and_reason(wrap, name):
  fn, params, reason = REFUSED[name]
  wrapper = WRAPPERS[wrap]
  params = shapes(params, wrapper.lead if wrapper.stacks else ())
  x = shapes(X, wrapper.lead if wrapper.copies > 1 else ())
  wrapped = wrapper.wrap(lambda p, x: {PART: fn(p[PART], x[PART])})
  args = {PART: params}, {PART: x}
  sites = ur.find_sites(wrapped, *args)
  path = f'{PART}/w'
  assert path not in sites
  found = sites.unseen[path]
  assert any(r in found for r in reasons(wrap, name, reason)), found
  # Of two parameters, the selected one would be the kernel.
  both = name == 'two_parameters'
  rules = [(f'{PART}/(w|v)' if both else path, True)]
  with pytest.raises(ValueError, match=f"'{PART}/[wv]'"):
    ur.find_sites(wrapped, *args, select=rules)
