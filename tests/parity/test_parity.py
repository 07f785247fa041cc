"""Our models give the logits of the original code, from the same files.

Needs the `parity` extra and torch; `PARITY_FULL=1` takes ViT-B and ViT-L at
their full depth, which needs 5 GiB. Prints each difference (`-s`).
"""

import os

import pytest

torch = pytest.importorskip('torch')

import originals  # noqa: E402 (torchvision is imported as it can be)

pytest.importorskip('timm')
pytest.importorskip('torchvision')
pytest.importorskip('transformers')

import timm  # noqa: E402
import torchvision  # noqa: E402
import transformers  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')

# Issue 6's bar, of the largest logit, in float32.
BAR = 1e-4
FULL = os.environ.get('PARITY_FULL') == '1'


def call(model, x):
  return model(x)


def check(name, found):
  print(f'{name}: {found:.1e}')
  assert found < BAR


TIMM = {
  'vit_tiny_patch16_224': {},
  'vit_small_patch16_224': {},
  'vit_small_patch32_224': {'depth': 2},
  'vit_base_patch16_224': {} if FULL else {'depth': 3},
  'vit_large_patch16_224': {} if FULL else {'depth': 2},
  # H has heads of 80.
  'vit_huge_patch14_224': {'depth': 1},
  'vit_base_patch8_224': {'depth': 1},
  # DINO: no head. MAE fine-tuned: a norm after the mean of the patches.
  'vit_small_patch8_224.dino': {'depth': 2, 'num_classes': 0},
  'vit_base_patch16_224.mae': {
    'depth': 2,
    'global_pool': 'avg',
    'options': {'pool': 'gap'},
  },
  # DINOv2: layer scale, registers without position, gated MLPs.
  'vit_small_patch14_dinov2': {'depth': 2, 'img_size': 224},
  'vit_small_patch14_reg4_dinov2': {'depth': 2, 'img_size': 224},
  'vit_giant_patch14_dinov2': {'depth': 1, 'img_size': 56},
  'vit_base_patch16_clip_224': {'depth': 2},
  'vit_base_patch32_clip_quickgelu_224': {'depth': 2},
  'vit_tiny_patch16_224.qk': {'depth': 2, 'qk_norm': True},
}


@pytest.mark.parametrize('name', TIMM)
@pytest.mark.parametrize('form', ['pth', 'safetensors'])
def test_timm_vit(name, form, tmp_path):
  if form == 'safetensors' and 'tiny' not in name:
    pytest.skip('the formats differ in the reader only')
  keywords = dict(TIMM[name])
  options = keywords.pop('options', {})
  architecture = name.split('.')[0]
  keywords.setdefault('num_classes', 100)
  model = originals.randomise(
    timm.create_model(architecture, pretrained=False, **keywords)
  )
  side = keywords.get('img_size', 224)
  shape = (2, 3, side, side)
  path = tmp_path / 'weights'
  check(
    f'timm {name}',
    originals.difference(
      model, call, shape, path, form=form, architecture=architecture, **options
    ),
  )


@pytest.mark.parametrize('name', ['resnet18', 'resnet34', 'resnet50'])
@pytest.mark.parametrize('library', ['timm', 'torchvision'])
def test_resnet(library, name, tmp_path):
  make = {
    'timm': timm.create_model,
    'torchvision': torchvision.models.get_model,
  }
  model = originals.randomise(make[library](name, num_classes=100))
  found = originals.difference(
    model, call, (2, 3, 224, 224), tmp_path / 'w', architecture=name
  )
  check(f'{library} {name}', found)


@pytest.mark.parametrize('name', ['vgg11', 'vgg16_bn', 'vgg19'])
def test_torchvision_vgg(name, tmp_path):
  model = torchvision.models.get_model(name, num_classes=100)
  # Hidden layers of 4096 only cost time.
  model.classifier = torch.nn.Sequential(
    torch.nn.Linear(512 * 49, 64),
    torch.nn.ReLU(),
    torch.nn.Dropout(),
    torch.nn.Linear(64, 100),
  )
  originals.randomise(model)
  found = originals.difference(model, call, (1, 3, 224, 224), tmp_path / 'w')
  check(f'torchvision {name}', found)


