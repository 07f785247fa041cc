#!/usr/bin/env bash
# What Google's guide for LiteRT does with a JAX function, `jax2tf.convert`, a
# SavedModel and `TFLiteConverter.from_saved_model`, works for a fixed number of
# rows. For a symbolic one (`polymorphic_shapes`) the program stays one
# XlaCallModule, and conversion raises.
# Seen with tensorflow-cpu 2.21.0 and jax 0.12.0.1 (Python 3.12), and with jax
# 0.10.2 (Python 3.11), on a CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" 2>/dev/null || {
  python3 -m pip install --quiet --target "$folder/tool" virtualenv
  PYTHONPATH="$folder/tool" python3 -m virtualenv --quiet "$folder/env"
}
# JAX 0.12 needs Python 3.12.
version=$("$folder/env/bin/python" -c \
  'import sys; print("0.12.0.1" if sys.version_info >= (3, 12) else "0.10.2")')
"$folder/env/bin/pip" install --quiet tensorflow-cpu==2.21.0 "jax==$version"
JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 "$folder/env/bin/python" - \
  "$folder" 2>"$folder/log" <<'PYTHON' || { tail -n 3 "$folder/log"; exit 1; }
import sys

import jax
from jax.experimental import jax2tf
import jax.numpy as jnp
import tensorflow as tf

print('jax', jax.__version__, 'tensorflow', tf.__version__)
KERNEL = jax.random.normal(jax.random.key(0), (16, 8))


def converted(rows, shapes):
  module = tf.Module()
  module.f = tf.function(
    jax2tf.convert(lambda x: jnp.tanh(x @ KERNEL), polymorphic_shapes=shapes),
    input_signature=[tf.TensorSpec([rows, 16], tf.float32)],
    autograph=False,
  )
  path = f'{sys.argv[1]}/saved_{rows}'
  signature = module.f.get_concrete_function()
  tf.saved_model.save(module, path, signatures=signature)
  return tf.lite.TFLiteConverter.from_saved_model(path).convert()


print('7 rows:', len(converted(7, None)), 'bytes')
try:
  converted(None, ['(b, 16)'])
except Exception as error:
  print('b rows:', type(error).__name__)
  assert 'XlaCallModule' in str(error)
else:
  raise SystemExit('it converts now')
PYTHON
