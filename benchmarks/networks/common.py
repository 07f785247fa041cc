"""What a network gives, and the checks that it is the published network."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Network:
  """A trained network with the data that measure and judge it.

  Attributes:
    name: short name, of files too.
    fn: `fn(params, batch) -> logits`, (B, K) or (B, T, K); reads `batch['x']`.
    params: its parameters.
    select: rules for the kernels to shrink: no head, no embedding.
    folds: pairs (calibration, judged) of batches with `x` and `y`, labels (B,)
      or (B, T), -1 where there is none. Rows of several folds are pooled.
    protocol: one sentence on these data.
    batch_size: of calibration and of evaluation.
  """

  name: str
  fn: Callable[[Any, Batch], jax.Array]
  params: Any
  select: list[tuple[str, bool]]
  folds: list[tuple[Batch, Batch]]
  protocol: str
  batch_size: int

  def batches(self, batch: Batch) -> list[Batch]:
    """The inputs, `batch_size` at a time."""
    x, size = batch['x'], self.batch_size
    return [{'x': x[i : i + size]} for i in range(0, len(x), size)]


def halves_both_ways(
  data: Batch, rows: np.ndarray
) -> list[tuple[Batch, Batch]]:
  """Two folds: every other row calibrates and the rest judges, and reversed.

  Args:
    data: what the rows are of.
    rows: (n,) int, those to use, in their order.
  """
  even, odd = ({k: v[rows[i::2]] for k, v in data.items()} for i in (0, 1))
  return [(even, odd), (odd, even)]


def read(root: str, *parts: str) -> dict[str, np.ndarray]:
  """All arrays of an .npz below `root`."""
  with np.load(os.path.join(root, *parts), allow_pickle=False) as file:
    return {k: file[k] for k in file.files}


def scores(
  fn: Callable[[Any, Batch], jax.Array],
  params: Any,
  batch: Batch,
  batch_size: int = 64,
) -> np.ndarray:
  """Log-probabilities of all examples, at one compiled shape."""
  run = fn if hasattr(fn, 'lower') else jax.jit(fn)
  count, out = len(batch['x']), []
  for start in range(0, count, batch_size):
    rows = np.arange(start, start + batch_size) % count
    logits = run(params, {k: v[rows] for k, v in batch.items()})
    out.append(np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32))))
  return np.concatenate(out)[:count]


def check_golden(
  fn: Callable[[Any, Batch], jax.Array],
  params: Any,
  x: np.ndarray,
  logits: np.ndarray,
  tolerance: float,
) -> None:
  """Raises unless our logits are those of the original network."""
  got = np.asarray(jax.jit(fn)(params, {'x': x})).reshape(logits.shape)
  worst = float(np.abs(got - logits).max())
  if not worst <= tolerance:
    raise AssertionError(f'logits differ from the original by {worst}')
  print(f'  logits agree with the original to {worst:.1e}')


def check_close(what: str, got: float, published: float, within: float) -> None:
  """Raises unless a recomputed number is the published one."""
  if not abs(got - published) <= within:
    raise AssertionError(f'{what}: got {got}, published {published}')
  print(f'  {what}: {got:.4f} (published {published})')


def accuracy(log_p: np.ndarray, y: np.ndarray) -> float:
  return float(np.mean(log_p.argmax(-1) == y))


def train(
  loss: Callable[[Any, jax.Array], jax.Array],
  params: Any,
  optimizer: optax.GradientTransformation,
  keys: jax.Array,
) -> Any:
  """Minimises `loss(params, key)`, a step for each key; one compiled loop."""

  def step(state, key):
    params, moments = state
    gradient = jax.grad(loss)(params, key)
    updates, moments = optimizer.update(gradient, moments, params)
    return (optax.apply_updates(params, updates), moments), None

  @functools.partial(jax.jit, donate_argnums=0)
  def run(state, keys):
    return jax.lax.scan(step, state, keys)[0]

  return run((params, optimizer.init(params)), keys)[0]
