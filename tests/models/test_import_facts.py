"""What no shape tells: said by metadata or the caller, or else refused."""

import json

import checkpoints
import jax
import numpy as np
import pytest
from test_importing import variables_of

from utilized_rank.models.importing import load_checkpoint
from utilized_rank.models.importing import model_types
from utilized_rank.models.importing import timm_names
from utilized_rank.models.llama import Llama
from utilized_rank.models.rotary import Rotation
from utilized_rank.models.vit import ViT
from utilized_rank.tree import paths

pytestmark = pytest.mark.slow

SIZES = {
  'hidden_size': 8,
  'num_hidden_layers': 1,
  'num_attention_heads': 2,
  'num_key_value_heads': 1,
}
LLAMA = {'model_type': 'llama', 'rope_theta': 5e5, **SIZES}


def llama_state(seed=0):
  """A Llama under Hugging Face's names."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  block = 'model.layers.0.'
  state = {
    'model.embed_tokens.weight': draw(7, 8),
    'model.norm.weight': draw(8),
    'lm_head.weight': draw(7, 8),
    f'{block}input_layernorm.weight': draw(8),
    f'{block}post_attention_layernorm.weight': draw(8),
  }
  for name, shape in {
    'self_attn.q_proj': (8, 8),
    'self_attn.k_proj': (4, 8),
    'self_attn.v_proj': (4, 8),
    'self_attn.o_proj': (8, 8),
    'mlp.gate_proj': (6, 8),
    'mlp.up_proj': (6, 8),
    'mlp.down_proj': (8, 6),
  }.items():
    state[f'{block}{name}.weight'] = draw(*shape)
  return state


def save(folder, state, config=None):
  np.savez(folder / 'w.npz', **state)
  if config is not None:
    (folder / 'config.json').write_text(json.dumps(config))
  return str(folder / 'w.npz')


def test_a_bare_file_is_refused_and_the_options_are_named(tmp_path):
  path = save(tmp_path, llama_state())
  with pytest.raises(ValueError, match='theta= .usually 10000.0, 5e5 in Ll'):
    load_checkpoint(path, heads=2)
  with pytest.raises(ValueError, match='config= or|config.json with config='):
    load_checkpoint(path)
  with pytest.raises(ValueError, match='no convention for width 8'):
    load_checkpoint(path, assume=True)
  _, _, imported = load_checkpoint(path, heads=2, assume=True)
  assert imported.assumed['theta'] == 1e4
  assert imported.metadata == ''


def test_the_config_beside_the_file_says_the_rest(tmp_path):
  path = save(tmp_path, llama_state(), LLAMA)
  for place in (path, str(tmp_path)):
    model, variables, imported = load_checkpoint(place)
    assert imported.assumed == {}
    assert imported.metadata.endswith('config.json')
    assert model.rotations == (Rotation.plain(5e5, 4),)
    assert not model.tied
  given, tree, _ = load_checkpoint(path, config=LLAMA)
  assert given == model
  jax.tree.map(np.testing.assert_array_equal, tree, variables)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model_type': 'llama5'}, "'llama5', which is not known here; known"),
    ({'new_key': 3}, "says {'new_key': 3}, of which nothing is known"),
    ({'hidden_act': 'mish'}, "hidden_act 'mish'; known are"),
    ({'rope_scaling': {'rope_type': 'dynamic', 'factor': 2}}, "type 'dynamic'"),
    ({'rope_scaling': {'type': 'linear'}}, 'with {}; they have factor'),
    ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    ({'model_type': 'olmo', 'clip_qkv': 8.0}, 'clip_qkv 8.0; the model here'),
    (
      {'model_type': 'gemma3_text', 'attn_logit_softcapping': 50.0},
      'attn_logit_softcapping 50.0; the model here has None',
    ),
    ({'model_type': 'olmo2'}, 'is nearest to the layout of OLMo 2'),
  ],
)
def test_configs_that_are_refused(change, message, tmp_path):
  path = save(tmp_path, llama_state(), {**LLAMA, **change})
  with pytest.raises(ValueError, match=message):
    load_checkpoint(path)


def test_a_tied_head_in_the_file_is_not_what_runs(tmp_path):
  config = {**LLAMA, 'tie_word_embeddings': True}
  model, variables, imported = load_checkpoint(
    save(tmp_path, llama_state(), config)
  )
  assert model.tied
  assert 'lm_head.weight' in imported.ignored
  assert 'head' not in variables['params']


def test_the_scaling_of_llama_3():
  scaling = {
    'rope_type': 'llama3',
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 64,
  }
  config = {**LLAMA, 'head_dim': 8, 'rope_scaling': scaling, 'rope_theta': 1e2}
  options, _ = model_types.facts(config, '')
  (rotation,) = options['rotations']
  # Wavelengths 2 pi 100^(j/4): 6.3 and 16 turn 10 and 4 times in 64 positions
  # and stay, or almost; 63 turns once and is divided.
  plain = 100.0 ** -(np.arange(4) / 4)
  turns = 64 * plain / (2 * np.pi)
  mix = np.clip((turns - 1) / 3, 0, 1)
  expected = plain * (mix + (1 - mix) / 8)
  np.testing.assert_allclose(rotation.rates, expected, rtol=1e-12)


def test_matrices_are_never_reshaped(tmp_path):
  """GPT-2's are (in, out) under minGPT's names, where they are (out, in)."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  state = {
    'transformer.wte.weight': draw(5, 8),
    'transformer.wpe.weight': draw(6, 8),
    'transformer.ln_f.weight': draw(8),
    'transformer.ln_f.bias': draw(8),
  }
  for name, (rows, columns) in {
    'attn.c_attn': (8, 24),
    'attn.c_proj': (8, 8),
    'mlp.c_fc': (8, 32),
    'mlp.c_proj': (32, 8),
  }.items():
    state[f'transformer.h.0.{name}.weight'] = draw(rows, columns)
    state[f'transformer.h.0.{name}.bias'] = draw(columns)
  for name in ('ln_1', 'ln_2'):
    state[f'transformer.h.0.{name}.weight'] = draw(8)
    state[f'transformer.h.0.{name}.bias'] = draw(8)
  path = save(tmp_path, state)
  model, variables, _ = load_checkpoint(path, heads=2, activation='gelu_tanh')
  assert model.tied
  block = variables['params']['block_0']
  np.testing.assert_array_equal(
    block['MlpBlock_3']['Dense_0']['kernel'],
    state['transformer.h.0.mlp.c_fc.weight'],
  )
  keys = block['MultiHeadDotProductAttention_1']['key']['kernel']
  np.testing.assert_array_equal(
    keys.reshape(8, 8), state['transformer.h.0.attn.c_attn.weight'][:, 8:16]
  )
  # One matrix the other way round does not fit, whatever its size.
  name = 'transformer.h.0.mlp.c_fc.weight'
  path = save(tmp_path, {**state, name: state[name].T})
  with pytest.raises(ValueError, match='c_fc.weight gives .* should be'):
    load_checkpoint(path, heads=2, activation='gelu_tanh')


