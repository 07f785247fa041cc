"""Sections of a config, read into dataclasses."""

import dataclasses

import pytest

from utilized_rank.host import options


@dataclasses.dataclass(frozen=True)
class Train:
  """A field that has to be given, and one that need not."""

  steps: int
  rate: float = 0.1


def test_mappings_are_read_and_instances_kept():
  assert options.from_config(Train, {'steps': 3}, 'train') == Train(3, 0.1)
  made = Train(5)
  assert options.from_config(Train, made, 'train') is made


@pytest.mark.parametrize(
  'config, error, message',
  [
    (3, TypeError, 'train is a int; it must be a Train or a mapping'),
    ({}, ValueError, "train lacks the key 'steps'"),
    ({'step': 3}, ValueError, "unknown key 'step'; did you mean 'steps'"),
    ({'zzz': 3}, ValueError, "unknown key 'zzz'. It takes steps, rate"),
  ],
)
def test_what_is_no_section(config, error, message):
  with pytest.raises(error, match=message):
    options.from_config(Train, config, 'train')
