"""Graphs and their symmetries: jraph (of Haiku) and e3nn-jax (of Linen)."""

from __future__ import annotations

import flax.linen as nn
import haiku as hk
import jax
import numpy as np

from frameworks.case import Case
from frameworks.case import filled
from frameworks.case import normal
from frameworks.case import rows
from frameworks.haiku_models import recorder


def jraph_network() -> Case:
  """A block of a graph network over graphs of equal size.

  Graphs that are one graph (`jraph.batch`) have no leading axis in common, as
  a batch must; one axis of graphs, and `vmap`, is a batch.
  """
  import jraph

  def network(graph):
    update = lambda name: jraph.concatenated_args(
      lambda x: hk.nets.MLP([8, 6], name=name)(x)
    )
    return jraph.GraphNetwork(*map(update, ('edge', 'node', 'whole')))(graph)

  several, n = 20, 5
  graphs = jraph.GraphsTuple(
    nodes=normal(several, n, 4), edges=normal(several, n + 3, 2),
    globals=normal(several, 1, 3),
    senders=np.tile(np.arange(n + 3) % n, (several, 1)),
    receivers=np.tile(np.arange(1, n + 4) % n, (several, 1)),
    n_node=np.full((several, 1), n), n_edge=np.full((several, 1), n + 3),
  )  # fmt: skip
  first = jax.tree.map(lambda x: x[0], graphs)
  model = hk.without_apply_rng(hk.transform(network))
  params = filled(jax.eval_shape(model.init, jax.random.PRNGKey(0), first))
  kernels = {}
  for name, width in ('edge', 13), ('node', 19), ('whole', 15):
    kernels[f'{name}/~/linear_0/w'] = (width, 8)
    kernels[f'{name}/~/linear_1/w'] = (8, 6)

  def inputs():
    found = []
    for graph in zip(*graphs, strict=True):
      seen = {}
      with recorder(seen, lambda module, x: rows(x, x.shape[-1])):
        model.apply(params, jraph.GraphsTuple(*graph))
      found.append(seen)
    return {k: np.concatenate([seen[k] for seen in found]) for k in kernels}

  fn = lambda params, graphs: jax.vmap(lambda g: model.apply(params, g))(graphs)
  return Case(fn, params, graphs, kernels, inputs)


def e3nn_network() -> Case:
  """Linear maps of irreps: one matrix for each, over its components' rows."""
  import e3nn_jax
  import e3nn_jax.flax as e3

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = e3.Linear('5x0e+4x1o', name='mix')(
        e3nn_jax.IrrepsArray('4x0e+2x1o', x)
      )
      x = e3nn_jax.concatenate([x, e3nn_jax.norm(x, squared=True)]).regroup()
      x = e3.Linear('6x0e+3x1o', name='out')(x)
      y = e3.MultiLayerPerceptron((8, 2), act=jax.nn.silu, name='mlp')(
        x.filter('0e')
      )
      return x.array, y.array

  model, x = Net(), normal(32, 10)
  params = filled(jax.eval_shape(model.init, jax.random.key(0), x))
  kernels = {
    'params/mix/w[0,0] 4x0e,5x0e': (4, 5),
    'params/mix/w[1,1] 2x1o,4x1o': (2, 4),
    'params/out/w[0,0] 14x0e,6x0e': (14, 6),
    'params/out/w[1,1] 4x1o,3x1o': (4, 3),
    'params/mlp/Dense_0/kernel': (6, 8),
    'params/mlp/Dense_1/kernel': (8, 2),
  }

  def inputs():
    seen = {}

    def recording(call, args, kwargs, context):
      name = '/'.join(('params', *context.module.path))
      if context.method_name == '__call__':
        if isinstance(context.module, e3.Linear):
          for i, chunk in enumerate(args[0].regroup().chunks):
            (path,) = (k for k in kernels if k.startswith(f'{name}/w[{i},{i}'))
            features = np.swapaxes(chunk, 1, 2)  # (B, components, multiplicity)
            seen[path] = rows(features, features.shape[-1])
        elif f'{name}/kernel' in kernels:
          seen[f'{name}/kernel'] = rows(args[0], args[0].shape[-1])
      return call(*args, **kwargs)

    with nn.intercept_methods(recording):
      model.apply(params, x)
    return seen

  return Case(model.apply, params, x, kernels, inputs)