def test_a_name_of_timm_says_the_rest(tmp_path):
  state = checkpoints.timm_state(depth=1, width=192)
  path = save(tmp_path, state)
  with pytest.raises(ValueError, match="norm_order= .usually 'before'"):
    load_checkpoint(path)
  model, _, imported = load_checkpoint(
    path, architecture='vit_tiny_patch16_224.augreg_in21k'
  )
  assert (model.heads, model.pool, imported.assumed) == (3, 'token', {})
  with pytest.raises(ValueError, match='near in name: vit_tiny_patch16_224'):
    load_checkpoint(path, architecture='vit_tiny_patch16_225')
  config = {'architecture': 'vit_tiny_patch16_224', 'global_pool': 'token'}
  save(tmp_path, state, config)
  assert load_checkpoint(path)[0] == model
  for more, message in (
    ({'global_pool': 'avg'}, "global_pool='gap' where"),
    ({'model_args': {'qk_norm': True}}, r"model_args \['qk_norm'\]"),
  ):
    save(tmp_path, state, config | more)
    with pytest.raises(ValueError, match=message):
      load_checkpoint(path)
  with pytest.raises(ValueError, match='neither a model_type'):
    load_checkpoint(path, config={'heads': 3})


@pytest.mark.parametrize(
  ('name', 'option', 'value'),
  [
    ('vit_base_patch16_rpn_224', 'norm_order', 'branch'),
    ('vit_base_patch16_clip_quickgelu_224', 'activation', 'quick_gelu'),
    ('vit_base_patch32_siglip_gap_256', 'activation', 'gelu_tanh'),
    ('vit_base_patch16_siglip_gap_256', 'activation', 'gelu'),
    ('vit_giantopt_patch16_siglip_gap_256', 'heads', 16),
    ('resnetaa50', 'blur', 'average'),
    ('resnetblur18', 'blur', 'binomial'),
  ],
)
def test_names_that_were_read_as_others(name, option, value):
  assert timm_names.facts(name, '')[option] == value


