"""Published networks for benchmarks; see `common.Network`.

Weights and data are read from `--data_root`, a directory with `networks/` and
`data/`; none are in this repository.
"""

from benchmarks.networks import gpt_nano_sort
from benchmarks.networks import kwt1
from benchmarks.networks import mlp_fmnist_relu
from benchmarks.networks import resnet_cifar10
from benchmarks.networks import stories260k

LOADERS = {
  'mlp_fmnist_relu': mlp_fmnist_relu.load,
  'kwt1': kwt1.load,
  'stories260k': stories260k.load,
  'gpt_nano_sort': gpt_nano_sort.load,
  **resnet_cifar10.LOADERS,
}
