#!/usr/bin/env bash
# In transformers 5 the names in a file that `save_pretrained` writes are not
# those of the module's `state_dict()`: on the way out modules' names become
# those of older files, and of experts that are one array a file holds each.
# Whoever looks names of the one up in the other finds nothing.
# Seen with transformers 5.24.0, torch 2.13.0 (Python 3.11), random weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" 2>/dev/null || {
  python3 -m pip install --quiet --target "$folder/tool" virtualenv
  PYTHONPATH="$folder/tool" python3 -m virtualenv --quiet "$folder/env"
}
# Any build of PyTorch will do; one for CPUs is a tenth of the size.
"$folder/env/bin/pip" install --quiet transformers==5.24.0 safetensors==0.8.0
"$folder/env/bin/pip" install --quiet torch==2.13.0+cpu ||
  "$folder/env/bin/pip" install --quiet torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - 2>"$folder/progress" <<'PYTHON'
from safetensors import safe_open
import torch
import transformers

print('transformers', transformers.__version__, 'torch', torch.__version__)
SIZES = {
  'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 1,
  'num_attention_heads': 2,
}
vit = transformers.ViTConfig(image_size=8, patch_size=4, **SIZES)
mixtral = transformers.MixtralConfig(
  vocab_size=32, num_key_value_heads=2, num_local_experts=2, **SIZES)


def names(model):
  model.save_pretrained('saved')
  with safe_open('saved/model.safetensors', 'pt') as file:
    written, held = set(file.keys()), set(model.state_dict())
  print(type(model).__name__)
  for where, found in ('file', written - held), ('module', held - written):
    print(f'  of the {where} alone: {len(found)}, such as {min(found)}')
  return written, held


written, held = names(transformers.ViTModel(vit))
query = 'layers.0.attention.q_proj.weight'
assert query in held - written
assert 'encoder.layer.0.attention.attention.query.weight' in written - held
written, held = names(transformers.MixtralForCausalLM(mixtral))
assert 'model.layers.0.mlp.experts.gate_up_proj' in held - written
expert = 'model.layers.0.block_sparse_moe.experts.1.w1.weight'
assert expert in written - held
PYTHON