def test_torchvision_vit(tmp_path):
  model = torchvision.models.VisionTransformer(
    image_size=64,
    patch_size=16,
    num_layers=2,
    num_heads=3,
    hidden_dim=192,
    mlp_dim=384,
    num_classes=10,
  )
  originals.randomise(model)
  found = originals.difference(
    model, call, (2, 3, 64, 64), tmp_path / 'w', heads=3
  )
  check('torchvision ViT', found)


SMALL = {
  'hidden_size': 192,
  'num_hidden_layers': 3,
  'num_attention_heads': 3,
  'intermediate_size': 384,
  'image_size': 64,
  'patch_size': 16,
}


def flax_names(state):
  out = {}
  for name, x in state.items():
    norm = 'layernorm' in name
    if name.endswith('weight') and not norm:
      x = x.permute(2, 3, 1, 0) if x.ndim == 4 else x.T
      name = name.removesuffix('weight') + 'kernel'
    elif norm:
      name = name.replace('weight', 'scale')
    out[name.replace('.', '/')] = x.contiguous()
  return out


def test_hugging_face_vit(tmp_path):
  config = transformers.ViTConfig(**SMALL, num_labels=10)
  model = originals.randomise(transformers.ViTForImageClassification(config))
  logits = lambda model, x: model(x).logits
  found = originals.difference(
    model, logits, (2, 3, 64, 64), tmp_path / 'w', assume=True
  )
  check('transformers ViT', found)
  # The names that published files have.
  model.save_pretrained(tmp_path / 'saved')
  from safetensors.torch import load_file

  state = load_file(tmp_path / 'saved' / 'model.safetensors')
  found = originals.difference(
    model, logits, (2, 3, 64, 64), tmp_path / 'w', state=state, assume=True
  )
  check('transformers ViT, as saved', found)
  found = originals.difference(
    model,
    logits,
    (2, 3, 64, 64),
    tmp_path / 'w',
    state=flax_names(state),
    assume=True,
  )
  check('transformers ViT, in the names of its Flax twin', found)


@pytest.mark.parametrize('gated', [False, True])
@pytest.mark.parametrize('registers', [False, True])
def test_hugging_face_dinov2(gated, registers, tmp_path):
  name = 'Dinov2WithRegisters' if registers else 'Dinov2'
  sizes = {k: v for k, v in SMALL.items() if k != 'intermediate_size'}
  config = getattr(transformers, f'{name}Config')(**sizes, use_swiglu_ffn=gated)
  model = originals.randomise(getattr(transformers, f'{name}Model')(config))
  logits = lambda model, x: model(x).pooler_output
  found = originals.difference(
    model, logits, (2, 3, 64, 64), tmp_path / 'w', assume=True
  )
  check(f'transformers {name}, gated={gated}', found)


def open_clip_names(state):
  """The vision tower, and some of the text tower, which is no part of it."""
  names = {
    'vision_model.embeddings.patch_embedding': 'conv1',
    'vision_model.embeddings.class_embedding': 'class_embedding',
    'vision_model.embeddings.position_embedding.weight': 'positional_embedding',
    'vision_model.pre_layrnorm': 'ln_pre',
    'vision_model.post_layernorm': 'ln_post',
    'vision_model.encoder.layers.': 'transformer.resblocks.',
    'self_attn.out_proj': 'attn.out_proj',
    'layer_norm': 'ln_',
    'mlp.fc1': 'mlp.c_fc',
    'mlp.fc2': 'mlp.c_proj',
  }
  state = dict(state)
  out = {'visual.proj': state.pop('visual_projection.weight').T.clone()}
  for name in list(state):
    if 'self_attn.q_proj' in name:
      block, leaf = name.split('self_attn.q_proj.')
      parts = [state.pop(f'{block}self_attn.{x}_proj.{leaf}') for x in 'qkv']
      state[f'{block}attn.in_proj_{leaf}'] = torch.cat(parts)
  for name, x in state.items():
    for theirs, ours in names.items():
      name = name.replace(theirs, ours)
    out[f'visual.{name}'] = x
  for name in ('transformer.resblocks.0.ln_1.weight', 'ln_final.bias'):
    out[name] = torch.ones(3)
  return out | {'logit_scale': torch.ones(()), 'text_projection': torch.ones(2)}


