"""Collection by several real processes, on CPU devices joined by gloo."""

import os
from pathlib import Path
import pickle
import signal
import socket
import subprocess
import sys
import time

import jax
import job
import numpy as np
import pytest

from utilized_rank.host import processes

HERE = Path(__file__).parents[1] / 'support'
# Seconds for a job of small arrays; starting JAX is most of them.
LIMIT = 240


def start(case, folder, count=2, distributed=True):
  """Starts the processes of one job."""
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1] if distributed else 0
  return [
    subprocess.Popen(
      [sys.executable, HERE / 'job.py', *map(str, [i, count, port]), case]
      + [str(folder)],
      cwd=HERE.parent,
      # One compiler: sums are compared to the bit.
      env={
        'PYTHONPATH': str(HERE.parent),
        'PATH': '',
        'XLA_FLAGS': os.environ.get('XLA_FLAGS', ''),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(count)
  ]


def finish(job_processes):
  """What they printed; none outlives the limit."""
  try:
    return [p.communicate(timeout=LIMIT)[0] for p in job_processes]
  finally:
    for p in job_processes:
      p.kill()


def results(case, folder):
  for _ in range(3):
    jobs = start(case, folder)
    printed = finish(jobs)
    if any('in use' in text.lower() for text in printed):
      continue  # another program took the port in between
    assert [p.returncode for p in jobs] == [0, 0], '\n'.join(printed)
    return [pickle.loads((folder / f'{i}.pkl').read_bytes()) for i in range(2)]
  raise AssertionError('no free port in three attempts')


def assert_equal(got, want, tolerance=1e-6):
  assert list(got) == list(want)
  for path in want:
    np.testing.assert_array_equal(got[path][0], want[path][0])
    for a, b in zip(got[path][1:], want[path][1:], strict=True):
      if b is None:
        assert a is None
        continue
      scale = np.abs(b).max()
      np.testing.assert_allclose(a, b, atol=tolerance * scale, rtol=0)


def test_processes_give_the_moments_of_one(tmp_path):
  """Unequal numbers of batches, uneven batches, pmap, overflow, refusals."""
  found = results('local', tmp_path)
  every = [b for i in range(2) for b in job.batches(i)]
  want = job.numbers(job.collect(every, loss=job.loss))
  squared = job.numbers(job.collect(every, loss=job.loss, fisher_rows=True))
  for out in found:
    assert_equal(out['moments'], want)
    assert_equal(out['overflow'], want)
    assert_equal(out['compensated'], squared)
    assert out['compensated']['first'][2].dtype == np.float64
    assert out['overflow']['first'][0].dtype == np.int64
    firsts = [job.batches(i)[0] for i in range(2)]
    assert_equal(out['pmap'], job.numbers(job.collect(firsts)))
    assert_equal(out['passes'], want)
    assert 'splits the kernels differently' in out['other limits']
    assert 'none in processes [0]' in out['empty']
    assert 'processes collect different kernels' in out['different']
  alone = job.numbers(job.collect(job.batches(1)))
  assert_equal(found[1]['alone'], alone)


def test_parameters_spread_over_processes(tmp_path):
  """Joint steps, and refusals in place of waiting for ever."""
  found = results('joint', tmp_path)
  every = [b for i in range(2) for b in job.EVEN[i]]
  want = job.numbers(job.collect(every, loss=job.loss))
  for out in found:
    assert_equal(out['moments'], want)
    assert_equal(out['unsaid'], want)
    assert 'have [0, 16] examples in batch 1' in out['uneven']
    assert 'checkpoint_dir cannot be used' in out['folder']
    assert "accumulate='compensated' cannot be used" in out['low']
    assert 'pass its mesh as mesh=' in out['elsewhere']


@pytest.mark.slow
def test_kernels_shared_out_give_the_tree_of_one(tmp_path):
  """Bit for bit, by every method; each makes a share; none waits for ever."""
  found = results('factorized', tmp_path)
  every = sorted([*'qkv', 'up', 'down', *(f'stack[{i}]' for i in range(3))])
  joint = sorted(set(every) - set('kv'))
  for out in found:
    assert all(out['equal'].values()), out['equal']
    for name, leaves in out['trees'].items():
      for a, b in zip(leaves, found[0]['trees'][name], strict=True):
        np.testing.assert_array_equal(a, b)
  assert len(found[0]['made']) == 8
  for name in found[0]['made']:
    shares = [out['made'][name] for out in found]
    assert all(shares), name
    whole = {'decompose': sorted([*joint, 'q'])}  # q alone, and with k and v
    own = joint if 'shared' in name or 'from' in name else every
    assert sorted(shares[0] + shares[1]) == whole.get(name, own), name
  one, other = (out['refused'] for out in found)
  told = 'processes [1] call {} with other arguments than process 0: '
  for name, (caller, at_one, at_other) in {
    'method': ('factorize', "method (here 'output')", "method (here 'weight')"),
    'misspelt': (
      'factorize',
      "method (here 'output'), gauge (here None)",
      "method (here 'sum'), gauge (here 'none')",
    ),
    'ranks': ('factorize', "ranks['up']", "ranks['up']"),
    'fewer': ('factorize', 'ranks (6 here)', 'ranks (1 here)'),
    'params': ('factorize', "params['up']", "params['up']"),
    'moments': (
      'factorize',
      *[
        "moments['down'], moments['k'], moments['q'], moments['stack'] and 2 "
        'more'
      ]
      * 2,
    ),
    'families': ('factorize', 'families (here None)', 'families (6 here)'),
    'decompose': ('decompose', "only['q']", "only['k']"),
  }.items():
    start = told.format(caller)
    assert one[name].startswith(start + at_one + ';'), one[name]
    assert other[name].startswith(start + at_other + ';'), other[name]
  for out in found:
    assert out['refused']['all wrong'].startswith("unknown method 'sum'")
    text = out['failed']['FloatingPointError']
    assert 'in process 1 of 2: the rank-' in text
    text = out['failed']['RuntimeError']
    assert 'in process 1 of 2: AttributeError(' in text
    assert out['bytes']
    # 1,052 bytes of process 1, each process having half of 100 in a round: 22
    # rounds are enough, and all are as large.
    assert out['rounds'] == [48] * 22


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again(tmp_path):
  """SIGKILL three times, at random moments of a run of two seconds."""
  rng = np.random.default_rng(0)
  for _ in range(3):
    (one,) = start('interrupted', tmp_path, 1, distributed=False)
    assert one.stdout.readline() == 'ready\n'
    time.sleep(rng.uniform(1, 3))
    one.kill()
    finish([one])
    if (tmp_path / '0.pkl').exists():
      break
  (one,) = jobs = start('interrupted', tmp_path, 1, distributed=False)
  printed = finish(jobs)
  assert one.returncode == 0, printed
  got = pickle.loads((tmp_path / '0.pkl').read_bytes())
  want = job.numbers(job.collect(job.Stream(), mesh=two()))
  for path in want:
    for a, b in zip(got[path], want[path], strict=True):
      np.testing.assert_array_equal(a, b)
  assert not (tmp_path / 'sums').exists()


@pytest.mark.slow
def test_a_job_of_two_killed_and_started_again(tmp_path):
  """SIGKILL, one process a little before the other."""
  jobs = start('interrupted', tmp_path)
  folders = [tmp_path / 'sums' / f'process-{i}-of-2' for i in range(2)]
  deadline = time.monotonic() + LIMIT
  saved = lambda: all(
    any(one.stem.isdigit() for one in folder.glob('*')) for folder in folders
  )
  while not saved() and time.monotonic() < deadline:
    assert all(one.poll() is None for one in jobs), finish(jobs)
    time.sleep(0.05)
  for one in reversed(jobs):
    one.kill()
    time.sleep(0.3)
  finish(jobs)
  assert saved()
  assert not list(tmp_path.glob('*.pkl'))
  found = results('interrupted', tmp_path)
  every = [batch for _ in range(2) for batch in job.Stream()]
  want = job.numbers(job.collect(every))
  for out in found:
    assert_equal(out, want)
  assert not (tmp_path / 'sums').exists()


@pytest.mark.slow
def test_passes_killed_and_started_again(tmp_path):
  """SIGKILL when one process has the first pass on disk."""
  case = 'interrupted in passes'
  jobs = start(case, tmp_path)
  deadline = time.monotonic() + LIMIT
  one = tmp_path / 'sums' / 'pass-0-of-2.process-0-of-2.npz'
  while not one.exists() and time.monotonic() < deadline:
    assert all(p.poll() is None for p in jobs), finish(jobs)
    time.sleep(0.01)
  for p in reversed(jobs):
    p.kill()
  finish(jobs)
  assert one.exists() and not list(tmp_path.glob('*.pkl'))
  # One that has not written has both go through the pass again.
  (tmp_path / 'sums' / 'pass-0-of-2.process-1-of-2.npz').unlink(missing_ok=True)
  found = results(case, tmp_path)
  every = [batch for _ in range(2) for batch in job.Stream()]
  want = job.numbers(job.collect(every, loss=job.loss))
  for out in found:
    assert_equal(out, want)
  assert not (tmp_path / 'sums').exists()


def two():
  return jax.sharding.Mesh(np.array(jax.devices()[:2]), ('x',))


def test_preemption_saves_and_stops(tmp_path):
  """SIGTERM, as Slurm and GCE send it; then the job is started again."""
  (one,) = start('interrupted', tmp_path, 1)
  assert one.stdout.readline()
  deadline = time.monotonic() + LIMIT
  while not (tmp_path / 'sums').exists() and time.monotonic() < deadline:
    time.sleep(0.1)
  one.send_signal(signal.SIGTERM)
  (printed,) = finish([one])
  assert one.returncode == 1
  assert 'Preempted: the job is being preempted: the sums of' in printed
  (one,) = start('interrupted', tmp_path, 1)
  (printed,) = finish([one])
  assert one.returncode == 0, printed
  got = pickle.loads((tmp_path / '0.pkl').read_bytes())
  want = job.numbers(job.collect(job.Stream(), mesh=two()))
  for path in want:
    np.testing.assert_array_equal(got[path][2], want[path][2])


def test_numbers_survive_the_exchange():
  numbers = [0, 1, 2**24, 2**31, 2**53 + 1, 2**62]
  assert processes.exchange(numbers).tolist() == [numbers]
