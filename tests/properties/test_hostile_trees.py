"""Trees that nobody would write, given to every public call.

The kernels of one small network stand in containers of any kind, beside leaves
of any kind: what comes out is what comes out of the kernels alone, and the
other leaves are what they were, or one error says which leaf is refused and
why.

25 trees by default; the long run: UTILIZED_RANK_EXAMPLES=10000.
"""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import every_call
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur

pytestmark = [
  pytest.mark.slow,
  # The other leaves may well be most.
  pytest.mark.filterwarnings('ignore:most is not measured'),
]


class Named(NamedTuple):
  """Found by its name in its module, where trees are read."""

  net: Any
  other: Any


class Container(NamedTuple):
  """A tree of the kernels and the others, and where in it they are."""

  made: Callable[[Any, Any], Any]
  kernels: Callable[[Any], Any]
  others: Callable[[Any], Any]


def _at(made, one, other):
  return Container(made, lambda t: t[one], lambda t: t[other])


def _keys(one, other):
  return _at(lambda k, o: {one: k, other: o}, one, other)


CONTAINERS = {
  'dictionary': _keys('net', 'other'),
  'numbers as keys': _keys(7, 3),
  'pairs as keys': _keys(('a', 1), ('b', 2)),
  'bytes as keys': _keys(b'a', b'b'),
  'keys of two kinds': _keys('a', 2),
  'no name': _keys('', 'x'),
  'a path as key': _keys('a/b', 'a'),
  'None as key': Container(
    lambda k, o: {None: [k, o]}, lambda t: t[None][0], lambda t: t[None][1]
  ),
  'list': _at(lambda k, o: [o, k], 1, 0),
  'tuple': _at(lambda k, o: (k, o), 0, 1),
  'named tuple': _at(Named, 0, 1),
  'deep': Container(
    lambda k, o: [[o], [[[k]]]], lambda t: t[1][0][0][0], lambda t: t[0][0]
  ),
  'ordered': _at(
    lambda k, o: collections.OrderedDict(other=o, net=k), 'net', 'other'
  ),
  'default': _at(
    lambda k, o: collections.defaultdict(dict, {'o': o, 'net': k}), 'net', 'o'
  ),
}
OTHERS = {
  'None': None,
  'flag': True,
  'number': 3,
  'text': 'gelu',
  'function': jnp.tanh,
  'object': object(),
  'type': np.dtype('float32'),
  'integers': np.arange(3),
  'bytes': np.ones((4, 4), np.int8),
  'no rows': np.zeros((0, 3), np.float32),
  'no columns': jnp.zeros((3, 0), jnp.bfloat16),
  'no numbers': np.full((3, 3), np.nan, np.float32),
  'huge': np.full(3, 1e30, np.float32),
  'numpy number': np.float64(2),
  'complex': np.ones(3, np.complex64),
  'random key': jax.random.key(3),
  'texts': np.array(['a', 'b']),
  'objects': np.array([None, {}], object),
  'empty': {},
  'many': [np.float32(i) for i in range(300)],
}
# What cannot be written, and what safetensors has no room for.
UNSAVED = {'function', 'object', 'type', 'texts', 'objects'}
UNSAFE = UNSAVED | {'flag', 'number', 'text', 'random key'}
UNSAVED_KEYS = {'pairs as keys', 'bytes as keys', 'None as key'}


@pytest.fixture(scope='module')
def plain():
  """What every call makes of the kernels alone."""
  params = every_call.float32()
  moments = ur.collect(
    every_call.network,
    params,
    every_call.BATCHES,
    loss=every_call.LOSS,
    **every_call.QUIET,
  )
  return {
    n: call(every_call.network, params, moments)
    for n, call in every_call.CALLS.items()
  }


def _check_equal(found, wanted):
  found, wanted = every_call.numbers(found), every_call.numbers(wanted)
  assert len(found) == len(wanted)
  for one, other in zip(found, wanted, strict=True):
    # Sums in another order, of compiled programs with other arguments.
    np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


def _check_same(found, wanted):
  """Leaves that no call may change."""
  found, treedef = jax.tree.flatten(found)
  wanted, same = jax.tree.flatten(wanted)
  assert treedef == same
  for one, other in zip(found, wanted, strict=True):
    if one is other:
      continue
    assert one.dtype == other.dtype and one.shape == other.shape
    if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
      one, other = map(jax.random.key_data, (one, other))
    np.testing.assert_array_equal(one, other)


def _refused(container, others, call):
  """What the error has to say, or None where the call has to work."""
  if container == 'keys of two kinds':
    return r"dictionary at '' has keys that cannot be sorted \('a', 2\)"
  if call == 'save' and container in UNSAVED_KEYS:
    return "the keys .* at '' cannot be saved"
  if call == 'save' and UNSAVED & set(others):
    return 'cannot save a .* at '
  if call == 'save_safetensors' and UNSAFE & set(others):
    return 'safetensors holds arrays of numbers alone'
  return None


@every_call.examples
@given(
  container=st.sampled_from(sorted(CONTAINERS)),
  others=st.lists(st.sampled_from(sorted(OTHERS)), max_size=4, unique=True),
  call=st.sampled_from(sorted(every_call.CALLS)),
)
def test_what_stands_beside_changes_nothing(plain, container, others, call):
  made, kernels, beside = CONTAINERS[container]
  params = made(every_call.float32(), {name: OTHERS[name] for name in others})
  fn = lambda params, x: every_call.network(kernels(params), x)

  def run():
    moments = ur.collect(
      fn, params, every_call.BATCHES, loss=every_call.LOSS, **every_call.QUIET
    )
    return every_call.CALLS[call](fn, params, moments)

  if refused := _refused(container, others, call):
    with pytest.raises((TypeError, ValueError), match=refused) as raised:
      run()
    assert len(str(raised.value)) < 400 and '\n' not in str(raised.value)
    return
  result = run()
  if call in every_call.TREES:
    assert type(result) is type(params)
    _check_same(beside(result), beside(params))
    result = kernels(result)
  _check_equal(result, plain[call])
