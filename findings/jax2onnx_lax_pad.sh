#!/usr/bin/env bash
# jax2onnx 0.17.1 converts `jnp.pad` of an array with a symbolic axis, and raises
# InconclusiveDimensionOperation for `lax.pad` of the same: it makes an ONNX
# shape of JAX's dimensions there as they are. With fixed shapes both convert.
# Seen with jax2onnx 0.17.1, onnx-ir 1.1.0 and jax 0.12.0.1 (Python 3.12), and
# with jax 0.10.2 (Python 3.11), on a CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" 2>/dev/null || {
  python3 -m pip install --quiet --target "$folder/tool" virtualenv
  PYTHONPATH="$folder/tool" python3 -m virtualenv --quiet "$folder/env"
}
"$folder/env/bin/pip" install --quiet jax2onnx==0.17.1 onnx-ir==1.1.0 \
  onnx==1.23.2 jax==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import importlib.metadata as metadata

import jax
from jax import lax
import jax.numpy as jnp
from jax2onnx import to_onnx

print('jax2onnx', metadata.version('jax2onnx'), 'jax', jax.__version__)


def by_numpy(x):
  return jnp.pad(x, [(0, 0), (0, 2)])


def by_lax(x):
  return lax.pad(x, jnp.float32(0), [(0, 0, 0), (0, 2, 0)])


for fn, rows in ((by_numpy, 7), (by_numpy, 'B'), (by_lax, 7)):
  names = [node.op_type for node in to_onnx(fn, [(rows, 8)]).graph.node]
  print(fn.__name__, rows, names)
  assert names == ['Pad']
try:
  to_onnx(by_lax, [('B', 8)])
except Exception as error:
  name = type(error).__name__
  print('by_lax B', name, str(error).splitlines()[0])
  assert name == 'InconclusiveDimensionOperation'
else:
  raise SystemExit('it converts now')
PYTHON
