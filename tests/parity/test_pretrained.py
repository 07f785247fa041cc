"""What `compress_checkpoint` writes, as models of transformers.

Random weights at small sizes, saved by transformers, cut by us, and loaded by
`load_pretrained`; its logits are those of our own function on the same
directory. Needs the extra `torch` and transformers.
"""

import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest

import utilized_rank as ur
from utilized_rank.models.importing import load_checkpoint

torch = pytest.importorskip('torch')

import originals  # noqa: E402 (torchvision is imported as it can be)

transformers = pytest.importorskip('transformers')

from safetensors.torch import load_file  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from utilized_rank.torch.pairs import Pair  # noqa: E402
from utilized_rank.torch.pairs import SideBySide  # noqa: E402
from utilized_rank.torch.pretrained import load_pretrained  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]

QUIET = {'progress': False}
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 4, 12))
SMALL = originals.GROUPED
UNTIED = {**SMALL, 'tie_word_embeddings': False}
TIED = {**SMALL, 'tie_word_embeddings': True}
CASES = {
  'Llama': UNTIED,
  'Llama, tied, biases': {**TIED, 'attention_bias': True},
  'Qwen2': UNTIED,  # q, k and v have biases
  'Qwen3': {**TIED, 'head_dim': 16},
  'Gemma': {**SMALL, 'head_dim': 16},
  'Phi3': UNTIED,  # q, k and v are one layer, gate and up too
  'GPT2': originals.GPT2,  # all have biases; layers are (inputs, outputs)
}


def saved(name, sizes, folder, **how):
  name = name.partition(',')[0]
  config = getattr(transformers, f'{name}Config')(**sizes)
  last = 'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'
  model = originals.randomise(getattr(transformers, name + last)(config))
  model.to(how.pop('dtype', torch.float32)).save_pretrained(folder, **how)
  return model


def cut(folder, out, **options):
  options = {'params_fraction': 0.6, 'uniform': True, **options}
  ur.compress_checkpoint(
    folder, out, list(TOKENS), anchored=False, **QUIET, **options
  )
  return out


def logits(model, tokens=TOKENS[0]):
  with torch.no_grad():
    return model(torch.from_numpy(tokens)).logits.float().numpy()


def ours(folder):
  model, variables, _ = load_checkpoint(str(folder))
  return np.asarray(jax.jit(ur.low_rank(model.apply))(variables, TOKENS[0]))


def assert_near(got, want):
  # Sums of float32 in another order.
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def no_dense_weight(monkeypatch):
  """Fails where a layer has memory when it is exchanged; counts them."""
  from utilized_rank.torch import pairs

  devices = []
  sizes_of = pairs.sizes_of

  def look(layer):
    devices.append(layer.weight.device.type)
    return sizes_of(layer)

  monkeypatch.setattr(pairs, 'sizes_of', look)
  return devices


@pytest.mark.parametrize('name', CASES)
def test_it_is_the_same_function(name, tmp_path, monkeypatch):
  dense = saved(name, CASES[name], tmp_path / 'in', max_shard_size='20KB')
  folder = cut(tmp_path / 'in', tmp_path / 'out', compensate_mean=True)
  devices = no_dense_weight(monkeypatch)
  model = load_pretrained(folder)
  assert set(devices) == {'meta'}
  assert type(model) is type(dense) and not model.training
  assert_near(logits(model), ours(folder))
  # What is stored is what is there, under the same names.
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  state = model.state_dict()
  tied = {'lm_head.weight'} - set(index['weight_map'])
  assert set(state) - tied == set(index['weight_map'])
  if tied:
    head, embedding = (
      model.get_output_embeddings(),
      model.get_input_embeddings(),
    )
    assert head.weight is embedding.weight
  pairs = [m for m in model.modules() if isinstance(m, Pair)]
  together = [m for m in model.modules() if isinstance(m, SideBySide)]
  assert all(type(x) is torch.nn.Linear for pair in pairs for x in pair)
  assert len(pairs) == len(
    index['metadata']['utilized_rank']['recipe']['leaves']
  )
  assert bool(together) == (name in ('Phi3', 'GPT2'))
  for module in pairs + together:
    width = (
      sum(x[1].out_features for x in module.children())
      if (module in together)
      else module[1].out_features
    )
    assert module.weight.shape[0] == width
  # It is an ordinary model: it generates.
  prompt = torch.from_numpy(TOKENS[0][:1, :5])
  made = model.generate(
    prompt, max_new_tokens=3, do_sample=False, pad_token_id=0
  )
  assert made.shape == (1, 8)


@pytest.mark.parametrize('name', ['Phi3', 'GPT2'])
def test_of_several_kernels_in_one_layer_some_are_pairs(name, tmp_path):
  saved(name, CASES[name], tmp_path / 'in')
  # Which is not the first of the layer's outputs.
  select = [('.*block_1/.*key/kernel', True), ('.*', False)]
  folder = cut(tmp_path / 'in', tmp_path / 'out', select=select)
  model = load_pretrained(folder)
  assert_near(logits(model), ours(folder))
  (layer,) = (m for m in model.modules() if isinstance(m, SideBySide))
  kinds = {name: type(child) for name, child in layer.named_children()}
  assert list(kinds) == ['query', 'key', 'value']
  assert kinds == {
    'query': torch.nn.Linear, 'key': Pair, 'value': torch.nn.Linear
  }  # fmt: skip


def test_dtypes_are_those_of_the_file_or_as_asked(tmp_path):
  saved('Llama', UNTIED, tmp_path / 'in', dtype=torch.bfloat16)
  folder = cut(tmp_path / 'in', tmp_path / 'out')
  model = load_pretrained(folder)
  assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
  model = load_pretrained(folder, dtype=torch.float32)
  assert {p.dtype for p in model.parameters()} == {torch.float32}
  assert_near(logits(model), ours(folder))


