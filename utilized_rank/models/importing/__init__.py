"""Published checkpoints as models and variables of this package."""

from utilized_rank.models.importing.load import (
  load_checkpoint as load_checkpoint,
)
from utilized_rank.models.importing.open_checkpoint import Imported as Imported
from utilized_rank.models.importing.open_checkpoint import (
  UnsaidError as UnsaidError,
)
