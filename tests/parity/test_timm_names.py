"""What timm's names say gives timm's logits, one name for each kind of model.

Each has one block and small images: names say how a block is made. The table
`timm_names.txt` has more names of the same kinds.
"""

import pytest

torch = pytest.importorskip('torch')

import originals  # noqa: E402 (torchvision is imported as it can be)

pytest.importorskip('timm')

import jax  # noqa: E402
import numpy as np  # noqa: E402
import timm  # noqa: E402

from utilized_rank.models.importing import load_checkpoint  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')

BAR = 1e-4
NAMES = {
  'test_vit': 32,
  'test_vit3': 32,
  'deit_tiny_distilled_patch16_224': 32,
  'deit3_small_patch16_224': 32,
  'vit_wee_patch16_reg1_gap_256': 32,
  'vit_medium_patch16_gap_240': 32,
  'vit_xsmall_patch16_clip_224': 32,
  'vit_base_patch16_clip_quickgelu_224': 32,
  'vit_base_patch16_rpn_224': 32,
  'vit_base_patch16_siglip_224': 32,
  'vit_base_patch32_siglip_256': 64,
  'vit_base_patch32_siglip_gap_256': 64,
  'vit_so150m_patch16_reg4_map_256': 48,
  'vit_giant_patch14_dinov2': 28,
  'eva02_tiny_patch14_224': 28,
  'eva02_base_patch16_clip_224': 32,
  'vit_small_patch16_dinov3': 48,
  'vit_small_plus_patch16_dinov3': 48,
  'vit_tiny_patch16_dinov3_qkvb': 48,
  'vit_small_patch16_lingbot': 48,
  'vit_medium_patch16_rope_reg1_gap_256': 48,
  'beit_base_patch16_224': 48,
  'beit3_base_patch16_224': 32,
  'aimv2_large_patch14_224': 28,
  'vit_giant_patch16_radio_v3': 32,
  'resnet18': 64,
  'resnetaa50': 64,
  'resnetblur18': 64,
}


def found(name, side, path):
  options = {'num_classes': 5}
  if 'resnet' not in name:
    options |= {'depth': 1, 'img_size': side}
  model = originals.randomise(timm.create_model(name, **options))
  torch.save({'arch': name, 'state_dict': model.state_dict()}, path)
  ours, variables, imported = load_checkpoint(str(path))
  assert imported.assumed == {}
  images = np.random.default_rng(0).normal(size=(2, 3, side, side))
  images = images.astype(np.float32)
  with torch.no_grad():
    expected = model(torch.from_numpy(images)).numpy()
  actual = jax.jit(ours.apply)(variables, images.transpose(0, 2, 3, 1))
  assert np.std(expected) > 1e-2
  return float(abs(actual - expected).max() / abs(expected).max())


@pytest.mark.parametrize('name', NAMES)
def test_the_name_says_what_the_shapes_do_not(name, tmp_path):
  difference = found(name, NAMES[name], tmp_path / 'w.pth')
  print(f'timm {name}: {difference:.1e}')
  assert difference < BAR
