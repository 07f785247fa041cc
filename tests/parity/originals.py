"""Torch models with random weights, and how near ours come to them."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')


def _declare_operators():
  """Torchvision's wheels are for CUDA: without it two operators are missing."""
  library = torch.library.Library('torchvision', 'DEF')
  for name in ('nms', 'qnms'):
    library.define(
      f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
    )
  return library


try:
  import torchvision  # noqa: F401
except ModuleNotFoundError:
  pass  # transformers does without; who does not asks for it
except RuntimeError:
  _LIBRARY = _declare_operators()

from utilized_rank.models.importing import load_checkpoint  # noqa: E402

# Sizes of models of transformers, as their configs call them.
TEXT = {
  'vocab_size': 50,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'max_position_embeddings': 64,
  'pad_token_id': None,
  'bos_token_id': None,
  'eos_token_id': None,
}
GROUPED = {**TEXT, 'num_key_value_heads': 2}
GPT2 = {
  'vocab_size': 50,
  'n_positions': 64,
  'n_embd': 32,
  'n_layer': 2,
  'n_head': 4,
  'bos_token_id': None,
  'eos_token_id': None,
}
PATCHES = {
  'hidden_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'intermediate_size': 48,
  'image_size': 32,
  'patch_size': 16,
}
# Without a size of images: it takes any.
FLAT = {k: v for k, v in PATCHES.items() if k != 'image_size'}
STAGES = {'depths': [1, 2], 'hidden_sizes': [8, 16], 'num_stages': 2}
WINDOWS = {
  'depths': [2, 2],
  'num_heads': [2, 4],
  'embed_dim': 16,
  'window_size': 4,
  'image_size': 32,
}


def randomise(model, seed=0):
  """Random everywhere, of the sizes that trained networks have."""
  generator = torch.Generator().manual_seed(seed)

  def normal(like, scale):
    return torch.randn(like.shape, generator=generator) * scale

  with torch.no_grad():
    for value in model.parameters():
      if value.ndim > 1:
        # Tokens and positions have one row; kernels (out, in, ...).
        fan_in = value[0].numel() if len(value) > 1 else 50
        value.copy_(normal(value, fan_in**-0.5))
      else:
        value.copy_(0.1 * normal(value, 1.0) + (value == 1) * 1.0)
    for name, value in model.named_buffers():
      if name.endswith('running_mean'):
        value.copy_(normal(value, 0.3))
      if name.endswith('running_var'):
        value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
  return model.eval()


def save(state, path, form):
  if form == 'pth':
    torch.save(state, path)
  else:
    from safetensors.torch import save_file

    save_file({k: v.contiguous().clone() for k, v in state.items()}, path)


def difference(
  model, logits, shape, path, *, form='pth', state=None, **options
):
  """The largest difference of the logits over the largest logit.

  Args:
    model: the original, random.
    logits: `logits(model, images)` in torch, images (B, C, H, W).
    shape: of the images or tokens in torch's order.
    path: where the weights are written to be loaded.
    form: 'pth' or 'safetensors'.
    state: what is written, if not the state of the model.
    options: for `load_checkpoint`.
  """
  save(model.state_dict() if state is None else state, path, form)
  ours, variables, imported = load_checkpoint(str(path), **options)
  rng = np.random.default_rng(0)
  if len(shape) == 4:
    x = rng.normal(size=shape).astype(np.float32)
    mine = x.transpose(0, 2, 3, 1)
    # The input that the shapes imply is the original's.
    assert imported.input.shape[1:] == mine.shape[1:]
  else:
    x = mine = rng.integers(0, 10, shape)
  with torch.no_grad():
    expected = logits(model, torch.from_numpy(x)).numpy()
  actual = np.asarray(jax.jit(ours.apply)(variables, mine))
  assert actual.shape == expected.shape
  assert np.std(expected) > 1e-2
  return float(np.abs(actual - expected).max() / np.abs(expected).max())
