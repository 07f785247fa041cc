"""ConvNeXt and Swin of transformers and timm, and ours.

Random weights at small sizes, float32. Prints each difference (`-s`).
"""

import pytest

torch = pytest.importorskip('torch')

import originals  # noqa: E402 (torchvision is imported as it can be)

pytest.importorskip('timm')
pytest.importorskip('transformers')

import jax  # noqa: E402
import numpy as np  # noqa: E402
from test_vision import check  # noqa: E402
from test_vision import images_of  # noqa: E402
from test_vision import logits  # noqa: E402
from test_vision import original  # noqa: E402
from test_vision import pooled  # noqa: E402
from test_vision import torch_of  # noqa: E402
from test_vision import whole  # noqa: E402
import timm  # noqa: E402

from utilized_rank.models.importing import load_checkpoint  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')

STAGES = {**originals.STAGES, 'image_size': 32}
WINDOWS = originals.WINDOWS
CASES = [
  ('ConvNext', 'Model', pooled, STAGES),
  ('ConvNext', 'ForImageClassification', logits, STAGES),
  (
    'ConvNext',
    'ForImageClassification',
    logits,
    {**STAGES, 'layer_scale_init_value': 0.0, 'hidden_act': 'gelu_new'},
  ),
  ('ConvNextV2', 'Model', pooled, STAGES),
  ('ConvNextV2', 'ForImageClassification', logits, STAGES),
  # 8 patches of windows of 4, then 4 patches that one window covers.
  ('Swin', 'Model', pooled, WINDOWS),
  ('Swin', 'ForImageClassification', logits, WINDOWS),
  # Shifted at both resolutions, by one of three patches.
  (
    'Swin',
    'ForImageClassification',
    logits,
    {**WINDOWS, 'window_size': 3, 'image_size': 48, 'qkv_bias': False},
  ),
  ('Swinv2', 'Model', pooled, WINDOWS),
  (
    'Swinv2',
    'ForImageClassification',
    logits,
    {**WINDOWS, 'pretrained_window_sizes': [3, 2], 'hidden_act': 'gelu_new'},
  ),
  (
    'Swinv2',
    'ForImageClassification',
    logits,
    {**WINDOWS, 'window_size': 3, 'image_size': 48, 'qkv_bias': False},
  ),
]


@pytest.mark.parametrize(('name', 'kind', 'read', 'sizes'), CASES, ids=str)
def test_the_saved_directory_gives_the_same(name, kind, read, sizes, tmp_path):
  model = original(name, kind, sizes, tmp_path)
  images = images_of(side=sizes['image_size'])
  batch = torch_of(images)
  check(f'{name}{kind} {sizes}', model, tmp_path, read, (batch,), images)
  path = tmp_path / 'in_memory.pth'
  torch.save(model.state_dict(), path)
  check(f'{name}{kind} in memory', model, path, read, (batch,), images)


# One for each stem, norm, head, width of kernels and activation.
TIMM = [
  ('convnext_atto', {}),
  ('convnext_atto_ols', {}),
  ('convnext_atto_rms', {}),
  ('convnext_nano_ols', {'depths': (1, 1, 1, 1)}),
  ('convnext_tiny', {'depths': (1, 1, 1, 1)}),
  ('convnext_tiny', {'depths': (1, 1, 1, 1), 'num_classes': 0}),
  ('convnext_tiny_hnf', {'depths': (1, 1, 1, 1)}),
  ('convnext_large_mlp', {'depths': (1, 1, 1, 1)}),
  ('convnext_xxlarge', {'depths': (1, 1, 1, 1), 'dims': (16, 32, 64, 96)}),
  ('convnextv2_atto', {}),
  ('convnextv2_tiny', {'depths': (1, 1, 1, 1)}),
  ('test_convnext', {}),
  ('test_convnext3', {}),
  ('swin_tiny_patch4_window7_224', {'depths': (2, 2, 2, 2)}),
  (
    'swin_tiny_patch4_window7_224',
    {'depths': (2, 2), 'num_heads': (3, 6), 'num_classes': 0},
  ),
  # Windows of 12 become one of 6 where there are but 6 patches.
  (
    'swin_tiny_patch4_window7_224',
    {'depths': (1, 1, 1, 2), 'img_size': 192, 'window_size': 12},
  ),
  ('swin_s3_tiny_224', {'depths': (2, 2, 2, 2)}),
  # Shifted at two resolutions; at the last one windows cover the image.
  ('swinv2_tiny_window8_256', {'depths': (1, 2, 2, 1)}),
  (
    'swinv2_base_window12to16_192to256',
    {'depths': (1, 1, 2, 1), 'embed_dim': 32, 'num_heads': (1, 2, 4, 8)},
  ),
]


