"""Writes what becomes of the model types of transformers.

  python tests/parity/hf_types.py

Needs the `parity` extra. A tiny model of random weights of each type is saved
by transformers itself, loaded by `load_checkpoint` from the directory, and run
in float32. What was found goes to `docs/checkpoints.md`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shutil
import sys
import tempfile
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import originals  # noqa: E402 (torchvision is imported as it can be)
from originals import FLAT  # noqa: E402
from originals import GPT2  # noqa: E402
from originals import GROUPED  # noqa: E402
from originals import PATCHES  # noqa: E402
from originals import STAGES  # noqa: E402
from originals import TEXT  # noqa: E402
from originals import WINDOWS  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import utilized_rank  # noqa: E402
from utilized_rank.models.importing import load_checkpoint  # noqa: E402

BAR = 1e-4
BEGIN = '<!-- What `python tests/parity/hf_types.py` writes begins here. -->'
END = '<!-- What `python tests/parity/hf_types.py` writes ends here. -->'

EXPERTS = {'moe_intermediate_size': 16, 'num_experts': 4}
LOCAL = {'num_local_experts': 4, 'num_experts_per_tok': 2}
DISTIL = {'n_layers': 2, 'n_heads': 4, 'dim': 32, 'hidden_dim': 48}
DISTIL |= {'vocab_size': 50, 'max_position_embeddings': 64}
TOWERS = {
  'vision_config': PATCHES,
  'text_config': {**TEXT, 'hidden_size': 32},
  'projection_dim': 32,
}

CAUSAL = {
  'llama': GROUPED,
  'mistral': {**GROUPED, 'sliding_window': 5},
  'ministral': {**GROUPED, 'head_dim': 8},
  'mixtral': {**GROUPED, **LOCAL},
  'qwen2': GROUPED,
  'qwen3': {**GROUPED, 'head_dim': 16},
  'qwen2_moe': {**GROUPED, **EXPERTS, 'shared_expert_intermediate_size': 16},
  'qwen3_moe': {**GROUPED, **EXPERTS, 'head_dim': 8},
  'gemma': {**GROUPED, 'head_dim': 16},
  'gemma2': {**GROUPED, 'head_dim': 16, 'sliding_window': 5},
  'gemma3_text': {
    **GROUPED,
    'head_dim': 16,
    'sliding_window': 5,
    'num_hidden_layers': 7,
  },
  'vaultgemma': {**GROUPED, 'head_dim': 8},
  'phi': GROUPED,
  'phi3': GROUPED,
  'olmo': GROUPED,
  'olmo2': GROUPED,
  'olmo3': GROUPED,
  'granite': GROUPED,
  'granitemoe': {**GROUPED, **LOCAL},
  'helium': {**GROUPED, 'head_dim': 8},
  'smollm3': GROUPED,
  'ernie4_5': {**GROUPED, 'head_dim': 8},
  'cohere': GROUPED,
  'cohere2': GROUPED,
  'glm': {**GROUPED, 'head_dim': 8},
  'glm4': {**GROUPED, 'head_dim': 8},
  'nemotron': GROUPED,
  'exaone4': GROUPED,
  'seed_oss': {**GROUPED, 'head_dim': 8},
  'arcee': GROUPED,
  'apertus': GROUPED,
  'persimmon': TEXT,
  'diffllama': GROUPED,
  'bitnet': GROUPED,
  'hunyuan_v1_dense': {**GROUPED, 'head_dim': 8},
  'stablelm': GROUPED,
  'starcoder2': GROUPED,
  'gpt2': GPT2,
  'gpt_bigcode': GPT2,
  'gpt_neox': TEXT,
  'gpt_neo': {
    'vocab_size': 50,
    'hidden_size': 32,
    'num_layers': 2,
    'num_heads': 4,
    'attention_types': [[['global', 'local'], 1]],
    'max_position_embeddings': 64,
  },
  'gptj': {**GPT2, 'rotary_dim': 4},
  'codegen': {**GPT2, 'rotary_dim': 4, 'n_ctx': 64},
  'openai-gpt': GPT2,
  'opt': {**TEXT, 'ffn_dim': 48, 'word_embed_proj_dim': 32},
  'bloom': {'vocab_size': 50, 'hidden_size': 32, 'n_layer': 2, 'n_head': 4},
  'falcon': TEXT,
  'mpt': {'vocab_size': 50, 'd_model': 32, 'n_layers': 2, 'n_heads': 4},
  'biogpt': TEXT,
}
MASKED = {
  'bert': TEXT,
  'distilbert': DISTIL,
  'roberta': {**TEXT, 'pad_token_id': 1},
  'xlm-roberta': {**TEXT, 'pad_token_id': 1},
  'camembert': {**TEXT, 'pad_token_id': 1},
  'data2vec-text': {**TEXT, 'pad_token_id': 1},
  'ernie': {**TEXT, 'pad_token_id': 0},
  'electra': {**TEXT, 'embedding_size': 32, 'pad_token_id': 0},
  'albert': {**TEXT, 'embedding_size': 16, 'pad_token_id': 0},
  'mpnet': {**TEXT, 'pad_token_id': 1},
  'roformer': {**TEXT, 'embedding_size': 32, 'pad_token_id': 0},
  'modernbert': {**TEXT, 'pad_token_id': 0},
  'nomic_bert': {**TEXT, 'pad_token_id': 0},
  'deberta-v2': {**TEXT, 'pad_token_id': 0},
}
IMAGES = {
  'vit': PATCHES,
  # Else transformers asks what it was saved as.
  'deit': {**PATCHES, 'architectures': ['DeiTForImageClassification']},
  'beit': {**PATCHES, 'use_relative_position_bias': True},
  'data2vec-vision': {**PATCHES, 'use_relative_position_bias': True},
  'dinov2': PATCHES,
  'dinov2_with_registers': PATCHES,
  'ijepa': PATCHES,
  'vit_msn': PATCHES,
  'convnext': STAGES,
  'convnextv2': STAGES,
  'swin': WINDOWS,
  'swinv2': WINDOWS,
  'resnet': {**STAGES, 'embedding_size': 8},
  'regnet': {**STAGES, 'embedding_size': 8, 'groups_width': 4},
  'poolformer': {
    'hidden_sizes': [8, 16],
    'depths': [1, 1],
    'num_encoder_blocks': 2,
    'patch_sizes': [7, 3],
    'strides': [4, 2],
    'padding': [2, 1],
  },
  'focalnet': {'embed_dim': 8, 'depths': [1, 1], 'image_size': 32},
  'mobilenet_v1': {'depth_multiplier': 0.25, 'image_size': 32},
  'mobilenet_v2': {'depth_multiplier': 0.25, 'image_size': 32},
  'efficientnet': {'width_coefficient': 0.1, 'image_size': 32},
}
# What an image becomes where no head reads it; the output that ours is.
FEATURES = {
  'vit_mae': ({**PATCHES, 'mask_ratio': 0.0}, 'token'),
  'dinov3_vit': ({**PATCHES, 'num_register_tokens': 2}, 'pooler_output'),
  'dinov3_convnext': (
    {'depths': [1, 2], 'hidden_sizes': [8, 16]},
    'pooler_output',
  ),
  'clip_vision_model': (PATCHES, 'pooler_output'),
  'siglip_vision_model': (PATCHES, 'pooler_output'),
  'siglip2_vision_model': ({**FLAT, 'num_patches': 4}, 'pooler_output'),
  'aimv2_vision_model': (
    {**PATCHES, 'use_head': False},
    'last_hidden_state',
  ),
  'mlcd_vision_model': (PATCHES, 'pooler_output'),
  'pixio': (PATCHES, 'pooler_output'),
  'clip': (TOWERS, 'tower'),
  'siglip': (TOWERS, 'tower'),
  'siglip2': (
    {**TOWERS, 'vision_config': {**FLAT, 'num_patches': 4}},
    'tower',
  ),
  'metaclip_2': (TOWERS, 'tower'),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A model type, and which of its models is saved.

  Attributes:
    model_type: of transformers.
    kind: `'CausalLM'`, `'MaskedLM'`, `'ImageClassification'` or `'features'`.
    sizes: of the config.
    read: the output that ours is, of features.
  """

  model_type: str
  kind: str
  sizes: dict
  read: str = 'logits'


