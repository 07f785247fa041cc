"""EfficientNet and MobileNet of timm and of two packages, and ours.

Random weights, odd sizes of images, float32. Prints each difference (`-s`).
"""

import pytest

torch = pytest.importorskip('torch')

import originals  # noqa: E402 (torchvision is imported as it can be)

pytest.importorskip('timm')

import test_vision  # noqa: E402
from test_vision import images_of  # noqa: E402
from test_vision import torch_of  # noqa: E402
from test_vision import whole  # noqa: E402
import timm  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')

# One for each block, head, padding, activation and gate.
TIMM = [
  ('test_efficientnet', {}),
  ('test_efficientnet', {'num_classes': 0}),
  ('efficientnet_b0', {}),
  ('efficientnet_blur_b0', {}),
  ('efficientnet_el', {}),
  ('efficientnet_es', {}),
  ('lcnet_035', {}),
  ('mobilenetv1_100', {}),
  ('mobilenetv3_large_150d', {}),
  ('mobilenetv3_rw', {}),
  ('tf_efficientnet_lite0', {}),
  ('tf_efficientnetv2_b0', {}),
  ('tf_mobilenetv3_small_100', {}),
]


def check(name, model, path, **options):
  images = images_of(side=65)[:, :, :48]
  batch = (torch_of(images),)
  test_vision.check(name, model, path, whole, batch, images, **options)


@pytest.mark.parametrize(('name', 'options'), TIMM, ids=str)
def test_the_name_says_what_the_shapes_do_not(name, options, tmp_path):
  model = timm.create_model(name, **{'num_classes': 5, **options})
  model = originals.randomise(model)
  path = tmp_path / 'w.pth'
  torch.save({'arch': name, 'state_dict': model.state_dict()}, path)
  check(f'timm {name} {options}', model, path)


@pytest.mark.parametrize(
  ('name', 'kind', 'activation'),
  [
    ('efficientnet_pytorch', 'efficientnet-b0', 'silu'),
    ('efficientnet_lite_pytorch', 'efficientnet-lite0', 'relu6'),
  ],
)
def test_packages_of_flat_files(name, kind, activation, tmp_path):
  package = pytest.importorskip(name)
  # Without a size of images, its padding is made for those that come.
  sizes = {'image_size': None, 'num_classes': 5}
  model = package.EfficientNet.from_name(kind, **sizes)
  model = originals.randomise(model)
  torch.save(model.state_dict(), tmp_path / 'w.pth')
  check(kind, model, tmp_path / 'w.pth', activation=activation)
