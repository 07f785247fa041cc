"""AdamW and Muon for trees with pairs of factors in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import re
from typing import Any

import jax.numpy as jnp

from utilized_rank.host.extras import extra
from utilized_rank.lowrank.leaf import LowRank
from utilized_rank.training.parts import Parts

with extra('train'):
  import optax

ADAMW, MUON = 'adamw', 'muon'
KINDS = (ADAMW, MUON)
_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class FactorOptimizer:
  """How parameters and pairs A B are moved; for `finetune(optimizer=)`.

  Attributes:
    learning_rate: peak of the schedule, which rises linearly over `warmup` and
      falls to 0 along a cosine.
    warmup: steps of it, or a share of all steps where it is below 1.
    weight_decay: decoupled, multiplied by the learning rate.
    decay_rule: regular expression that the whole name of an array must match to
      be decayed, if it has two axes or more; the arrays of a pair at `w` are
      `w/a` and `w/b`.
    decay_products: decay |A B|^2 in place of |A|^2 + |B|^2: with the gradients
      A (B B^T) and (A^T A) B of half of it.
    pair_rates: steps of A and of B are as large as A and B are to each other,
      root mean squares that is; their geometric mean is the learning rate.
    kind: 'adamw', or 'muon': factors' steps are orthogonalised
      (https://kellerjordan.github.io/posts/muon/), other arrays' Adam's.
    clip_norm: largest global norm of the gradient; infinity for none.

  >>> FactorOptimizer(learning_rate=1e-3, warmup=0.1).schedule(100)(10).item()
  0.001...
  """

  learning_rate: float = 5e-4
  warmup: float = 0.05
  weight_decay: float = 0.0
  decay_rule: str = r'.*'
  decay_products: bool = False
  pair_rates: bool = False
  kind: str = ADAMW
  clip_norm: float = 1.0

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f'kind={self.kind!r}; it is one of {KINDS}.')
    for name in ('learning_rate', 'clip_norm'):
      if not getattr(self, name) > 0:
        raise ValueError(f'{name}={getattr(self, name)!r} must be positive.')
    for name in ('weight_decay', 'warmup'):
      if not getattr(self, name) >= 0:
        raise ValueError(
          f'{name}={getattr(self, name)!r} must not be negative.'
        )

  def schedule(self, steps: int) -> optax.Schedule:
    """The learning rate of a run of so many steps."""
    warmup = self.warmup if self.warmup >= 1 else round(self.warmup * steps)
    return optax.warmup_cosine_decay_schedule(
      init_value=0.0 if warmup else self.learning_rate,
      peak_value=self.learning_rate,
      warmup_steps=int(warmup),
      decay_steps=steps,
    )

  def build(self, parts: Parts, steps: int) -> optax.GradientTransformation:
    """The transformation of a dict of arrays by name.

    Raises:
      ValueError: there is decay, and no array that the rule matches.
    """
    pairs = _pairs(parts)
    by_product = {n for pair in pairs for n in (pair.a, pair.b)}
    if not self.decay_products:
      by_product = set()
    trained, _ = parts.split()
    mask = functools.partial(_decayed, self.decay_rule, by_product)
    if self.weight_decay and not (by_product or any(mask(trained).values())):
      raise ValueError(
        f'decay_rule={self.decay_rule!r} matches no leaf of the parameters; '
        'correct it or set weight_decay=0.'
      )
    stages = [optax.clip_by_global_norm(self.clip_norm), self._steps(pairs)]
    if self.pair_rates:
      stages.append(_stateless(functools.partial(_in_proportion, pairs)))
    stages.append(optax.add_decayed_weights(self.weight_decay, mask))
    if self.decay_products and self.weight_decay:
      decay = functools.partial(_decay_products, pairs, self.weight_decay)
      stages.append(_stateless(decay))
    stages.append(optax.scale_by_learning_rate(self.schedule(steps)))
    return optax.chain(*stages)

  def _steps(self, pairs: list[_Pair]) -> optax.GradientTransformation:
    if self.kind == ADAMW:
      return optax.scale_by_adam()
    muon = optax.contrib.muon(
      1.0,
      # Steps as large as Adam's: one learning rate serves both.
      consistent_rms=0.2,
      muon_weight_dimension_numbers=functools.partial(_matrices, pairs),
    )
    return optax.chain(muon, optax.scale(-1.0))


@dataclasses.dataclass(frozen=True)
class _Pair:
  """Names of a pair's arrays, and its leaf, of which the layout is read."""

  a: str
  b: str
  leaf: LowRank

  def matrices(self, arrays: Mapping[str, Any]) -> tuple[Any, Any]:
    """A (*groups, d, r), and of B (*groups, r, ...) what is stored."""
    a, b = arrays[self.a], arrays[self.b]
    layout = self.leaf.layout
    groups, (d, _) = layout.group_shape, layout.matrix_shape
    rank = b.shape[len(groups)]
    return a.reshape(*groups, d, rank), b.reshape(*groups, rank, -1)


def _pairs(parts: Parts) -> list[_Pair]:
  """Pairs of which both factors are trained, shared left ones among them."""
  found = []
  for path, leaf in parts.pairs.items():
    inside = [n for n in parts.trained if n.startswith(f'{path}/')]
    b = [n for n in inside if n[len(path) + 1] == 'b']
    a = f'{leaf.left or path}/a'
    if b and a in parts.trained:
      found.append(_Pair(a, b[0], leaf))
  return found


def _stateless(change: Callable[[Any, Any], Any]) -> Any:
  return optax.stateless(lambda updates, params: change(updates, params))


def _in_proportion(pairs: list[_Pair], updates: Any, params: Any) -> Any:
  """Updates of A times sqrt(rms(A) / rms(B)), those of B divided by it."""
  rms = lambda v: jnp.sqrt(jnp.mean(jnp.square(v))) + _TINY
  updates = dict(updates)
  for pair in pairs:
    if pair.leaf.a is None:  # the other pairs' A moves for them
      continue
    ratio = jnp.sqrt(rms(params[pair.a]) / rms(params[pair.b]))
    updates[pair.a] = updates[pair.a] * ratio
    updates[pair.b] = updates[pair.b] / ratio
  return updates


def _decay_products(
  pairs: list[_Pair], decay: float, updates: Any, params: Any
) -> Any:
  """Adds the gradients of `decay` |A B|^2 / 2.

  With an identity block, |A [I, B']|^2 = |A|^2 + |A B'|^2.
  """
  updates = dict(updates)
  for pair in pairs:
    a, b = pair.matrices(params)
    turned = lambda v: jnp.swapaxes(v, -1, -2)
    matmul = functools.partial(jnp.matmul, precision='highest')
    outer = matmul(b, turned(b))
    if pair.leaf.order is not None:
      outer = outer + jnp.eye(outer.shape[-1], dtype=outer.dtype)
    for name, gradient in (
      (pair.a, matmul(a, outer)),
      (pair.b, matmul(matmul(turned(a), a), b)),
    ):
      shape = updates[name].shape
      updates[name] = updates[name] + decay * gradient.reshape(shape)
  return updates


def _matrices(pairs: list[_Pair], params: Any) -> Any:
  """For each array the axes that Muon takes for rows and columns, or None.

  Left to itself it takes any array of two axes for a matrix, and none of three.
  """
  numbers = dict.fromkeys(params)
  for pair in pairs:
    layout = pair.leaf.layout
    groups, inputs = len(layout.groups), len(layout.inputs)
    first = tuple(range(groups, groups + inputs))
    last = tuple(range(groups + 1, params[pair.b].ndim))
    of = optax.contrib.MuonDimensionNumbers
    if pair.leaf.a is not None:
      numbers[pair.a] = of(first, (groups + inputs,))
    numbers[pair.b] = of((groups,), last)
  return numbers


def _decayed(rule: str, apart: set[str], params: Any) -> dict[str, bool]:
  return {
    name: name not in apart
    and jnp.ndim(value) >= 2
    and re.fullmatch(rule, name) is not None
    for name, value in params.items()
  }


def describe(optimizer: Any) -> str:
  """What is compared when a run goes on; a transformation has no values."""
  if isinstance(optimizer, FactorOptimizer):
    return repr(optimizer)
  return type(optimizer).__name__


def built(
  optimizer: FactorOptimizer | optax.GradientTransformation,
  parts: Parts,
  steps: int,
) -> tuple[optax.GradientTransformation, optax.Schedule | None]:
  """The transformation, and its schedule where it is known."""
  if isinstance(optimizer, FactorOptimizer):
    return optimizer.build(parts, steps), optimizer.schedule(steps)
  if not isinstance(optimizer, optax.GradientTransformation):
    raise TypeError(
      f'optimizer is a {type(optimizer).__name__}; it must be a '
      'FactorOptimizer or a transformation of optax, such as optax.adam(1e-3).'
    )
  return optimizer, None
