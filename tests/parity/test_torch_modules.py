"""Modules of PyTorch, measured and compressed by what they compute.

Needs the extra `torch`.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import utilized_rank as ur

pytest.importorskip('torch.nn')

import torch  # noqa: E402
from torch import nn  # noqa: E402

from utilized_rank.torch import torchax_import  # noqa: E402
from utilized_rank.torch.module import from_module  # noqa: E402
from utilized_rank.torch.module import to_module  # noqa: E402


class Block(nn.Module):
  """Self-attention by packed projections, an MLP, a tied output."""

  def __init__(self):
    super().__init__()
    self.embed = nn.Embedding(11, 12)
    self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
    self.norm = nn.LayerNorm(12)
    self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12, bias=False)
    self.head = nn.Linear(12, 11, bias=False)
    self.head.weight = self.embed.weight

  def forward(self, ids, mask=None):
    x = self.embed(ids)
    x = x + self.attention(x, x, x, need_weights=False)[0]
    x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
    return {'logits': self.head(x), 'nothing': None, 'states': (x, None)}


def convolutions():
  return nn.Sequential(
    nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
    nn.BatchNorm2d(8),
    nn.ReLU(),
    nn.Conv2d(8, 12, 3, groups=2, padding='same', dilation=2),
    nn.GELU(),
    nn.ConvTranspose2d(12, 6, 2, stride=2),
    nn.Flatten(),
    nn.Linear(6 * 64, 10),
  ).eval()


@pytest.fixture(autouse=True)
def seed():
  torch.manual_seed(0)


def images(n=16):
  return np.random.default_rng(0).normal(size=(n, 3, 8, 8)).astype(np.float32)


def output(module, *args):
  with torch.no_grad():
    return module(*map(torch.from_numpy, args))


def near(got, want):
  # float32 sums in another order: 1e-5 of the largest.
  got, want = np.asarray(got), np.asarray(want)
  np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_computes_what_the_module_computes():
  module, x = convolutions(), images()
  fn, params = from_module(module)
  near(jax.jit(fn)(params, x), output(module, x))
  assert set(params) == {
    k for k, v in module.state_dict().items() if v.is_floating_point()
  }


def test_moments_are_those_of_the_inputs_that_hooks_see():
  module, x = convolutions(), images()
  seen = []
  module[7].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
  fn, params = from_module(module)
  moments = ur.collect(fn, params, [x], progress=False)
  seen.clear()
  output(module, x)
  (rows,) = (v.numpy().astype(np.float64) for v in seen)
  near(moments['7.weight'].second, rows.T @ rows / len(rows))


@pytest.mark.parametrize('compensate_mean', [True, False])
def test_what_comes_back_computes_what_the_factors_compute(compensate_mean):
  module, x = convolutions(), images()
  fn, params = from_module(module)
  select = [('[037].weight', True)]
  small, _ = ur.compress(
    fn,
    params,
    [x],
    params_fraction=0.6,
    gauge=None,
    select=select,
    compensate_mean=compensate_mean,
    progress=False,
  )
  new = to_module(module, small)
  near(output(new, x), ur.low_rank(fn)(small, x))
  factored = [k for k, v in small.items() if isinstance(v, ur.LowRank)]
  assert factored
  for name in factored:
    stem = name.removesuffix('.weight')
    assert {f'{stem}.0.weight', f'{stem}.1.weight'} < set(new.state_dict())
  count = sum(p.numel() for p in new.parameters())
  buffers = sum(v.numel() for v in new.buffers() if v.is_floating_point())
  assert count + buffers == ur.count_params(small)
  assert not any('.0.weight' in k for k in module.state_dict())


def test_full_ranks_of_every_kind_of_layer():
  module, x = convolutions(), images()
  fn, params = from_module(module)
  moments = ur.collect(fn, params, [x], progress=False)
  ranks = {p: moments[p].layout.full_rank for p in moments}
  small = ur.factorize(
    params, moments, ranks, compensate_mean=False, progress=False
  )
  with pytest.warns(UserWarning, match=r'multiplied out again.*: 5.weight'):
    new = to_module(module, small)
  near(output(new, x), output(module, x))
  near(new[3].weight.detach(), module[3].weight.detach())
  assert new[7].in_features == 384 and new[0].out_channels == 8


def test_packed_and_tied_weights_are_products_again():
  module = Block().eval()
  ids = np.random.default_rng(0).integers(0, 11, (16, 5))
  fn, params = from_module(module, output='logits')
  near(fn(params, ids), output(module, ids)['logits'])
  moments = ur.collect(fn, params, [{'ids': ids}], progress=False)
  assert 'embed.weight' in params and 'head.weight' not in params
  ranks = {p: 6 for p in moments if p != 'embed.weight'}
  small = ur.factorize(
    params, moments, ranks, compensate_mean=False, progress=False
  )
  with pytest.warns(UserWarning, match='attention.in_proj_weight'):
    new = to_module(module, small)
  near(output(new, ids)['logits'], ur.low_rank(fn)(small, ids))
  assert new.head.weight is new.embed.weight


def test_outputs_are_containers_that_jax_knows():
  module = Block().eval()
  ids = np.zeros((2, 5), np.int32)
  fn, params = from_module(module)
  found = jax.eval_shape(fn, params, (ids,))
  assert set(found) == {'logits', 'states'} and len(found['states']) == 1
  fn, _ = from_module(module, output=lambda out: out['states'][0])
  assert fn(params, ids).shape == (2, 5, 12)
  fn, _ = from_module(module, output='scores')
  with pytest.raises(KeyError, match='none of the outputs'):
    fn(params, ids)


def test_half_precision_comes_back():
  module = nn.Sequential(nn.Linear(8, 8)).eval().to(torch.bfloat16)
  x = jnp.asarray(images(4)[:, 0, 0], jnp.bfloat16)
  fn, params = from_module(module)
  assert params['0.weight'].dtype == jnp.bfloat16
  moments = ur.collect(fn, params, [x], progress=False)
  small = ur.factorize(params, moments, {'0.weight': 3}, progress=False)
  new = to_module(module, small)
  assert new[0][0].weight.dtype == torch.bfloat16 == new[0].weight.dtype
  want = np.asarray(small['0.weight'].dense(), np.float32)
  # The product of bfloat16 factors is rounded in another order.
  np.testing.assert_allclose(
    new[0].weight.detach().float().numpy(), want, atol=2**-7
  )


def test_refuses_what_is_no_fixed_function():
  with pytest.raises(ValueError, match=r'call module.eval\(\) first'):
    from_module(nn.Linear(2, 2))
  with pytest.raises(TypeError, match=r'torch.nn.Module, got int'):
    from_module(3)
  module = nn.Linear(2, 2).eval()
  _, params = from_module(module)
  with pytest.raises(KeyError, match=r"lacks \['bias'\]"):
    to_module(module, {'weight': params['weight']})


def test_refuses_what_a_module_cannot_hold(monkeypatch):
  class Silent(nn.Module):
    def forward(self, x):
      return {'shape': None}

  fn, params = from_module(Silent().eval())
  with pytest.raises(ValueError, match='the module returned no array'):
    fn(params, jnp.ones((1, 4)))
  module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
  _, params = from_module(module)
  with pytest.raises(TypeError, match="'0.weight' is a dict: of the leaves in"):
    to_module(module, {**params, '0.weight': {}})
  packed = nn.MultiheadAttention(4, 2, bias=False, batch_first=True).eval()
  _, params = from_module(packed)
  layout = ur.Layout.of((12, 4), inputs=(1,), outputs=(0,))
  pair = ur.LowRank(jnp.ones((4, 1)), jnp.ones((1, 12)), jnp.ones(12), layout)
  with pytest.raises(ValueError, match='compress with compensate_mean=False'):
    to_module(packed, {**params, 'in_proj_weight': pair})
  monkeypatch.setitem(sys.modules, 'torchax', None)
  with pytest.raises(ImportError, match='by torchax, which does not load'):
    torchax_import.load.__wrapped__()
