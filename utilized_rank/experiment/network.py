"""The network of a run: built from its config, or read from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

from utilized_rank.host.extras import extra
from utilized_rank.models import resnet
from utilized_rank.models import vgg
from utilized_rank.models import vit
from utilized_rank.models.batch_norm import fold_batch_norm
from utilized_rank.models.importing import load_checkpoint

with extra('models'):
  import flax.linen as nn

# Not for a config to decide.
_OWN = ('parent', 'name', 'num_classes')


class Kind(NamedTuple):
  """A family of networks: its module, and its published sizes."""

  module: Any
  variants: Mapping[str, Mapping[str, Any]]


KINDS = {
  'vit': Kind(vit.ViT, vit.VARIANTS),
  'resnet': Kind(resnet.ResNet, resnet.VARIANTS),
  'vgg': Kind(vgg.VGG, vgg.VARIANTS),
}


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Where to take trained weights from; the section `config.checkpoint`.

  Attributes:
    path: a file that `load_checkpoint` reads.
    fold_batch_norm: fold the norms into the convolutions before them.
    ignore: regular expressions for tensors of the file to leave out.
    architecture: its name in timm or torchvision, where nothing beside the
      file says more than shapes do.
    assume: take what nothing says as it usually is.
  """

  path: str
  fold_batch_norm: bool = False
  ignore: tuple[str, ...] = ()
  architecture: str | None = None
  assume: bool = False

  def __post_init__(self):
    if not self.path:
      raise ValueError('config.checkpoint.path is not given; it is a file.')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Which network; the section `config.model`.

  Attributes:
    name: a key of `KINDS`.
    variant: a published size of it, or None.
    options: fields of the module, which go before the variant's.
  """

  name: str
  variant: str | None
  options: Mapping[str, Any]

  @classmethod
  def of(cls, section: Mapping[str, Any]) -> ModelConfig:
    """Reads `config.model`.

    Raises:
      ValueError: an unknown name, variant or field.
    """
    options = dict(section)
    name = options.pop('name', 'vit')
    variant = options.pop('variant', None)
    if name not in KINDS:
      raise ValueError(
        f'config.model.name={name!r}; it is one of {", ".join(KINDS)}.'
      )
    kind = KINDS[name]
    if variant is not None and variant not in kind.variants:
      raise ValueError(
        f'config.model.variant={variant!r}; {name} has '
        f'{", ".join(kind.variants)}.'
      )
    fields = {field.name for field in dataclasses.fields(kind.module)}
    for key in options:
      if key not in fields - set(_OWN):
        raise ValueError(f'config.model has the unknown key {key!r}')
    return cls(name, variant, options)

  @property
  def _published(self) -> Mapping[str, Any]:
    if self.variant is None:
      return {}
    return KINDS[self.name].variants[self.variant]

  def build(self, num_classes: int) -> nn.Module:
    """The module, of which no parameter is there yet."""
    fields = {**self._published, **self.options}
    return KINDS[self.name].module(num_classes=num_classes, **fields)

  def restore(
    self, checkpoint: CheckpointConfig, image_size: int
  ) -> tuple[nn.Module, dict[str, Any]]:
    """The module that a checkpoint's shapes describe, and its variables.

    Raises:
      ValueError: the checkpoint holds another network than the config says,
        or is not read (see `load_checkpoint`).
    """
    model, variables, _ = load_checkpoint(
      checkpoint.path,
      ignore=checkpoint.ignore,
      architecture=checkpoint.architecture,
      assume=checkpoint.assume,
      image_size=image_size if self.name == 'vit' else None,
      **self.options,
    )
    if not isinstance(model, KINDS[self.name].module):
      raise ValueError(
        f'{checkpoint.path} holds a {type(model).__name__}; '
        f'config.model.name is {self.name!r}.'
      )
    for key, wanted in self._published.items():
      found = getattr(model, key)
      if key not in self.options and found != wanted:
        raise ValueError(
          f'{checkpoint.path} holds a {self.name} with {key}={found}; '
          f'{self.variant} has {wanted}.'
        )
    if checkpoint.fold_batch_norm:
      variables = fold_batch_norm(variables)
      model = model.clone(batch_norm=False)
    return model, variables
