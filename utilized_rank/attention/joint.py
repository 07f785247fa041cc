"""One attention head's factors of every rank, from weights and moments.

In each head let q = x W_q + b_q and k = y W_k + b_k have e features. Every
matrix of rank r that could stand for W_q W_k^T on the data is W_q P W_k^T with
P (e, e) of rank r, so the whole problem has the size of a head: least

  tr((I - P)^T Sigma (I - P) N)

with Sigma = E[q q^T] and, for the error of the logits between rows that are
drawn independently, N = E[k k^T]: SVD_r of S_q^(1/2) W_q W_k^T S_k^(1/2)
(MoDeGPT, Lin et al., ICLR 2025, arXiv 2408.09632; LatentLLM, arXiv 2505.18413).
For the loss N is the second moment of its gradient at q, in which each key
counts as much as attention looks at it: the loss's own Kronecker-factored
quadratic for the change q -> q P.

In a head let z be the sum over rows of v = x W_v + b_v that the output kernel
reads, z W_o. Every W_v P W_o will do; Sigma = E[z z^T], measured, and
N = W_o G W_o^T, G the identity for the error of the output and the second
moment of the loss's gradient there for the loss. Errors of different heads
are taken to be uncorrelated, and heads that share a key or a value are pooled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from utilized_rank.attention.heads import HeadPair
from utilized_rank.attention.heads import Side
from utilized_rank.factorization import methods
from utilized_rank.factorization.kernels import Kernel
from utilized_rank.linalg import best_pairs
from utilized_rank.linalg.best_pairs import Pair
from utilized_rank.tree.layout import Atoms

METHODS = ('output', 'loss')
# A metric without data in some directions is given this share of its trace, so
# that a rank that is full gives the kernels back.
_FLOOR = 1e-9
Members = Mapping[str, Sequence[Kernel]]


@dataclasses.dataclass(frozen=True)
class Problem:
  """The heads of one pair; arrays lead with (loops, heads).

  Attributes:
    left: [W_q; b_q] or [W_v; b_v], (..., many, rows, e).
    right: [W_k; b_k] or W_o^T, (..., many, rows, e).
    sigma: Sigma, (..., e, e).
    metric: N, (..., e, e).
    judged: N without damping, which damages are told in.
    mean: of z, (..., many, e); None for logits.
    nats: (...), what makes tr(...) nats per example; None without gradients.
  """

  left: np.ndarray
  right: np.ndarray
  sigma: np.ndarray
  metric: np.ndarray
  judged: np.ndarray
  mean: np.ndarray | None = None
  nats: np.ndarray | None = None

  def family(self, head: tuple[int, ...]) -> tuple[Pair, np.ndarray]:
    """One head's P of every rank, a[:, :r] b[:r], and (e + 1,) their errors.

    Errors are tr((I - P)^T Sigma (I - P) N), N without damping.
    """
    sigma, e = self.sigma[head], self.sigma.shape[-1]
    factors, cross = best_pairs.loss_factors(
      np.eye(e), sigma, self.metric[head], _FLOOR, sigma
    )
    (tails,) = best_pairs.tails(cross, factors.b, self.judged[head])
    return factors, tails

  def damages(self) -> np.ndarray:
    """(e + 1,): what each rank costs, added up over heads."""
    scale = np.ones(self.sigma.shape[:2]) if self.nats is None else self.nats
    total = np.zeros(self.sigma.shape[-1] + 1)
    for head in np.ndindex(*self.sigma.shape[:2]):
      total += scale[head] * self.family(head)[1]
    return total


def logits(
  named: Mapping[str, Any],
  members: Members,
  pair: HeadPair,
  method: str,
  damping: float,
) -> Problem:
  """The problem of query and key kernels.

  Args:
    named: leaves by path.
    members: both kernels' matrices with their moments.
    pair: the pair; for the loss the left one should share no partner.
    method: 'output' or 'loss'.
    damping: the gradient's metric is moved towards that of the logits by this
      share of its trace.
  """
  left, right = pair.left, pair.right
  q, k = weights(left, named), weights(right, named)
  sigma = _gram(q, _augmented(left, members[left.path]))
  metric = _gram(k, _augmented(right, members[right.path]))
  if method == 'output':
    return Problem(q, k, sigma, metric, metric)
  gradient = _blocks(left, _gradient(members[left.path]), left.layout.outputs)
  share = damping * _trace(gradient) / np.maximum(_trace(metric), 1e-300)
  metric = gradient + share[..., None, None] * metric
  nats = _rows(left, members[left.path]) / 2
  return Problem(q, k, sigma / q.shape[2], metric, gradient, None, nats)


def values(
  named: Mapping[str, Any],
  members: Members,
  pair: HeadPair,
  method: str,
  damping: float,
  centered: bool,
) -> Problem:
  """The problem of value and output kernels.

  Args:
    named: leaves by path.
    members: the output kernel's matrices with their moments.
    pair: the pair.
    method: 'output' or 'loss'.
    damping: share of the mean of G's diagonal that is added to it.
    centered: take z about its mean.
  """
  left, right = pair.left, pair.right
  layout, its = right.layout, members[right.path]
  v, o = weights(left, named), weights(right, named)
  second = np.stack([k.second for k in its])
  mean = np.stack([k.mean for k in its])
  if centered:
    second = second - mean[:, :, None] * mean[:, None, :]
  sigma = _blocks(right, second, layout.inputs) / o.shape[2]
  z = _arranged(
    right, mean, layout.groups + layout.inputs, (right.many, (right.head,))
  )
  rows = o.shape[3]
  eye = np.broadcast_to(np.eye(rows), (*o.shape[:2], rows, rows))
  if method == 'output':
    metric = _gram(o, eye)
    return Problem(v, o, sigma, metric, metric, z)
  g = _arranged(right, _gradient(its), layout.groups, trailing=2)
  damped = g + damping / rows * _trace(g)[..., None, None] * eye
  nats = _rows(right, its) / 2
  return Problem(v, o, sigma, _gram(o, damped), _gram(o, g), z, nats)


def weights(side: Side, named: Mapping[str, Any]) -> np.ndarray:
  """A kernel as (loops, heads, many, rows, e), the bias as one more row."""
  layout = side.layout
  atoms = tuple(range(len(layout.atoms)))
  leaf = np.asarray(named[side.path], np.float64)
  tail = (side.many, _own(side), (side.head,))
  kernel = _arranged(side, leaf, atoms, tail)
  path = head_bias(side)
  if path is None:
    return kernel
  bias = np.asarray(named[path], np.float64)
  row = _arranged(
    side, bias, layout.groups + layout.outputs, (side.many, (), (side.head,))
  )
  return np.concatenate([kernel, row], axis=3)


def leaves(side: Side, array: np.ndarray) -> tuple[np.ndarray, Any]:
  """Undoes `weights` for heads of any width r.

  Returns:
    (*groups, *inputs, *outputs) with r in place of the head's width; and the
    bias, (*groups, *outputs), zero beyond r, or None.
  """
  layout, rank = side.layout, array.shape[-1]
  lead = side.loops + side.shared + side.many
  bias = None
  if head_bias(side) is not None:
    array, row = array[..., :-1, :], array[..., -1, :]
    row = np.pad(row, [(0, 0)] * 3 + [(0, side.width - rank)])
    order = layout.groups + layout.outputs
    names = lead + (side.head,)
    names += tuple(a for a in order if a not in names)  # of size one
    row = row.reshape(layout.sizes(names))
    bias = row.transpose([names.index(a) for a in order])
  names = lead + _own(side) + (side.head,)
  array = array.reshape(*layout.sizes(names[:-1]), rank)
  order = layout.groups + layout.inputs + layout.outputs
  return array.transpose([names.index(a) for a in order]), bias


def _own(side: Side) -> Atoms:
  """Atoms that no head's structure takes: a kernel's model dimension."""
  taken = {*side.loops, *side.shared, *side.many, side.head}
  return tuple(a for a in range(len(side.layout.atoms)) if a not in taken)


def head_bias(side: Side) -> str | None:
  """The bias of a head's own features, which an output kernel's is not."""
  return side.bias if side.head in side.layout.outputs else None


def _arranged(
  side: Side,
  array: np.ndarray,
  names: Atoms,
  tail: Sequence[Atoms] = (),
  trailing: int = 0,
) -> np.ndarray:
  """An array over atoms, as one over heads.

  Args:
    side: the kernel.
    array: its axes are the atoms `names`, merged or not, and `trailing` more.
    names: atoms; heads that are not among them have equal parts.
    tail: what comes after loops and heads, each axis by its atoms.
    trailing: number of further axes.

  Returns:
    (loops, heads, *tail, *further axes).
  """
  layout = side.layout
  rest = array.shape[array.ndim - trailing :]
  axes = (side.loops, side.shared, *tail)
  order = tuple(a for axis in axes for a in axis)
  # An atom of size one may have no place: a single head's own axis.
  names = tuple(a for a in names if a in order or layout.atoms[a] > 1)
  array = array.reshape((*layout.sizes(names), *rest)).transpose(
    [names.index(a) for a in order if a in names]
    + list(range(len(names), len(names) + trailing))
  )
  sizes = [layout.atoms[a] if a in names else 1 for a in order]
  array = array.reshape((*sizes, *rest))
  array = np.broadcast_to(array, (*layout.sizes(order), *rest))
  return array.reshape(*(math.prod(layout.sizes(axis)) for axis in axes), *rest)


def _augmented(side: Side, its: Sequence[Kernel]) -> np.ndarray:
  """Second moment of [x, 1], or of x where no bias is added."""
  second = np.stack([k.second for k in its])
  if head_bias(side) is not None:
    mean = np.stack([k.mean for k in its])[:, :, None]
    one = np.ones((len(its), 1, 1))
    second = np.block([[second, mean], [mean.transpose(0, 2, 1), one]])
  return _arranged(side, second, side.layout.groups, trailing=2)


def _blocks(side: Side, matrix: np.ndarray, atoms: Atoms) -> np.ndarray:
  """Each head's block of (groups, n, n), n over `atoms`; `many` added up."""
  layout = side.layout
  apart = tuple(a for a in atoms if a != side.head)
  order = [atoms.index(a) for a in (*apart, side.head)]
  sizes, n, e = layout.sizes(atoms), len(atoms), side.width
  matrix = matrix.reshape(len(matrix), *sizes, *sizes).transpose(
    0, *(1 + i for i in order), *(1 + n + i for i in order)
  )
  count = math.prod(layout.sizes(apart))
  matrix = matrix.reshape(len(matrix), count, e, count, e)
  blocks = np.einsum('gkxky->gkxy', matrix).reshape(-1, e, e)
  names = layout.groups + apart
  return _arranged(side, blocks, names, (side.many,), trailing=2).sum(2)


def _gradient(its: Sequence[Kernel]) -> np.ndarray:
  gradients = [k.gradient for k in its if k.gradient is not None]
  if len(gradients) < len(its):
    raise methods.needs_gradients(its[0].path)
  return np.stack(gradients)


def _rows(side: Side, its: Sequence[Kernel]) -> np.ndarray:
  rows = np.array([k.rows_per_example for k in its])
  return _arranged(side, rows, side.layout.groups)


def _gram(w: np.ndarray, second: np.ndarray) -> np.ndarray:
  """W^T S W in every head, `many` added up."""
  return np.einsum('lsnde,lsdf,lsnfg->lseg', w, second, w, optimize=True)


def _trace(matrix: np.ndarray) -> np.ndarray:
  return np.trace(matrix, axis1=-2, axis2=-1)