def test_a_body_without_a_head(tmp_path):
  """Names have nothing in front, and a class that has a head adds it."""
  config = transformers.LlamaConfig(**TIED)
  model = originals.randomise(transformers.LlamaModel(config))
  model.save_pretrained(tmp_path / 'in')
  folder = cut(tmp_path / 'in', tmp_path / 'out')
  found = load_pretrained(folder)
  assert type(found) is transformers.LlamaModel
  tokens = torch.from_numpy(TOKENS[0])
  with torch.no_grad():
    states = found(tokens).last_hidden_state.numpy()
  assert_near(states, ours(folder))
  whole = load_pretrained(folder, kind=transformers.LlamaForCausalLM)
  with torch.no_grad():
    assert_near(whole.model(tokens).last_hidden_state.numpy(), states)


def test_a_head_that_is_a_pair(tmp_path):
  saved('Llama', UNTIED, tmp_path / 'in')
  select = [('.*head/kernel', True), ('.*', False)]
  model = load_pretrained(cut(tmp_path / 'in', tmp_path / 'out', select=select))
  assert type(model.lm_head) is Pair
  assert_near(logits(model), ours(tmp_path / 'out'))


def test_a_directory_without_pairs(tmp_path):
  dense = saved('Llama', UNTIED, tmp_path / 'in')
  model = load_pretrained(tmp_path / 'in')
  assert not [m for m in model.modules() if isinstance(m, Pair)]
  assert_near(logits(model), logits(dense))


def test_what_is_saved_again_is_loaded_again(tmp_path):
  """By transformers, but for the index that says what is a pair."""
  saved('Llama', TIED, tmp_path / 'in')
  folder = cut(tmp_path / 'in', tmp_path / 'out')
  model = load_pretrained(folder)
  model.save_pretrained(tmp_path / 'again')
  again = load_file(tmp_path / 'again/model.safetensors')
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  assert set(again) == set(index['weight_map'])
  with pytest.raises(ValueError, match=r'not known to the model: .*0\.weight'):
    load_pretrained(tmp_path / 'again')


def edit(folder, name, change):
  """Writes a tensor as `change` makes it, or, by None, not at all."""
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  file = folder / index['weight_map'][name]
  tensors = load_file(file)
  values = change(tensors.pop(name))
  if values is None:
    del index['weight_map'][name]
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  else:
    tensors[name] = values.contiguous()
  save_file(tensors, file, {'format': 'pt'})


def configure(folder, **changes):
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


GATE = 'model.layers.1.mlp.gate_proj'


@pytest.mark.parametrize(
  ('change', 'says'),
  [
    (
      lambda f: edit(f, 'model.norm.weight', lambda x: None),
      'does not fill a LlamaForCausalLM: missing: model.norm.weight',
    ),
    (
      lambda f: configure(f, num_hidden_layers=3),
      r'missing: model\.layers\.2\.input_layernorm.* and 3 more',
    ),
    (
      lambda f: configure(f, attention_bias=True, architectures=['Absent']),
      r"architectures=\['Absent'\], which is not one class .* give kind=",
    ),
    (
      lambda f: edit(f, 'model.norm.weight', lambda x: x[:-1]),
      'of another shape: model.norm.weight',
    ),
    (
      lambda f: edit(f, f'{GATE}.1.weight', lambda x: None),
      f'lacks tensors of its pairs: {GATE}.1.weight',
    ),
    (
      lambda f: edit(f, f'{GATE}.0.weight', lambda x: x[1:]),
      f'the pair of {GATE} is of shapes .* whose ranks differ',
    ),
    (
      lambda f: edit(f, f'{GATE}.0.weight', lambda x: x[:, 1:]),
      rf'{GATE}: .* \(inputs, outputs\) \(32, 48\); .* \[\(31, 48\)\]',
    ),
    (
      lambda f: (f / 'config.json').unlink(),
      'is no directory with a config.json',
    ),
  ],
)
def test_what_is_refused(change, says, tmp_path):
  saved('Llama', UNTIED, tmp_path / 'in')
  folder = cut(tmp_path / 'in', tmp_path / 'out')
  change(folder)
  with pytest.raises(ValueError, match=says):
    load_pretrained(folder)


class Odd(transformers.LlamaForCausalLM):
  def __init__(self, config):
    super().__init__(config)
    self.model.layers[0].mlp.gate_proj = torch.nn.Identity()


def test_a_class_that_it_is_not_of(tmp_path, monkeypatch):
  saved('Llama', UNTIED, tmp_path / 'in')
  folder = cut(tmp_path / 'in', tmp_path / 'out')
  with pytest.raises(ValueError, match='in Odd a Identity, not a linear lay'):
    load_pretrained(folder, kind=Odd)
  configure(folder, model_type='gpt2', n_layer=1)
  with pytest.raises(ValueError, match='in GPT2LMHeadModel nothing, not a li'):
    load_pretrained(folder, kind=transformers.GPT2LMHeadModel)
  monkeypatch.setitem(sys.modules, 'transformers', None)
  with pytest.raises(ImportError, match='transformers is not installed'):
    load_pretrained(folder)


def test_the_example_of_the_page(tmp_path, monkeypatch):
  """The block of docs/language_models.md that needs transformers."""
  page = pathlib.Path(__file__).parents[2] / 'docs/language_models.md'
  (block,) = re.findall(
    r'^```py\n(.*?)^```$', page.read_text('utf-8'), re.M | re.S
  )
  assert 'load_pretrained' in block
  saved('Llama', UNTIED, tmp_path / 'llama')
  cut(tmp_path / 'llama', tmp_path / 'llama-80')
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(block, names)
  assert names['text'].shape == (1, 12)
