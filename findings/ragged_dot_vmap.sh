#!/usr/bin/env bash
# jax.vmap of lax.ragged_dot works only where all three operands are batched
# along axis 0. With one operand batched along axis 0 and the others shared, the
# usual case of an ensemble or of several settings tried on one batch, it raises
# "vmap over any dim but 0 - NYI". lax.dot_general has a rule for all of them.
# Seen with jax 0.10.2 (Python 3.11), on a CPU; 0.12.0.1 does the same.
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

x, w = jnp.ones((6, 4)), jnp.ones((2, 4, 3))
sizes = jnp.array([2, 4])
more = lambda a: jnp.stack([a, a])
ragged = lambda x, w, sizes: jax.lax.ragged_dot(x, w, sizes)
print('jax', jax.__version__)


def seen(name, axes, *args):
  try:
    said = str(jax.vmap(ragged, axes)(*args).shape)
  except NotImplementedError as error:
    said = f'NotImplementedError: {error}'
  print(f'{name:12}', said)
  return said


refused = 'NotImplementedError: ragged_dot vmap over any dim but 0 - NYI'
assert seen('all at 0', (0, 0, 0), more(x), more(w), more(sizes)) == '(2, 6, 3)'
assert seen('x at 0', (0, None, None), more(x), w, sizes) == refused
assert seen('w at 0', (None, 0, None), x, more(w), sizes) == refused
assert seen('sizes at 0', (None, None, 0), x, w, more(sizes)) == refused
PYTHON
