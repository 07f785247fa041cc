#!/usr/bin/env bash
# torchax 0.0.13, which asks for no upper version of PyTorch, does not load
# beside PyTorch 2.13: its tables name overloads of named tensors
# (aten.prod.dim_Dimname), which that release no longer has.
# Seen with torchax 0.0.13, torch 2.13.0 and jax 0.10.2 (Python 3.11), on a CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" 2>/dev/null || {
  python3 -m pip install --quiet --target "$folder/tool" virtualenv
  PYTHONPATH="$folder/tool" python3 -m virtualenv --quiet "$folder/env"
}
# Any build of PyTorch will do; one for CPUs is a tenth of the size.
"$folder/env/bin/pip" install --quiet torchax==0.0.13 jax==0.10.2 numpy==2.4.6
"$folder/env/bin/pip" install --quiet torch==2.13.0+cpu ||
  "$folder/env/bin/pip" install --quiet torch==2.13.0
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import importlib.metadata as metadata

import torch

print('torchax', metadata.version('torchax'), 'torch', torch.__version__)
try:
  import torchax
except AttributeError as error:
  print(f'AttributeError: {error}')
  assert 'no overload name' in str(error) and 'Dimname' in str(error)
else:
  raise SystemExit('it loads now')
PYTHON
