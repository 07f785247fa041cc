"""From hidden layers to narrower ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from utilized_rank.factorization import methods
from utilized_rank.hidden import kept
from utilized_rank.hidden.layers import Hidden
from utilized_rank.hidden.layers import HiddenLayer
from utilized_rank.hidden.layers import UnitKernel
from utilized_rank.hidden.layers import Units
from utilized_rank.lowrank.leaf import is_low_rank
from utilized_rank.lowrank.narrow_heads import NarrowHeads
from utilized_rank.lowrank.place import place
from utilized_rank.lowrank.place import place_like
from utilized_rank.moments.moments import Moments
from utilized_rank.tree import paths
from utilized_rank.walk import compat


class Cut(NamedTuple):
  """A layer, and which of its units stay.

  Attributes:
    layer: the layer.
    units: (members, k), ascending, for every step of a stack.
  """

  layer: HiddenLayer
  units: np.ndarray


def narrow_hidden(
  params: Any,
  moments: Moments,
  hidden: Hidden,
  widths: Mapping[str, int],
  *,
  method: str = 'output',
  compensate_mean: bool = True,
  damping: float = methods.DAMPING,
) -> Any:
  """Takes units out of hidden layers, and lets the others stand for them.

  Units stay in the order of a pivoted Cholesky decomposition of what the second
  kernel reads, weighted by what an error there costs; those that go are read
  from those that stay by least squares, which goes into the second kernel and
  its bias.

  Args:
    params: dense parameters; leaves of no layer in `widths` may be `LowRank`.
    moments: of every second kernel's inputs.
    hidden: as `find_hidden` found them.
    widths: name of the layer (the path of its first kernel) to the number of
      units that stay; other layers stay as they are.
    method: 'output' for the least error at the second kernel's outputs; 'loss'
      for the least loss, by the second moment of its gradient there, which
      needs moments that were collected with one.
    compensate_mean: give what the means lose to the second kernel's bias, where
      the function adds one and uses it for nothing else.
    damping: for 'loss', the share of the mean of their diagonal that is added
      to moments of gradients, to choose units by.

  Returns:
    The tree for `low_rank(fn)`. Kernels and vectors of layers that the function
    takes as narrow as they come (`resizes`) are narrower arrays, and `fn` runs
    on them as they are. Where the width is the function's own, kernels are
    `NarrowHeads`, the layer's units being the features of one head; vectors
    keep their shapes, with the units that stay first. `merge` pads such kernels
    with zeros.

  Raises:
    ValueError: an unknown method or layer, a width that it cannot have, layers
      of fixed width that share a kernel, or moments that lack a kernel, or the
      gradients.

  >>> import utilized_rank as ur
  >>> def fn(p, x):
  ...   return jnp.maximum(x @ p['up'], 0) @ p['down']
  >>> up = jnp.array([[1.0, 2.0, -1.0], [0.0, 0.0, 1.0]])
  >>> params = {'up': up, 'down': jnp.ones((3, 1))}
  >>> x = jnp.array([[1.0, 0.0], [0.5, 3.0], [2.0, 1.0]])
  >>> hidden = ur.find_hidden(fn, params, x)
  >>> moments = ur.capture(fn)(params, x)[1]
  >>> small = narrow_hidden(params, moments, hidden, {'up': 2})
  >>> small['up'].shape  # one of the first two units is twice the other
  (2, 2)
  >>> bool(jnp.allclose(fn(small, x), fn(params, x), atol=1e-4))
  True
  """
  tree, _ = cut_hidden(
    params,
    moments,
    hidden,
    widths,
    method=method,
    compensate_mean=compensate_mean,
    damping=damping,
  )
  return tree


@compat.moves_data
def cut_hidden(
  params: Any,
  moments: Moments,
  hidden: Hidden,
  widths: Mapping[str, int],
  *,
  method: str,
  compensate_mean: bool,
  damping: float,
) -> tuple[Any, list[Cut]]:
  """What `narrow_hidden` returns, and which units stay."""
  layers = _chosen(hidden, widths)
  named, treedef = paths.flatten(params, is_low_rank)
  _check(layers.values(), named)
  out = dict(named)
  cuts: list[Cut] = []
  for layer, its in kept.members(
    params,
    moments,
    layers.values(),
    method=method,
    compensate_mean=compensate_mean,
    damping=damping,
  ):
    path = layer.second.path
    found = [member.refit(int(widths[layer.name])) for member in its]
    out[path] = _matrices(layer.second, [f.w for f in found], named[path])
    bias = moments[path].entry.bias if compensate_mean else None
    if bias is not None:
      lost = np.stack([f.constant for f in found])
      scale = moments[path].entry.bias_scale
      old = np.asarray(out[bias], np.float64)
      out[bias] = old + scale * lost.reshape(old.shape)
    cuts.append(Cut(layer, np.stack([f.kept for f in found])))
  # Only now, since what reads one layer's units may make those of the next.
  for layer, units in cuts:
    for at in (*layer.kernels, *layer.vectors):
      out[at.path] = _cut(layer, at, units, out[at.path])
  for path, value in out.items():
    if value is not named[path]:
      out[path] = (
        place(value, named[path])
        if is_low_rank(value)
        else place_like(value, named[path])
      )
  return paths.unflatten(treedef, out), cuts


def hidden_damages(
  params: Any,
  moments: Moments,
  hidden: Hidden,
  *,
  method: str = 'loss',
  compensate_mean: bool = True,
  damping: float = methods.DAMPING,
) -> dict[str, np.ndarray]:
  """What every width of every hidden layer is predicted to cost.

  Args:
    params: dense parameters.
    moments: of every second kernel's inputs.
    hidden: as `find_hidden` found them.
    method: as for `narrow_hidden`, and with it the unit: 'loss' is in nats per
      example, as `predict_loss` is; 'output' is the mean square error of the
      second kernel's outputs, which layers do not have in common.
    compensate_mean: as for `narrow_hidden`.
    damping: as for `narrow_hidden`.

  Returns:
    Name of the layer to (width + 1,): entry k is the damage of k units.
  """
  return {
    layer.name: np.sum([member.damages() for member in its], axis=0)
    for layer, its in kept.members(
      params,
      moments,
      hidden.values(),
      method=method,
      compensate_mean=compensate_mean,
      damping=damping,
    )
  }


def _chosen(
  hidden: Hidden, widths: Mapping[str, int]
) -> dict[str, HiddenLayer]:
  fixed: dict[str, str] = {}
  for name, width in widths.items():
    if name not in hidden:
      raise ValueError('a width is given for ' + paths.unknown(name, hidden))
    most = hidden[name].width
    if not 1 <= width <= most or width != int(width):
      raise ValueError(
        f'width {width!r} for {name!r}: it has {most} units, of which 1 to '
        f'{most} can stay'
      )
    for kernel in () if hidden[name].resizes else hidden[name].kernels:
      other = fixed.setdefault(kernel.path, name)
      if other != name:
        raise ValueError(
          f'{kernel.path!r} is of the hidden layers {other!r} and {name!r}, '
          "whose widths are the function's own: give a width for one of them "
          '(`hidden.apart()` has such)'
        )
  return {name: hidden[name] for name in widths}


def _check(layers: Any, named: dict[str, Any]) -> None:
  for layer in layers:
    for at in (*layer.kernels, *layer.vectors):
      if at.path not in named:
        raise ValueError('no parameter ' + paths.unknown(at.path, named))
      leaf = named[at.path]
      if is_low_rank(leaf):
        raise ValueError(
          f'{at.path!r} is low-rank already; give the dense parameters'
        )
      if leaf.shape[at.axis] != layer.width:
        raise ValueError(
          f'{at.path!r} has {leaf.shape[at.axis]} units, its hidden layer was '
          f'found with {layer.width}'
        )


def _matrices(
  kernel: UnitKernel, matrices: Sequence[np.ndarray], leaf: Any
) -> np.ndarray:
  layout = kernel.layout
  stacked = np.stack(matrices).reshape(layout.group_shape + layout.matrix_shape)
  return layout.from_matrices(stacked).reshape(leaf.shape)


def _cut(layer: HiddenLayer, at: Units, units: np.ndarray, leaf: Any) -> Any:
  """A leaf with the units that stay, on the host.

  Args:
    layer: the layer.
    at: where its units are in the leaf.
    units: (members, k).
    leaf: the leaf.
  """
  array = np.asarray(leaf)
  if layer.resizes:
    return _taken(at, units, array)
  if isinstance(at, UnitKernel):
    layout = at.layout
    narrow = _taken(at, units, array)
    atoms = list(layout.atoms)
    atoms[at.atom] = units.shape[1]
    order = layout.groups + layout.inputs + layout.outputs
    a = narrow.reshape(atoms).transpose(order).astype(leaf.dtype)
    return NarrowHeads(a, None, None, layout, head=at.atom)
  # Units that go have nothing to say any more; their numbers stay.
  every = np.arange(layer.width)
  rest = [np.setdiff1d(every, mine) for mine in units]
  return _taken(at, np.hstack([units, np.stack(rest)]), array)


def shrunk(layer: HiddenLayer, named: Mapping[str, Any]) -> dict[str, Any]:
  """The leaves of a layer whose kernels are `NarrowHeads`, without zeros.

  Args:
    layer: one that the function takes as narrow as it comes.
    named: leaves by path.
  """
  out: dict[str, Any] = {}
  width = named[layer.second.path].rank
  for kernel in layer.kernels:
    layout, a = kernel.layout, named[kernel.path].opened().a
    order = layout.groups + layout.inputs + layout.outputs
    shape = list(layout.shape)
    shape[kernel.axis] = width
    out[kernel.path] = a.transpose(np.argsort(order)).reshape(shape)
  for at in layer.vectors:
    old = named[at.path]
    # On the host, where no program is compiled for it.
    narrow = np.take(np.asarray(old), np.arange(width), at.axis)
    out[at.path] = place_like(narrow, old)
  return out


def _taken(at: Units, units: np.ndarray, array: np.ndarray) -> np.ndarray:
  if at.stack is None:
    return np.take(array, units[0], at.axis)
  front = np.moveaxis(array, (at.stack, at.axis), (0, 1))
  front = front[np.arange(len(front))[:, None], units]
  return np.moveaxis(front, (0, 1), (at.stack, at.axis))
