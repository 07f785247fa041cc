"""Views and layouts against numpy arrays of labels."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from utilized_rank.tree.layout import Layout
from utilized_rank.tree.layout import View
from utilized_rank.tree.layout import common_atoms
from utilized_rank.tree.layout import pieces_of


def atom_of_each_axis(view, array):
  """Checks that an array of labels is laid out as the view says.

  The leaf holds its own flat positions, so an element tells where it is from.
  """
  sizes = view.atoms
  taken = dict(view.taken)
  strides = np.cumprod((1, *sizes[:0:-1]))[::-1]
  at = np.indices(view.sizes)
  expected = np.zeros(view.sizes, int)
  for axis, atoms in enumerate(view.axes):
    index = at[axis]
    for a in reversed(atoms):
      expected += (index % sizes[a]) * strides[a]
      index = index // sizes[a]
  expected += sum(i * strides[a] for a, i in taken.items())
  np.testing.assert_array_equal(array, expected)


SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


def factorization(data, n):
  """A random shape of n elements."""
  sizes = []
  while n > 1 and len(sizes) < 4:
    k = data.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
    sizes.append(k)
    n //= k
  return [*sizes, n]


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(SHAPES, st.data())
def test_views_move_as_arrays_do(shape, data):
  array = np.arange(int(np.prod(shape))).reshape(shape)
  view = View.of_leaf('w', shape, np.float32)
  for _ in range(data.draw(st.integers(1, 5))):
    ops = ['transpose', 'reshape', 'broadcast']
    if 1 in array.shape:
      ops.append('squeeze')
    if array.ndim:
      ops.append('take')
    op = data.draw(st.sampled_from(ops))
    if op == 'transpose':
      order = data.draw(st.permutations(range(array.ndim)))
      array, view = array.transpose(order), view.transpose(order)
    elif op == 'squeeze':
      axis = array.shape.index(1)
      array, view = array.squeeze(axis), view.squeeze([axis])
    elif op == 'broadcast':
      array = np.broadcast_to(array, (2, *array.shape))
      view = view.broadcast(array.shape, range(1, array.ndim))
    elif op == 'take':
      axis = data.draw(st.integers(0, array.ndim - 1))
      i = data.draw(st.integers(0, array.shape[axis] - 1))
      array, view = array.take(i, axis), view.take(axis, i)
    else:
      sizes = factorization(data, array.size)
      moved = view.reshape(sizes)
      if moved is None:
        continue
      array, view = array.reshape(sizes), moved
    atom_of_each_axis(view, array)


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_matrices_round_trip(data):
  shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
  roles = [data.draw(st.integers(0, 2)) for _ in shape]
  pick = lambda r: tuple(i for i, x in enumerate(roles) if x == r)
  layout = Layout.of(shape, pick(0), pick(1), pick(2))
  leaf = np.arange(np.prod(shape)).reshape(shape)
  matrices = layout.to_matrices(leaf)
  assert matrices.shape == layout.group_shape + layout.matrix_shape
  np.testing.assert_array_equal(layout.from_matrices(matrices), leaf)
  fine = layout.refine(
    [f for s in shape for f in ((2, s // 2) if s % 2 == 0 else (s,))]
  )
  np.testing.assert_array_equal(
    fine.to_matrices(leaf).reshape(matrices.shape), matrices
  )
  np.testing.assert_array_equal(
    fine.coarsen().to_matrices(leaf).reshape(matrices.shape), matrices
  )


@pytest.mark.parametrize(
  'shape, sizes',
  [
    ((4, 6), (8, 3)),  # 8 holds part of the 6
    ((6,), (4, 2)),
    ((2, 3), (7,)),
    ((2, 3), (2, 3, 2)),
  ],
)
def test_reshapes_that_cut_an_axis_unevenly(shape, sizes):
  moved = View.of_leaf('w', shape, np.float32).reshape(sizes)
  assert moved is None or sizes == (8, 3)  # 4 x 6 is cut into 4 x (2 x 3)


@pytest.mark.quick
def test_a_broadcast_axis_does_not_mix():
  view = View.of_leaf('w', (3,), np.float32).broadcast((2, 3), (1,))
  assert view.reshape((6,)) is None
  assert view.reshape((2, 3, 1)).sizes == (2, 3, 1)
  stretched = View.of_leaf('w', (1, 3), np.float32).broadcast((4, 3), (0, 1))
  assert stretched.axes == ((), (1,))
  assert stretched.taken == ((0, 0),)


def test_atoms_beforehand():
  view = View.of_leaf('w', (12, 5), np.float32, (3, 4, 5))
  assert view.sizes == (12, 5)
  assert view.axes == ((0, 1), (2,))


def test_cuts():
  assert common_atoms((12,), [(12,), (3, 4)]) == (3, 4)
  assert common_atoms((12,), [(3, 4), (4, 3)]) is None
  assert common_atoms((1, 4), [(1, 4), (1, 2, 2)]) == (1, 2, 2)
  assert pieces_of((1, 4), (1, 2, 2)) == [(0,), (1, 2)]
  with pytest.raises(ValueError, match='does not cut'):
    pieces_of((6, 4), (4, 6))
  with pytest.raises(ValueError, match='each of the 2 axes'):
    Layout.of((4, 3), inputs=(0,), outputs=(0,))
