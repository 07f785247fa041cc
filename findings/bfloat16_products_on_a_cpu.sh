#!/usr/bin/env bash
# A product of bfloat16 matrices on a CPU is summed in float32 and rounded once:
# all but at most one number in a thousand are the float64 result rounded to
# bfloat16 (of the others float32 ends on the other side of a tie), for sums of
# 8 to 4,096 terms. `preferred_element_type=float32` with a rounding after it is
# no nearer.
# Seen with jax 0.10.2 (Python 3.11), on x86-64; 0.12.0.1 does the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" 2>/dev/null || {
  python3 -m pip install --quiet --target "$folder/tool" virtualenv
  PYTHONPATH="$folder/tool" python3 -m virtualenv --quiet "$folder/env"
}
"$folder/env/bin/pip" install --quiet jax==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

print('jax', jax.__version__)


def wide(a, b):
  y = jnp.matmul(a, b, preferred_element_type=jnp.float32)
  return y.astype(jnp.bfloat16)


for terms in (8, 64, 512, 4096):
  key = jax.random.split(jax.random.key(terms))
  a = jax.random.normal(key[0], (64, terms), jnp.bfloat16)
  b = jax.random.normal(key[1], (terms, 64), jnp.bfloat16)
  exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
  want = exact.astype(ml_dtypes.bfloat16)
  others = [
    int((np.asarray(product(a, b)) != want).sum())
    for product in (jnp.matmul, jax.jit(jnp.matmul), jax.jit(wide))
  ]
  print(f'{terms:5} terms: {others} of {want.size} are other numbers')
  assert max(others) <= want.size / 1000
PYTHON