CASES = [
  *(Case(name, 'CausalLM', sizes) for name, sizes in CAUSAL.items()),
  *(Case(name, 'MaskedLM', sizes) for name, sizes in MASKED.items()),
  *(Case(name, 'ImageClassification', sizes) for name, sizes in IMAGES.items()),
  *(Case(k, 'features', sizes, read) for k, (sizes, read) in FEATURES.items()),
]


class Different(Exception):
  """Loads without a word, and is another model."""


def saved(case, folder):
  """The model of transformers that is in the folder now."""
  config = transformers.CONFIG_MAPPING[case.model_type](**case.sizes)
  head = '' if case.kind == 'features' else f'For{case.kind}'
  kind = getattr(transformers, f'AutoModel{head}')
  # Two types with experts take their products by operators of their own.
  model = kind.from_config(config, attn_implementation='eager')
  model = originals.randomise(model.float())
  model.save_pretrained(folder)
  return model


def tokens():
  found = np.random.default_rng(0).integers(2, 50, (2, 12))
  mask = np.ones((2, 12), int)
  mask[1, 9:] = 0
  return found, mask


def pixels():
  images = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
  return images.astype(np.float32)


def batches(case):
  """(ours, the original's, which outputs count) for each batch."""
  if case.kind in ('CausalLM', 'MaskedLM'):
    ids, mask = tokens()
    given = {'input_ids': torch.from_numpy(ids)}
    yield (ids,), given, ...
    # What padding itself becomes is no output.
    yield (
      (ids, mask),
      {**given, 'attention_mask': torch.from_numpy(mask)},
      mask.astype(bool),
    )
    return
  x = pixels()
  batch = {'pixel_values': torch.from_numpy(x.transpose(0, 3, 1, 2).copy())}
  if case.model_type.startswith('siglip2'):
    flat = x.reshape(2, 2, 16, 2, 16, 3).transpose(0, 1, 3, 2, 4, 5)
    batch = {
      'pixel_values': torch.from_numpy(flat.reshape(2, 4, 768).copy()),
      'pixel_attention_mask': torch.ones(2, 4, dtype=torch.long),
      'spatial_shapes': torch.tensor([[2, 2], [2, 2]]),
    }
  if case.model_type == 'vit_mae':  # or it draws the order of the patches
    batch['noise'] = torch.arange(4.0).expand(2, 4)
  yield (x,), batch, ...