def test_a_student_alone_is_the_model(tmp_path):
  state = checkpoints.timm_state(depth=1)
  nest = {f'student.{k}': v for k, v in state.items()}
  _, alone, imported = load_checkpoint(
    save(tmp_path, nest), heads=2, assume=True
  )
  assert imported.prefix == 'student.'
  # Beside a teacher it is not; and the teacher's head is its own.
  nest |= {f'teacher.{k}': v + 1 for k, v in state.items()}
  model, tree, imported = load_checkpoint(
    save(tmp_path, nest), heads=2, assume=True
  )
  assert imported.prefix == 'teacher.'
  assert model.num_classes == 5
  kernel = lambda variables: variables['params']['head']['kernel']
  np.testing.assert_allclose(kernel(tree), kernel(alone) + 1)


def test_weights_below_an_optimizer(tmp_path):
  """As the first checkpoints of Flax: an optimizer that holds its target."""
  model = ViT(5, patch_size=2, width=8, depth=1, heads=2, mlp_dim=12)
  variables = variables_of(model, 1, 4, 4, 3)
  flat = paths.flatten(variables['params'])[0]
  state = {f'opt/target/{name}': x for name, x in flat.items()}
  state['opt/state/step'] = np.ones(())
  _, tree, imported = load_checkpoint(save(tmp_path, state))
  assert imported.ignored == ('opt/state/step',)
  jax.tree.map(np.testing.assert_array_equal, tree, variables)


def test_one_model_twice_is_said(tmp_path):
  state = checkpoints.timm_state(depth=1)
  both = {f'student.{x}.{k}': v for x in 'ab' for k, v in state.items()}
  with pytest.raises(ValueError, match='more than once, below .student.a'):
    load_checkpoint(save(tmp_path, both), heads=2, assume=True)


def options_of_a_decoder():
  plain = {'activation': 'gelu_tanh', 'theta': 100.0}
  return [
    {**plain, 'norm_order': 'both', 'logits_cap': 3.0, 'attention_cap': 2.0},
    {**plain, 'norm_order': 'branch', 'qk_norm': 'width', 'windows': (2, None)},
    {**plain, 'qk_norm': 'head', 'rotations': (None, Rotation((1.0,)))},
  ]


@pytest.mark.parametrize('options', options_of_a_decoder(), ids=str)
def test_padding_is_not_seen(options):
  model = Llama(7, 8, 2, heads=2, kv_heads=1, mlp_dim=6, **options)
  variables = variables_of(model, 1, 5, dtype=np.int32)
  tokens = np.array([[1, 2, 3, 4, 5]])
  run = jax.jit(model.apply)
  short = run(variables, tokens[:, :3])
  mask = np.array([[1, 1, 1, 0, 0]])
  padded = run(variables, tokens, mask)[:, :3]
  np.testing.assert_allclose(padded, short, rtol=1e-5, atol=1e-6)
  # A mask of ones is none.
  whole = run(variables, tokens, np.ones((1, 5)))
  np.testing.assert_allclose(
    whole, run(variables, tokens), rtol=1e-5, atol=1e-6
  )


def test_options_of_a_decoder_are_checked():
  sizes = {'heads': 2, 'kv_heads': 1, 'mlp_dim': 6}
  for wrong in ({'norm': 'batch'}, {'qk_norm': 'all'}, {'windows': (1,)}):
    model = Llama(7, 8, 2, **sizes, **wrong)
    with pytest.raises(ValueError, match=next(iter(wrong))):
      variables_of(model, 1, 3, dtype=np.int32)
