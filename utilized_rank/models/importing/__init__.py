"""Published checkpoints as models and variables of this package."""

from utilized_rank.models.importing.load import Imported as Imported
from utilized_rank.models.importing.load import UnsaidError as UnsaidError
from utilized_rank.models.importing.load import (
  load_checkpoint as load_checkpoint,
)