@pytest.mark.parametrize(('name', 'options'), TIMM, ids=str)
def test_the_name_says_what_the_shapes_do_not(name, options, tmp_path):
  side = 256 if 'swinv2' in name else 64 if 'convnext' in name else 224
  side = options.get('img_size', side)
  model = timm.create_model(name, **{'num_classes': 5, **options})
  model = originals.randomise(model)
  path = tmp_path / 'w.pth'
  torch.save({'arch': name, 'state_dict': model.state_dict()}, path)
  images = images_of(side=side)
  label, batch = f'timm {name} {options}', (torch_of(images),)
  ours, imported = check(label, model, path, whole, batch, images)
  if 'swin' in name and len(ours.depths) == 4:
    assert imported.input.shape[1:] == images.shape[1:]


@pytest.mark.parametrize(('stages', 'side'), [(2, 16), (3, 64)])
def test_images_of_another_size_are_shifted_where_the_config_says(
  stages, side, tmp_path
):
  """Made for 8, 4 and 2 patches, of which windows of 2 cover the last."""
  sizes = {'image_size': 32, 'window_size': 2, 'embed_dim': 16}
  sizes |= {'depths': [2] * stages, 'num_heads': [2, 4, 8][:stages]}
  model = original('Swinv2', 'Model', sizes, tmp_path)
  images = images_of(side=side)
  batch = (torch_of(images),)
  label = f'Swin V2 given {side} pixels'
  check(label, model, tmp_path, pooled, batch, images)


def test_merging_at_the_end_of_a_stage_is_that_at_the_beginning(tmp_path):
  """As Microsoft's files have it, and timm's before 0.9."""
  model = originals.randomise(
    timm.create_model(
      'swin_tiny_patch4_window7_224',
      depths=(1, 1),
      num_heads=(3, 6),
      num_classes=5,
    )
  )
  state = model.state_dict()
  old = {
    name.replace('layers.1.down', 'layers.0.down').replace('.fc.', '.')
    if 'downsample' in name or 'head' in name
    else name: value
    for name, value in state.items()
  }
  trees = []
  for content in (state, old):
    torch.save(content, tmp_path / 'w.pth')
    trees.append(
      load_checkpoint(
        str(tmp_path / 'w.pth'), architecture='swin_tiny_patch4_window7_224'
      )[1]
    )
  jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.parametrize('kind', ['timm', 'transformers'])
def test_the_scores_that_a_trained_swin_v2_may_have(kind, tmp_path):
  """Scales above their clamp, where what is masked is not out of sight."""
  images = images_of(side=32)
  batch = (torch_of(images),)
  path, read, options = tmp_path, logits, {}
  if kind == 'timm':
    model = originals.randomise(
      timm.create_model(
        'swinv2_tiny_window8_256',
        img_size=32,
        window_size=4,
        depths=(2, 1),
        num_heads=(3, 6),
        num_classes=5,
      )
    )
    path, read = tmp_path / 'w.pth', whole
    options = {'windows': (4, 4), 'trained_windows': None}
    options['architecture'] = 'swinv2_tiny_window8_256'
  else:
    model = original('Swinv2', 'ForImageClassification', WINDOWS, tmp_path)
  with torch.no_grad():
    for name, value in model.named_parameters():
      if name.endswith('logit_scale'):
        value += 5.0
      # Biases on both sides, as they are without positions.
      if name.endswith(('q_bias', 'query.bias')):
        value *= 50.0
  if kind == 'timm':
    torch.save(model.state_dict(), path)
  else:
    model.save_pretrained(tmp_path)
  check(f'{kind} Swin V2 clamped', model, path, read, batch, images, **options)
