#!/usr/bin/env bash
# X^T X on a CPU is exactly symmetric in numpy for every shape (it notices that
# both factors are one array, and computes one triangle). JAX multiplies it like
# any other product: for some widths (8, 100) its two triangles differ by
# rounding, for others (48, 64) they do not, at the highest precision too. What
# reads rows for columns, such as a pivoted Cholesky decomposition, then sees two
# equal features as different ones.
# Seen with jax 0.10.2 (Python 3.11), on x86-64; 0.12.0.1 does the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" 2>/dev/null || {
  python3 -m pip install --quiet --target "$folder/tool" virtualenv
  PYTHONPATH="$folder/tool" python3 -m virtualenv --quiet "$folder/env"
}
"$folder/env/bin/pip" install --quiet jax==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

print('jax', jax.__version__, 'numpy', np.__version__)
gram = jax.jit(lambda x: jnp.dot(x.T, x, precision='highest'))
differ = {}
for rows, width in ((200, 8), (130, 48), (1000, 64), (300, 100)):
  x = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
  x += 0.5
  ours, theirs = np.asarray(gram(x)), x.T @ x
  differ[width] = np.abs(ours - ours.T).max() / np.abs(ours).max()
  assert (theirs == theirs.T).all()
  print(f'{rows:5} x {width:3}: triangles differ by {differ[width]:.1e} of the '
        'largest entry; numpy: 0')
assert differ[8] > 0 and differ[100] > 0
assert max(differ.values()) < 1e-6
PYTHON