def test_hugging_face_clip(tmp_path):
  config = transformers.CLIPVisionConfig(**SMALL, projection_dim=32)
  model = originals.randomise(
    transformers.CLIPVisionModelWithProjection(config)
  )
  logits = lambda model, x: model(x).image_embeds
  found = originals.difference(
    model, logits, (2, 3, 64, 64), tmp_path / 'w', assume=True
  )
  check('transformers CLIP', found)
  found = originals.difference(
    model,
    logits,
    (2, 3, 64, 64),
    tmp_path / 'w',
    state=open_clip_names(model.state_dict()),
    assume=True,
  )
  check('transformers CLIP, in the names of OpenAI and OpenCLIP', found)


def test_hugging_face_llama(tmp_path):
  config = transformers.LlamaConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    vocab_size=50,
  )
  model = originals.randomise(transformers.LlamaForCausalLM(config))
  logits = lambda model, x: model(x).logits
  found = originals.difference(
    model, logits, (2, 9), tmp_path / 'w', heads=4, assume=True
  )
  check('transformers Llama', found)


def test_wrapped_states(tmp_path):
  """What the code bases of DINO, MAE and MoCo v3 write around the encoder."""
  model = originals.randomise(
    timm.create_model(
      'vit_tiny_patch16_224', num_classes=0, depth=2, img_size=32
    )
  )
  state = model.state_dict()
  head = {'head.mlp.0.weight': torch.ones(3, 3)}

  def under(prefix, entries=state):
    return {f'{prefix}{k}': v for k, v in entries.items()}

  moco_head = {'head.0.weight': torch.ones(3, 3)}
  wrapped = {
    'DINO': {
      'teacher': under('backbone.') | head,
      'student': under('module.backbone.') | under('module.', head),
      'epoch': 3,
      'optimizer': {'state': {0: {'exp_avg': torch.ones(3)}}},
    },
    'MAE': {
      'model': state
      | {'mask_token': torch.ones(1), 'decoder_norm.weight': torch.ones(3)}
    },
    'MoCo v3': {
      'state_dict': under('module.base_encoder.', state | moco_head)
      | under('module.momentum_encoder.', state | moco_head),
    },
  }
  for name, entries in wrapped.items():
    options = {'heads': 3, 'assume': True}
    found = originals.difference(
      model, call, (2, 3, 32, 32), tmp_path / 'w', state=entries, **options
    )
    check(name, found)


@pytest.mark.parametrize('size', [160, 384])
def test_positions_are_resized_as_by_timm(size, tmp_path):
  from timm.layers import resample_abs_pos_embed

  from utilized_rank.models.positions import resize_positions

  del tmp_path
  table = torch.randn(1, 197, 8, generator=torch.Generator().manual_seed(0))
  side = size // 16
  expected = resample_abs_pos_embed(table, [side, side])
  actual = resize_positions(table.numpy(), (side, side))
  assert abs(actual - expected.numpy()).max() < 1e-5
  patches = table[:, 1:].reshape(1, 14, 14, 8).permute(0, 3, 1, 2)
  plain = torch.nn.functional.interpolate(
    patches, size=(side, side), mode='bicubic', align_corners=False
  )
  actual = resize_positions(table.numpy(), (side, side), 'hf')[:, 1:]
  expected = plain.permute(0, 2, 3, 1).reshape(1, side * side, 8)
  assert abs(actual - expected.numpy()).max() < 1e-5