def output(case, model, batch):
  with torch.no_grad():
    if case.read == 'tower':
      found = model.vision_model(**batch).pooler_output
      if hasattr(model, 'visual_projection'):
        found = model.visual_projection(found)
      return found.numpy()
    found = model(**batch)
  if case.read == 'token':
    return found.last_hidden_state[:, 0].numpy()
  return found[case.read].numpy()


def difference(case, model, path, **options):
  """The largest, over the largest output.

  Raises:
    ValueError: our loader refuses.
  """
  ours, variables, imported = load_checkpoint(path, **options)
  assert imported.assumed == {}
  run = jax.jit(ours.apply)
  largest = 0.0
  for mine, batch, counted in batches(case):
    expected = output(case, model, batch)
    actual = np.asarray(run(variables, *mine))
    if actual.shape != expected.shape:
      raise Different(f'{actual.shape} where there is {expected.shape}')
    assert np.std(expected) > 1e-2
    found = abs(actual - expected)[counted].max() / abs(expected).max()
    largest = max(largest, float(found))
  return largest


def reason(error, path):
  """The first of an error's sentences, without the place of the file."""
  text = str(error).replace('\n', ' ').replace(f'{path}/config.json', 'config')
  text = text.replace(f'{path} ', '').replace(str(path), '')
  first = re.split(r'; | Expected |(?<=\w)\. ', text)[0]
  return first.rstrip('.')


def becomes(case, path, bare):
  """(difference or None, why it is refused) of a directory, and of a file.

  The second is of the weights alone, where no config says what they are: there
  equal is good, refused is good, and nothing else is.
  """
  model = saved(case, path)
  shutil.copy(path / 'model.safetensors', bare / 'model.safetensors')
  found = []
  for place in (path, bare / 'model.safetensors'):
    try:
      found.append((difference(case, model, str(place)), ''))
    except ValueError as error:
      found.append((None, reason(error, place)))
    value = found[-1][0]
    if value is not None and value > BAR:
      raise Different(f'{case.model_type}, {place}: {value:.1e}')
  return found


HEAD = """\
What becomes of {count} model types of transformers {version}, tiny, with random
weights, as `save_pretrained` writes them: {equal} load and their outputs are
equal, {refused} are refused, and none is loaded as another model. The number is
the largest difference over the largest output in float32; of text, there is a
batch without padding and one with.

| `model_type` | model | found |
|---|---|---|
{rows}

A `vit_mae` is compared without masking: what is loaded is its encoder, which
sees all patches. Of these weights without their config {bare} load; the others
are refused."""


def table(folder):
  rows, equal, bare = [], 0, 0
  for i, case in enumerate(CASES):
    path, alone = folder / f'{i}', folder / f'{i}_alone'
    path.mkdir()
    alone.mkdir()
    (value, why), (without, _) = becomes(case, path, alone)
    equal, bare = equal + (value is not None), bare + (without is not None)
    said = f'refused: {why}' if value is None else f'equal ({value:.1e})'
    print(case.model_type, said, without, flush=True)
    rows.append(f'| `{case.model_type}` | {case.kind} | {said} |')
    shutil.rmtree(path)
    shutil.rmtree(alone)
  return HEAD.format(
    count=len(CASES),
    version=transformers.__version__,
    equal=equal,
    refused=len(CASES) - equal,
    rows='\n'.join(rows),
    bare=bare or 'none',
  )


def kept(text):
  """The part of the document that this writes, its marks with it."""
  return text[text.index(BEGIN) : text.index(END) + len(END)]


def main():
  package = pathlib.Path(utilized_rank.__file__).parent
  path = package.parent / 'docs' / 'checkpoints.md'
  warnings.simplefilter('ignore')
  with tempfile.TemporaryDirectory() as folder:
    found = table(pathlib.Path(folder))
  text = path.read_text()
  path.write_text(text.replace(kept(text), f'{BEGIN}\n{found}\n{END}'))


if __name__ == '__main__':
  main()
