"""The command line in a process of its own that a fault befalls.

python tests/faults/failing.py FAULT NUMBER ARGS...

FAULT is EIO, ESTALE or ENOSPC: from the NUMBERth time on that Python opens,
makes, lists, moves or removes something in the run directory, or TensorStore
opens an array, it fails so. Or it is `hang`: before the main thread says for
the NUMBERth time that it is alive, it stands still for good; 0 is never. The
watch then waits for seconds where it would for minutes.
"""

import errno
import itertools
import os
import sys
import time

import tensorstore

from flax_imdb import main
from flax_imdb.cluster import processes, watchdog

_PATHS = {'open', 'os.rename', 'os.mkdir', 'os.listdir', 'os.scandir',
          'os.remove', 'os.rmdir'}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_STILL_SECONDS = 15.0


def fail(name, first, workdir):
  """Lets the disk fail; reading does not, where it is full."""
  number, times = getattr(errno, name), itertools.count(1)

  def meet(path, writes):
    if not isinstance(path, (str, os.PathLike)) or not (
        os.fspath(path).startswith(workdir)):
      return None
    if (writes or number != errno.ENOSPC) and next(times) >= first:
      return OSError(number, os.strerror(number))
    return None

  def hook(event, args):
    if event in _PATHS:
      writes = event in ('os.rename', 'os.mkdir') or (
          event == 'open' and bool(args[2] & _WRITES))
      if error := meet(args[0], writes):
        raise error
  sys.addaudithook(hook)

  usual = tensorstore.open
  def open_(spec, *args, **kwargs):
    if error := meet(workdir, kwargs.get('create', False)):
      raise ValueError(f'UNKNOWN: {error} [os_error_code=\'{number}\']')
    return usual(spec, *args, **kwargs)
  tensorstore.open = open_


def hang(number):
  """Lets the main thread stand still, and the watch see it soon."""
  watchdog.LEAST = dict.fromkeys(watchdog.LEAST, _STILL_SECONDS)
  watchdog.LEAST_ELSEWHERE = watchdog.FIRST = _STILL_SECONDS
  usual, times = processes.report_alive, itertools.count(1)

  def report_alive(*args, **kwargs):
    if next(times) == number:
      time.sleep(10_000)
    usual(*args, **kwargs)
  processes.report_alive = report_alive


if __name__ == '__main__':
  fault, number, *argv = sys.argv[1:]
  if fault == 'hang':
    hang(int(number))
  else:
    workdir, = (word.removeprefix('--workdir=') for word in argv
                if word.startswith('--workdir='))
    fail(fault, int(number), workdir)
  sys.exit(main.main(argv))
