"""Collection by several real processes, on CPU devices joined by gloo."""

import pathlib
import pickle
import socket
import subprocess
import sys

import job
import numpy as np

from utilized_rank import processes

HERE = pathlib.Path(__file__).parent
# Seconds for a job of small arrays; starting JAX is most of them.
LIMIT = 240


def start(case, folder, count=2):
  """Starts the processes of one job."""
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  return [
    subprocess.Popen(
      [sys.executable, HERE / 'job.py', *map(str, [i, count, port]), case]
      + [str(folder)],
      cwd=HERE.parent,
      env={'PYTHONPATH': str(HERE.parent), 'PATH': ''},
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
  for out in found:
    assert_equal(out['moments'], want)
    assert_equal(out['overflow'], want)
    assert out['overflow']['first'][0].dtype == np.int64
    firsts = [job.batches(i)[0] for i in range(2)]
    assert_equal(out['pmap'], job.numbers(job.collect(firsts)))
    assert 'none in processes [0]' in out['empty']
    assert 'processes collect different kernels' in out['different']
  alone = job.numbers(job.collect(job.batches(1)))
  assert_equal(found[1]['alone'], alone)


def test_numbers_survive_the_exchange():
  numbers = [0, 1, 2**24, 2**31, 2**53 + 1, 2**62]
  assert processes.exchange(numbers).tolist() == [numbers]
