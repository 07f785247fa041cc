"""What `compress` did: what each stage took, and what was compared."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses

import numpy as np

from utilized_rank.host.progress import working
from utilized_rank.host.usage import measured
from utilized_rank.report.choice import Contender
from utilized_rank.report.choice import Stage


@dataclasses.dataclass
class Outcome:
  """Divergences before and after a stage, which fills them in if it can."""

  before: float | None = None
  after: float | None = None


class Journal:
  """Stages as they end, with what they took; what was compared with what.

  Attributes:
    stages: each without the time of those inside it, in the order of their
      ends.
    contenders: as `compared` was told.

  >>> journal = Journal()
  >>> with journal.stage('all'):
  ...   with journal.stage('ranks') as at:
  ...     at.before, at.after = 0.5, 0.25
  >>> [(stage.name, stage.after) for stage in journal.stages]
  [('ranks', 0.25), ('all', None)]
  """

  def __init__(self, progress: bool = False):
    """Of nothing yet.

    Args:
      progress: whether stages are said while they last.
    """
    self.stages: list[Stage] = []
    self.contenders: list[Contender] = []
    self._progress = progress
    # Of each open stage, its name, and the seconds, and those of all threads,
    # that stages inside it took.
    self._open: list[tuple[str, np.ndarray]] = []

  @contextlib.contextmanager
  def stage(self, name: str) -> Iterator[Outcome]:
    """A stage: what the body does.

    Args:
      name: what it is called, in a word or two. Before it stand the names of
        the stages that it is in, but for the outermost.
    """
    name, inside = self._within(name), np.zeros(2)
    self._open.append((name, inside))
    outcome = Outcome()
    said = working(name) if self._progress else contextlib.nullcontext()
    try:
      with said, measured() as usage:
        yield outcome
    finally:
      self._open.pop()
    took = np.array([usage.seconds, usage.cpu_seconds])
    if self._open:
      _, outer = self._open[-1]
      outer += took
    own = np.maximum(took - inside, 0)
    self.stages.append(
      Stage(
        name,
        float(own[0]),
        float(own[1]),
        usage.peak_bytes,
        outcome.before,
        outcome.after,
      )
    )

  def compared(
    self,
    name: str,
    best: np.ndarray | None,
    found: np.ndarray,
    chosen: bool,
    judged: str = '',
  ) -> None:
    """Writes down that a tree was compared with the best one before it.

    Args:
      name: what the tree is.
      best: divergences of the best one, of every example; None if it is first.
      found: its own.
      chosen: whether it is the best now.
      judged: on which examples, if not those that ranks are tried on.
    """
    gain = error = None
    if best is not None:
      fall = best - found
      gain, error = float(fall.mean()), float(fall.std() / len(fall) ** 0.5)
    self.contenders.append(
      Contender(
        self._within(name), float(found.mean()), gain, error, chosen, judged
      )
    )

  def _within(self, name: str) -> str:
    outer = self._open[-1][0] if len(self._open) > 1 else ''
    return f'{outer}: {name}' if outer else name
