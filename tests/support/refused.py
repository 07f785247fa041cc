"""What looks like a kernel and is none, and the reason that is given."""

from jax import lax
import jax.numpy as jnp
import numpy as np

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 4)).astype(np.float32) + 0.5
W = RNG.normal(size=(4, 4)).astype(np.float32)
B = np.zeros(4, np.float32)


def depthwise(p, x):
  return lax.conv_general_dilated(
    x[None],
    p['w'],
    (1,),
    'SAME',
    feature_group_count=4,
    dimension_numbers=('NWC', 'WIO', 'NWC'),
  )


REFUSED = {
  'mul': (
    lambda p, x: x @ (p['w'] * jnp.arange(4.0)),
    {'w': W},
    'used by a multiplication with more than one number',
  ),
  'concatenate': (
    lambda p, x: x @ jnp.concatenate([p['w'], p['w']], 1),
    {'w': W},
    'used by concatenate',
  ),
  'gather': (lambda p, x: p['w'][jnp.arange(3)], {'w': W}, 'used by a lookup'),
  'two_parameters': (
    lambda p, x: x @ (p['w'] @ p['v']),
    {'w': W, 'v': W.copy()},
    'dot_general with v',
  ),
  'two_ways': (
    lambda p, x: jnp.tanh(x @ p['w']) @ p['w'].T,
    {'w': W},
    'contracted in different ways',
  ),
  'uneven_slices': (
    lambda p, x: x @ p['w'][:, :1] + (x @ p['w'][:, 1:]).sum(1, keepdims=True),
    {'w': W},
    'a slice that is not one of equal parts',
  ),
  'uneven_and_even': (
    lambda p, x: (x @ p['w'][:, :2]).sum() + (x[:, :1] @ p['w'][:1, 1:]).sum(),
    {'w': W},
    'a slice that is not one of equal parts',
  ),
  'depthwise': (
    depthwise,
    {'w': RNG.normal(size=(3, 1, 4))},
    'depthwise convolution',
  ),
  'image': (
    lambda p, x: lax.conv_general_dilated(
      p['w'][None],
      x[:3, :, None],
      (1,),
      'SAME',
      dimension_numbers=('NWC', 'WIO', 'NWC'),
    ),
    {'w': W},
    'the image of a convolution',
  ),
  'batch_groups': (
    lambda p, x: lax.conv_general_dilated(
      x[..., None],
      p['w'],
      (1,),
      'SAME',
      batch_group_count=2,
      dimension_numbers=('NWC', 'WIO', 'NWC'),
    ),
    {'w': RNG.normal(size=(3, 1, 4))},
    'batch groups',
  ),
  'broadcast': (
    lambda p, x: x @ jnp.broadcast_to(p['w'][:1], (4, 4)),
    {'w': W},
    'broadcast, then contracted',
  ),
  'unused': (lambda p, x: x, {'w': W}, 'not used by the outputs'),
  'bias': (lambda p, x: x @ p['v'] + p['w'], {'w': B, 'v': W}, 'bias of v'),
}
