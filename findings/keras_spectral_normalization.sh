#!/usr/bin/env bash
# Keras' SpectralNormalization divides the kernel by its largest singular value
# in training, by assigning to it. On the JAX backend the kernel is a trainable
# variable, and `stateless_call` gives back the others alone: what was assigned
# is lost. A model trained by `fit` has then, in inference, the kernel as the
# optimizer left it, which is not normalised. Called with state it is.
# Seen with keras 3.15.1, jax 0.10.2 (Python 3.11), on a CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" 2>/dev/null || {
  python3 -m pip install --quiet --target "$folder/tool" virtualenv
  PYTHONPATH="$folder/tool" python3 -m virtualenv --quiet "$folder/env"
}
"$folder/env/bin/pip" install --quiet keras==3.15.1 jax==0.10.2 numpy==2.4.6
export KERAS_BACKEND=jax KERAS_HOME="$folder/home" JAX_PLATFORMS=cpu
"$folder/env/bin/python" - <<'PYTHON'
import jax
import keras
import numpy as np

print('keras', keras.__version__, 'jax', jax.__version__)
keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
x = rng.normal(size=(256, 8)).astype(np.float32)
y = x @ rng.normal(size=(8, 4)).astype(np.float32)
dense = keras.layers.Dense(4)
# Enough steps of the power iteration for the largest singular value.
layer = keras.layers.SpectralNormalization(dense, power_iterations=50)
model = keras.Sequential([keras.Input((8,)), layer])
model.compile(keras.optimizers.SGD(0.1), 'mse')
model.fit(x, y, epochs=5, verbose=0)


def largest():
  return float(np.linalg.svd(dense.kernel.numpy(), compute_uv=False)[0])


fitted = largest()
values = lambda variables: [v.value for v in variables]
_, fixed = model.stateless_call(
  values(model.trainable_variables), values(model.non_trainable_variables), x,
  training=True)
print('largest singular value after fit', round(fitted, 4))
print('variables that stateless_call gives back', len(fixed),
      'of shapes', [v.shape for v in fixed])
assert [v.path for v in model.non_trainable_variables] == [
  'sequential/spectral_normalization/vector_u']
model(x, training=True)
print('after a call with state', round(largest(), 4))
assert abs(fitted - 1) > 0.1 and len(fixed) == 1
assert abs(largest() - 1) < 1e-3
PYTHON
