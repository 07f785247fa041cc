"""What is left of a run that is killed, stopped, damaged, or has no room.

  python -m benchmarks.reliability --workdir=DIR \\
    --out benchmarks/results/reliability.json

The smallest run of the launcher (digits, one block of width 16: train, collect,
measure, factorize, finetune, evaluate, report) is done once undisturbed. Then:

* again and again in one folder, each start killed by SIGKILL at a random
  moment, uniform over the CPU seconds of the undisturbed run (on a clock, other
  work on the machine would choose the moment); a start that reaches the end
  ends a series, whose folder is compared and removed;
* the same with SIGTERM, after which the run should say how to go on;
* a second run in a folder that is in use; a folder that is read-only; a disk
  that gets full, is made larger and gone on on (small tmpfs, which only root
  may mount);
* one random bit is flipped in a file of each kind that stages leave, and the
  run goes on with a stage that reads it.

Two ends are equal if their reports agree in every number but times, and their
arrays bit for bit. All runs share a cache of compiled programs, and XLA does
not optimize: a start takes 16 CPU seconds, of which 3 are imports. `--workdir`
keeps what was found: the same command goes on where it stopped, and more
`--kills`, `--terms` or `--flips` add to it. Needs Linux. Takes 40 CPU minutes.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
import contextlib
import json
import pathlib
import shutil
import signal
import subprocess
from typing import Any

import numpy as np

from benchmarks.shared import arguments
from benchmarks.shared import damage
from benchmarks.shared import launches
from benchmarks.shared import record
from utilized_rank.host import files

# Of the size of a finished run's folder: fine-tuning does not fit.
ROOM = 0.5


class Trial:
  """The folder of all runs, and what was found in it.

  Attributes:
    folder: of everything.
    found: lists of events by part; kept in the folder at every change.
  """

  def __init__(self, folder: pathlib.Path, seed: int):
    folder.mkdir(parents=True, exist_ok=True)
    self.folder, self._seed = folder.absolute(), seed
    self._file = self.folder / f'found_{seed}.json'
    self.found: dict[str, list[Any]] = {}
    if self._file.exists():
      self.found = json.loads(self._file.read_text())
    self.finished = self.folder / 'undisturbed'

  def rng(self, part: str, index: int) -> np.random.Generator:
    """Of an event alone, so that events can be added."""
    return np.random.default_rng([self._seed, index, *part.encode()])

  def add(self, part: str, event: dict[str, Any]) -> None:
    self.found.setdefault(part, []).append(event)
    files.write_text(self._file, json.dumps(self.found, indent=1))
    print(part, len(self.found[part]), json.dumps(event), flush=True)

  def start(self, workdir: pathlib.Path, name: str) -> launches.Launched:
    return launches.Launched(workdir, self.folder, name)

  # --- parts ---

  def undisturbed(self) -> float:
    """Finishes one run; CPU seconds of it, with everything compiled."""
    if 'undisturbed' not in self.found:
      # The first prepares data and compiles, the second counts.
      for _ in range(2):
        shutil.rmtree(self.finished, ignore_errors=True)
        ended = self.start(self.finished, 'undisturbed').ended()
        if ended.code:
          raise RuntimeError(ended.err)
      self.add('undisturbed', {'cpu_seconds': round(ended.cpu_seconds, 1)})
    return self.found['undisturbed'][0]['cpu_seconds']

  def series(self, part: str, number: int, wanted: int) -> None:
    """Starts runs and sends them a signal until `wanted` were delivered."""
    seconds = self.undisturbed()
    workdir = self.folder / part
    while True:
      events = self.found.get(part, [])
      missing = wanted - sum(e['delivered'] for e in events)
      if missing <= 0 and (not events or events[-1]['over']):
        return  # the last series was brought to its end
      at = self.rng(part, len(events)).uniform()
      after = at * seconds if missing > 0 else None
      ended = self.start(workdir, part).ended(number, after)
      event: dict[str, Any] = {
        'at': round(at, 3) if ended.delivered else None,
        'delivered': ended.delivered,
        'stage': ended.stage,
        'code': ended.code,
        'temporary': launches.temporary(workdir),
        'faults': [],
        'over': ended.code == 0,
      }
      faults = event['faults']
      if launches.unreadable(workdir):
        faults.append('unreadable')
      if ended.code == 0:
        faults += self._differences(workdir)
      elif not ended.delivered:
        faults.append('failed')
        event['says'], event['over'] = self._said(ended), True
      elif number == signal.SIGTERM:
        event['says'] = self._said(ended).partition(' To go on, ')[0]
        if not _is_told(ended):
          faults.append('said nothing')
      if event['over']:
        shutil.rmtree(workdir, ignore_errors=True)
      self.add(part, event)

  def _differences(self, workdir: pathlib.Path) -> Iterator[str]:
    if launches.temporary(workdir):
      yield 'left over'
    if launches.numbers(workdir) != launches.numbers(self.finished):
      yield 'differs'

  def two_at_once(self) -> None:
    if 'two at once' in self.found:
      return
    workdir = self.folder / 'two'
    shutil.rmtree(workdir, ignore_errors=True)
    first = self.start(workdir, 'first')
    first.until_stage()
    refused = self.start(workdir, 'second').ended()
    first.ended(signal.SIGKILL, 0.0)
    self.add('two at once', self._refusal(refused, ' is in use by '))
    shutil.rmtree(workdir)

  def read_only(self) -> None:
    if 'read-only' in self.found:
      return
    with mounted(self.folder / 'small', 2**24) as disk:
      workdir = disk / 'run'
      shutil.copytree(self.finished, workdir)
      damage.forget(workdir, 'evaluate')
      before = contents(workdir)
      mount('-o', 'remount,ro', str(disk))
      ended = self.start(workdir, 'read_only').ended()
      event = self._refusal(ended, 'Read-only file system')
      event['changed'] = contents(workdir) != before
    self.add('read-only', event)

  def full(self) -> None:
    """A disk with room for a part of a run, then for all of it."""
    if 'full disk' in self.found:
      return
    size = sum(p.stat().st_blocks * 512 for p in self.finished.rglob('*'))
    with mounted(self.folder / 'small', int(ROOM * size)) as disk:
      workdir = disk / 'run'
      ended = self.start(workdir, 'full').ended()
      event: dict[str, Any] = {
        'room': ROOM,
        'stage': ended.stage,
        **self._refusal(ended, 'the disk is full'),
        'temporary': launches.temporary(workdir),
        'unreadable': launches.unreadable(workdir),
      }
      mount('-o', f'remount,size={2**24}', str(disk))
      again = self.start(workdir, 'enlarged').ended()
      event['goes_on'] = again.code == 0
      event['faults'] = (
        list(self._differences(workdir)) if again.code == 0 else ['failed']
      )
    self.add('full disk', event)

  def _said(self, ended: launches.Ended) -> str:
    return ended.last_line.replace(str(self.folder), 'DIR')

  def _refusal(self, ended: launches.Ended, words: str) -> dict[str, Any]:
    says = self._said(ended)
    one_line = ended.is_one_line and words in says
    return {'code': ended.code, 'one_line': one_line, 'says': says[:300]}

  def flips(self, wanted: int) -> None:
    config = launches.config(self.folder)
    for kind in damage.KINDS:
      done = [e for e in self.found.get('flips', []) if e['kind'] == kind]
      for index in range(len(done), wanted):
        rng, copy = self.rng(kind, index), self.folder / 'flipped'
        event = damage.flipped(kind, self.finished, copy, config, rng)
        self.add('flips', event)


def _is_told(ended: launches.Ended) -> bool:
  """Whether a run that SIGTERM ended says how to go on.

  Before its first stage and after its last it has nothing to say, and the
  signal ends it as it ends any process.
  """
  if ended.code == -signal.SIGTERM:
    return ended.stage in ('start', 'end')
  told = ' To go on, the same command again: ' in ended.last_line
  return ended.code == 1 and told and 'Traceback' not in ended.err


def mount(*words: str) -> None:
  subprocess.run(['mount', *words], check=True, capture_output=True)


@contextlib.contextmanager
def mounted(place: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
  """A tmpfs of so many bytes."""
  place.mkdir(exist_ok=True)
  mount('-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(place))
  try:
    yield place
  finally:
    subprocess.run(['umount', str(place)], check=True)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  paths = [p for p in folder.rglob('*') if p.is_file()]
  return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def can_mount(folder: pathlib.Path) -> bool:
  try:
    with mounted(folder / 'small', 2**16):
      return True
  except (OSError, subprocess.CalledProcessError):
    return False


# --- what is written down ---


def summary(found: dict[str, list[Any]]) -> dict[str, Any]:
  """Counts of what was found."""
  counted: dict[str, Any] = {}
  for part in ('kills', 'terms'):
    events = found.get(part, [])
    sent = [e for e in events if e['delivered']]
    counted[part] = {
      'delivered': len(sent),
      'by_stage': _counts(e['stage'] for e in sent),
      'by_exit_code': _counts(e['code'] for e in sent),
      'half_written': sum(bool(e['temporary']) for e in sent),
      'series_ended': sum(e['over'] for e in events),
      'faults': _counts(f for e in events for f in e['faults']),
    }
  flips = found.get('flips', [])
  counted['flips'] = {
    kind: _counts(e['outcome'] for e in flips if e['kind'] == kind)
    for kind in dict.fromkeys(e['kind'] for e in flips)
  }
  return counted


def _counts(values: Iterable[Any]) -> dict[str, int]:
  return dict(collections.Counter(str(v) for v in values).most_common())


def main():
  parser = arguments.parser(__doc__)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--terms', type=int, default=20)
  parser.add_argument('--flips', type=int, default=3, help='of each kind')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  trial = Trial(args.workdir, args.seed)
  launches.environment(trial.folder)
  disks = can_mount(trial.folder)
  for work in (
    trial.undisturbed,
    trial.two_at_once,
    *[trial.read_only, trial.full][: 2 * disks],
    lambda: trial.flips(args.flips),
    lambda: trial.series('kills', signal.SIGKILL, args.kills),
    lambda: trial.series('terms', signal.SIGTERM, args.terms),
  ):
    work()
    # After every part: the next ones take long.
    counted = summary(trial.found)
    record.write(
      args.out,
      'reliability',
      {
        'seed': args.seed,
        'disks': 'tmpfs' if disks else 'not tried: no tmpfs can be mounted',
        'summary': counted,
        'events': trial.found,
      },
    )
  print(json.dumps(counted, indent=1))


if __name__ == '__main__':
  main()
