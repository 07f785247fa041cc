"""Published networks for benchmarks; see `common.Network`.

Weights and data are read from `--data_root`, a directory with `networks/` and
`data/`; none are in this repository. `char_mlp` and `digits_vit` are
trained when they are loaded.
"""

from benchmarks.networks import char_mlp
from benchmarks.networks import digits_vit
from benchmarks.networks import gpt_nano_sort
from benchmarks.networks import kwt1
from benchmarks.networks import mlp_fmnist_relu
from benchmarks.networks import resnet_cifar10
from benchmarks.networks import stories260k

LOADERS = {
  'mlp_fmnist_relu': mlp_fmnist_relu.load,
  'kwt1': kwt1.load,
  'stories260k': stories260k.load,
  'char_mlp': char_mlp.load,
  'digits_vit': digits_vit.load,
  'gpt_nano_sort': gpt_nano_sort.load,
  **resnet_cifar10.LOADERS,
}
