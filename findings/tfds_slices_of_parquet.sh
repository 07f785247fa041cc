#!/usr/bin/env bash
# A slice of a TFDS set that is stored as parquet is the whole split:
# `as_data_source('train[:90%]')` and `'train[90%:]'` both have its every
# example, so that what was held out is trained on, without an error or a
# warning. `info.splits[...]` says 90 and 10 of 100; array_record gives them.
# Seen with tensorflow-datasets 4.9.10, pyarrow 26.0.1 (Python 3.11), without
# TensorFlow.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" 2>/dev/null || {
  python3 -m pip install --quiet --target "$folder/tool" virtualenv
  PYTHONPATH="$folder/tool" python3 -m virtualenv --quiet "$folder/env"
}
"$folder/env/bin/pip" install --quiet tensorflow-datasets==4.9.10 \
  array_record==0.8.6 importlib_resources==7.1.0 pyarrow==26.0.1
cd "$folder"
"$folder/env/bin/python" -W ignore - 2>"$folder/progress" <<'PYTHON'
import contextlib
import sys

import numpy as np
import tensorflow_datasets as tfds


class Hundred(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = tfds.features.FeaturesDict({'x': tfds.features.Scalar(np.int64)})
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    yield from ((i, {'x': i}) for i in range(100))


print('tensorflow-datasets', tfds.__version__)
SLICES = ('train[:90%]', 'train[90%:]')
lengths = {}
for name in ('array_record', 'parquet'):
  builder = Hundred(data_dir=name, file_format=name)
  with contextlib.redirect_stdout(sys.stderr):
    builder.download_and_prepare()
  lengths[name] = [len(builder.as_data_source(split)) for split in SLICES]
  told = [builder.info.splits[split].num_examples for split in SLICES]
  print(f'{name:12} has {lengths[name]} examples, its info says {told}')
  assert told == [90, 10]
assert lengths == {'array_record': [90, 10], 'parquet': [100, 100]}
PYTHON
