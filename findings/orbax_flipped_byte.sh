#!/usr/bin/env bash
# A byte of a checkpoint that orbax wrote is changed, as a bad disk or a copy
# that went wrong changes it: orbax loads the tree without an error or a warning
# and gives other values. (A file that is too short is an error.) Whoever must
# be sure keeps checksums of the arrays.
# Seen with orbax-checkpoint 0.12.8, jax 0.10.2 (Python 3.11).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" 2>/dev/null || {
  python3 -m pip install --quiet --target "$folder/tool" virtualenv
  PYTHONPATH="$folder/tool" python3 -m virtualenv --quiet "$folder/env"
}
"$folder/env/bin/pip" install --quiet \
  orbax-checkpoint==0.12.8 jax==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/env/bin/python" -W error::UserWarning - \
  "$folder/saved" <<'PYTHON'
import importlib.metadata
import pathlib
import sys

import numpy as np
from orbax.checkpoint import v1 as ocp

path = pathlib.Path(sys.argv[1])
w = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
ocp.save(path, {'w': w})
size = lambda file: file.stat().st_size
largest = max((f for f in path.rglob('*') if f.is_file()), key=size)
data = bytearray(largest.read_bytes())
data[len(data) // 2] ^= 0xFF
largest.write_bytes(data)

template = {'w': np.zeros_like(w)}
found = np.asarray(ocp.load(path, template)['w'])
wrong = int(np.sum(found != w))
print('orbax-checkpoint', importlib.metadata.version('orbax-checkpoint'))
print(f'loaded without an error; {wrong} of {w.size} values are others')
assert wrong > 0
PYTHON
