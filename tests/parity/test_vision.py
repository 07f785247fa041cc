"""Vision transformers of transformers, saved by themselves, and ours.

Random weights at small sizes, float32; each directory is what
`save_pretrained` writes, and the config in it is all that is said. Where names
changed with version 5, the names in memory are read, too. Prints each
difference (`-s`).
"""

import pytest

torch = pytest.importorskip('torch')

import originals  # noqa: E402 (torchvision is imported as it can be)

transformers = pytest.importorskip('transformers')

import jax  # noqa: E402
import numpy as np  # noqa: E402

from utilized_rank.models.importing import load_checkpoint  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')

BAR = 1e-4
SMALL = originals.PATCHES
FLAT = originals.FLAT


def whole(found):
  return found


def logits(found):
  return found.logits


def pooled(found):
  return found.pooler_output


def token(found):
  return found.last_hidden_state[:, 0]


def mean(found):
  return found.last_hidden_state.mean(1)


def tokens(found):
  return found.last_hidden_state


def embeds(found):
  return found.image_embeds


BIASED = {'use_relative_position_bias': True}
GATED = {'use_gated_mlp': True, 'hidden_act': 'silu', 'num_register_tokens': 4}
CASES = [
  ('ViT', 'Model', token, {}),
  ('ViT', 'ForImageClassification', logits, {'hidden_act': 'gelu_new'}),
  ('ViT', 'ForImageClassification', logits, {'num_attention_heads': 8}),
  ('DeiT', 'Model', token, {}),
  ('DeiT', 'ForImageClassification', logits, {}),
  ('DeiT', 'ForImageClassificationWithTeacher', logits, {}),
  ('IJepa', 'Model', mean, {}),
  ('IJepa', 'ForImageClassification', logits, {}),
  ('ViTMSN', 'Model', token, {}),
  ('ViTMSN', 'ForImageClassification', logits, {}),
  ('Beit', 'Model', pooled, BIASED),
  ('Beit', 'Model', pooled, {**BIASED, 'use_mean_pooling': False}),
  ('Beit', 'ForImageClassification', logits, BIASED),
  (
    'Beit',
    'ForImageClassification',
    logits,
    {'use_absolute_position_embeddings': True, 'layer_scale_init_value': 0.0},
  ),
  ('Dinov2', 'ForImageClassification', logits, {}),
  ('Dinov2WithRegisters', 'ForImageClassification', logits, {}),
  ('DINOv3ViT', 'Model', pooled, GATED),
  ('DINOv3ViT', 'Model', pooled, {'num_register_tokens': 2}),
  ('DINOv3ViT', 'Model', pooled, {'key_bias': True}),
  ('CLIPVision', 'Model', pooled, {}),
  ('CLIPVision', 'ModelWithProjection', embeds, {}),
  ('SiglipVision', 'Model', pooled, {}),
  ('SiglipVision', 'Model', tokens, {'vision_use_head': False}),
  ('Aimv2Vision', 'Model', tokens, {'use_head': False}),
]


def check(name, model, path, read, arguments, images, **options):
  ours, variables, imported = load_checkpoint(path, **options)
  assert imported.assumed == {}
  with torch.no_grad():
    expected = read(model(*arguments)).numpy()
  actual = np.asarray(jax.jit(ours.apply)(variables, images))
  assert actual.shape == expected.shape
  assert np.std(expected) > 1e-2
  found = abs(actual - expected).max() / abs(expected).max()
  print(f'{name}: {found:.1e}')
  assert found < BAR
  return ours, imported


def images_of(count=2, side=32):
  images = np.random.default_rng(0).normal(size=(count, side, side, 3))
  return images.astype(np.float32)


def torch_of(images):
  """A batch as PyTorch has it."""
  return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def original(name, kind, sizes, path):
  config = getattr(transformers, f'{name}Config')(**sizes)
  model = originals.randomise(getattr(transformers, name + kind)(config))
  model.save_pretrained(path)
  return model


@pytest.mark.parametrize(('name', 'kind', 'read', 'more'), CASES, ids=str)
def test_the_saved_directory_gives_the_same(name, kind, read, more, tmp_path):
  model = original(name, kind, {**SMALL, **more}, tmp_path)
  images = images_of()
  batch = torch_of(images)
  check(f'{name}{kind} {more}', model, tmp_path, read, (batch,), images)
  if kind != 'Model':
    path = tmp_path / 'in_memory.pth'
    torch.save(model.state_dict(), path)
    check(f'{name}{kind} in memory', model, path, read, (batch,), images)


def test_siglip_2_of_flat_patches(tmp_path):
  sizes = {**FLAT, 'num_patches': 4}
  model = original('Siglip2Vision', 'Model', sizes, tmp_path)
  images = images_of()
  patches = images.reshape(2, 2, 16, 2, 16, 3).transpose(0, 1, 3, 2, 4, 5)
  arguments = (
    torch.from_numpy(patches.reshape(2, 4, 768).copy()),
    torch.ones(2, 4, dtype=torch.long),
    torch.tensor([[2, 2], [2, 2]]),
  )
  check('Siglip2VisionModel', model, tmp_path, pooled, arguments, images)


@pytest.mark.parametrize('name', ['CLIP', 'Siglip'])
def test_a_classifier_on_means_is_refused(name, tmp_path):
  """It reads the mean of what the pooled features do not come from."""
  vision = {**SMALL, 'projection_dim': 8} if name == 'CLIP' else SMALL
  text = {'hidden_size': 32, 'num_hidden_layers': 1, 'vocab_size': 50}
  config = getattr(transformers, f'{name}Config')(
    vision_config=vision,
    text_config={**text, 'num_attention_heads': 2, 'intermediate_size': 48},
  )
  kind = getattr(transformers, f'{name}ForImageClassification')
  kind(config).save_pretrained(tmp_path)
  with pytest.raises(ValueError, match='classifier.weight'):
    load_checkpoint(tmp_path)
