"""What is made of NNX modules by others: qwix, canvit-nnx."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from frameworks.case import Case
from frameworks.case import filled
from frameworks.case import normal


class MLP(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(8, 12, rngs=rngs)
    self.down = nnx.Linear(12, 5, rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.relu(self.up(x)))


def qwix_lora() -> Case:
  """Adapters beside the kernels: a kernel and its adapter read one input."""
  import qwix

  x = normal(32, 8)
  model = filled(
    qwix.apply_lora_to_model(
      MLP(nnx.Rngs(0)),
      qwix.LoraProvider(module_path='.*', rank=3, alpha=2.0),
      x,
      rngs=nnx.Rngs(1),
    )
  )
  kernels = {}
  for name, d, m in ('up', 8, 12), ('down', 12, 5):
    kernels[f'{name}/kernel/value'] = (d, m)
    kernels[f'{name}/kernel_lora_a/value'] = (d, 3)
    kernels[f'{name}/kernel_lora_b/value'] = (3, m)

  def inputs():
    seen, y = {}, np.asarray(x, np.float64)
    for name in ('up', 'down'):
      layer = getattr(model, name)
      w, a, b, bias = (
        np.asarray(getattr(layer, key)[...], np.float64)
        for key in ('kernel', 'kernel_lora_a', 'kernel_lora_b', 'bias')
      )
      seen[f'{name}/kernel/value'] = seen[f'{name}/kernel_lora_a/value'] = y
      seen[f'{name}/kernel_lora_b/value'] = y @ a
      y = np.maximum(y @ w + y @ a @ b * (2.0 / 3) + bias, 0)
    return seen

  return Case(lambda model, x: model(x), model, x, kernels, inputs)


def canvit() -> tuple:
  """A classifier of glimpses as shapes; its published sizes are fixed."""
  from canvit_nnx import model as canvit
  from canvit_nnx.viewpoint import Viewpoint

  config = canvit.CanViTConfig('vits16', canvas_num_heads=2, canvas_head_dim=8)
  model = nnx.eval_shape(
    lambda: canvit.CanViTForImageClassification(
      canvit_config=config, n_classes=5, rngs=nnx.Rngs(0)
    )
  )

  def fn(model, glimpse):
    state = model.init_state(batch_size=len(glimpse), canvas_grid_size=4)
    logits, _ = model(
      glimpse=glimpse,
      state=state,
      viewpoint=Viewpoint.full_scene(batch_size=len(glimpse)),
    )
    return logits

  return fn, model, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
