"""Disturbs a small run over and over; it must end with the same bits each time.

python tests/faults/faults.py --kills=100 --seed=0
python tests/faults/faults.py --outside=20 --seed=0

take 25 to 40 minutes each on two cores; test_faults.py beside it runs a short
version. It is not in the package, for no user of the trainer would run it.

Runs of the real command line are killed, signalled, stopped and continued, left
without room or the right to write, met by a second start, hung, read and
written on a disk that fails for a while, run in two processes of which any is
killed, and their newest checkpoint is damaged, up to eight times each; then
each may finish. Faults are dealt from a shuffled deck
that holds each kind. One is counted if it happened: a kill that came after the
end is none. It is recovered from if the next start goes on from the newest
checkpoint that is whole and names those it skips. Steps lost are those from the
last one saved or told of in metrics.jsonl to where the next start goes on; what
was done of an epoch since is not seen. The exit status is 1 if a run is lost,
for a start fails, or one differs in parameters, any array that a checkpoint
keeps, metrics or summary.

A full disk and a read-only directory are a tmpfs and its mount, which need
root: root ignores the modes of files. Elsewhere the size of files is limited.
"""

import argparse
import collections
import contextlib
import errno
import logging
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import conftest  # noqa: E402, F401, the environment of all tests
from support import disturbed  # noqa: E402
from support.damages import DAMAGES, HARMLESS  # noqa: E402

FAILING = ('-m', 'tests.faults.failing')
TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL


# A fault takes a run and disturbs it. It returns its row in the table, or None
# if there was nothing left to disturb; AssertionError is what must not be.


def _signal(number, moment, second=None):
  def fault(run):
    run.start()
    if not run.wait_for_moment(moment):
      return run.must_end()
    run.process.send_signal(signal.SIGSTOP)  # to see where it is
    time.sleep(0.005)
    where = run.where()
    for x in (number, signal.SIGCONT):
      run.process.send_signal(x)
    if second:
      time.sleep(0.001)
      run.process.send_signal(second)
    status = run.wait()
    if status == 0 or (run.workdir / 'summary.json').exists():
      return None  # it had done all
    if number == KILL:
      allowed = [-KILL]
    elif where == 'start':  # nothing to save yet
      allowed = [75, -number, 130, 1]
    else:
      allowed = [75, 128 + second] if second else [75]
    line = r'stopped by SIG\w+ after step (\d+) of \d+, which is saved: .*\n'
    stopped = re.fullmatch(line, run.error())
    new = where != 'start' or 'SIGTERM, with nothing new to' not in run.error()
    if status not in allowed or status == 75 and new and (
        not stopped or int(stopped[1]) != run.newest_whole()):
      run.fail(f'status {status} after {number.name}, {where}')
    return f'{number.name}{" and another" if second else ""}, {where}'
  return fault


def _stop(run):
  run.start()
  if not run.wait_for_moment(run.rng.choice(['compilation', 'steps', 'save'])):
    return run.must_end()
  run.process.send_signal(signal.SIGSTOP)
  time.sleep(run.rng.uniform(0.1, 1.5))
  run.process.send_signal(signal.SIGCONT)
  run.must_end()
  return 'SIGSTOP, then SIGCONT'


def _kill_in_cache(run):
  """Kills the process while it fills a cache of its own."""
  cache = run.base / f'cache-{time.time_ns()}'
  shutil.copytree(pathlib.Path(os.environ['XDG_CACHE_HOME'], 'flax_imdb/tfds'),
                  cache / 'flax_imdb/tfds')
  run.env['XDG_CACHE_HOME'] = str(cache)
  run.start()
  if not run.wait_for((cache / 'flax_imdb/ids').exists, 0.03):
    return run.must_end()
  run.process.kill()
  run.wait()
  return 'SIGKILL, ids being cached'


def _full_disk(run):
  ballast = run.base / 'ballast'
  with open(ballast, 'wb', buffering=0) as f:
    try:
      while True:
        f.write(bytes(1 << 12))
    except OSError:
      f.truncate(max(0, f.tell() - int(10 ** run.rng.uniform(3, 5.8))))
  run.start()
  row = run.must_refuse('No space left on device', 'full disk', 69)
  ballast.unlink()
  return row


def _file_limit(run):
  run.start(file_limit=int(10 ** run.rng.uniform(3.7, 4.8)))
  return run.must_refuse('File too large', 'file-size limit')


def _read_only(run):
  assert disturbed.mount('-o', 'remount,ro', str(run.base))
  run.start()
  row = run.must_refuse('Read-only file system', 'read-only run directory')
  assert disturbed.mount('-o', 'remount,rw', str(run.base))
  return row


def _read_only_within(run):
  """Of checkpoints/ alone, for in the run directory a file is being written."""
  checkpoints = str(run.workdir / 'checkpoints')
  run.start()
  if not run.wait_for_moment('compilation'):
    return run.must_end()
  assert disturbed.mount('--bind', checkpoints, checkpoints)
  while not disturbed.mount('-o', 'remount,bind,ro', checkpoints):
    pass  # a save is under way
  row = run.must_refuse('Read-only file system', 'checkpoints/ made read-only')
  subprocess.run(['umount', checkpoints], check=True)
  return row


def _failing_disk(name):
  """A disk that fails from some moment on, and is well at the next start."""
  def fault(run):
    number = getattr(errno, name)
    run.start(run.command(
        *FAILING, name, str(int(10 ** run.rng.uniform(0, 2.6)))))
    return run.must_refuse(os.strerror(number), f'disk fails with {name}', 69)
  return fault


def _second_start(run):
  """Another start while the first one trains; the first is held meanwhile."""
  run.start()
  if not run.wait_for_moment(run.rng.choice(['compilation', 'steps', 'save'])):
    return run.must_end()
  run.process.send_signal(signal.SIGSTOP)
  second = subprocess.run(run.command(), cwd=disturbed.ROOT, env=run.env,
                          capture_output=True, text=True, check=False)
  ended = run.process.poll() is not None  # before it could be held
  run.process.send_signal(signal.SIGCONT)
  run.must_end()
  if ended:
    return None
  if second.returncode != 69 or not re.fullmatch(
      rf'error: .* is in use by process {run.process.pid} on .*\n',
      second.stderr):
    run.fail(f'the second ended with {second.returncode}: {second.stderr}')
  return 'second start'


def _two_at_once(run):
  """One trains, the other is refused or goes on once the first is done."""
  run.start(others=[run.command()])
  status, (other,) = run.wait(behind_another=True), run.others
  _, error = other.communicate(timeout=300)
  if sorted([status, other.returncode]) not in ([0, 0], [0, 69]):
    run.fail(f'the other ended with {other.returncode}: {error.decode()}')
  return 'two starts at once'


def _hang(count):
  """The main thread of the only process, or of one of two, stands still."""
  def fault(run):
    which, number = run.rng.integers(count), int(10 ** run.rng.uniform(0, 2.2))
    programs = [run.command(*FAILING, 'hang', str(number * (i == which)))
                for i in range(count)]
    if count > 1:
      with socket.create_server(('127.0.0.1', 0)) as server:
        address = f'127.0.0.1:{server.getsockname()[1]}'
      programs = [
          [*program, f'--coordinator_address={address}',
           f'--num_processes={count}', f'--process_id={i}']
          for i, program in enumerate(programs)]
    devices = run.env['JAX_NUM_CPU_DEVICES']
    run.env['JAX_NUM_CPU_DEVICES'] = str(int(devices) // count)
    run.start(programs[0], others=programs[1:])
    run.env['JAX_NUM_CPU_DEVICES'] = devices
    status, error = run.wait(), run.error()
    for other in run.others:
      error += other.communicate(timeout=300)[1].decode()
    statuses = [status, *(other.returncode for other in run.others)]
    if not any(statuses):
      return None  # it did not come to that
    who = f'process {which} of {count}' if count > 1 else 'the run'
    if {*statuses} != {69} or f'error: {who} is stuck in phase ' not in error:
      run.fail(f'{statuses} after the hang of {who}: {error[-2000:]}')
    return f'main thread hangs, {"one of two" if count > 1 else "alone"}'
  return fault


def _kill_of_two(run):
  """Random kills of two processes, which are started again until they end.

  As a launcher does: after anything but a mistake, also where the other process
  found gloo too slow on a busy machine and so failed.
  """
  kills, left = 0, int(run.rng.integers(1, 4))
  for _ in range(10):
    run.start([sys.executable, 'launch/local.py', '--processes=2',
               '--devices=1', '--', *run.command()[3:]])
    if left and run.wait_for_moment(run.rng.choice(
        ['start', 'compilation', 'steps', 'save', 'evaluation'])):
      left -= 1
      children = pathlib.Path(f'/proc/{run.process.pid}/task/'
                              f'{run.process.pid}/children').read_text().split()
      for child in run.rng.permutation(children)[:run.rng.choice([1, 1, 2])]:
        with contextlib.suppress(ProcessLookupError):  # it ended just now
          os.kill(int(child), KILL)
          kills += 1
    status = run.wait()
    if status == 0:
      return 'kills of two processes, started again' if kills else None
    if status == 2:
      break
  return run.fail(f'status {status}')


def _damage(name):
  def fault(run):
    # A run of which no checkpoint is whole stops, as tests/hostile has it.
    def one_would_be_left():
      return len({*run.steps()} - run.damaged) > 1
    if not one_would_be_left():
      run.start()
      run.wait_for(one_would_be_left, 0)
      run.process.kill()
      run.wait()
    step = run.steps()[-1]
    if step in run.damaged or not one_would_be_left():
      return None
    try:
      DAMAGES[name](run.workdir / 'checkpoints' / str(step))
    except FileNotFoundError:  # a signal saved it, without a score
      return None
    if name not in HARMLESS:
      run.damaged.add(step)
    return 'newest checkpoint damaged'
  return fault


# What comes from outside of the process: 20 of each kind are asked for.
OUTSIDE = (
    _failing_disk('EIO'), _failing_disk('ENOSPC'), _second_start, _two_at_once,
    _hang(1), _hang(2), _kill_of_two)


class Faults:
  """Deals faults, plays runs and keeps the table.

  Attributes:
    deck: the faults that are still to happen; `deal` fills it.
  """

  def __init__(self, seed, folder):
    self.rng = np.random.default_rng(seed)
    self._folder = pathlib.Path(folder)
    self.can_mount = disturbed.can_mount(folder)
    self.deck, self._damages, self._runs = [], [], 0
    # Row: tried, recovered, lost, differing; and the steps lost each time.
    self.table = collections.defaultdict(lambda: [0, 0, 0, 0])
    self._steps_lost = collections.defaultdict(list)
    self._undisturbed = disturbed.Run(
        self._folder / 'undisturbed', self.rng, None, can_mount=False)
    self._undisturbed.start()
    self._undisturbed.must_end()

  def deal(self, short=False):
    """Shuffles each kind of fault into the deck; `short`: most only once."""
    if len(self._damages) < 2:
      self._damages = self._shuffled(list(DAMAGES))
    cards = [
        *(_signal(KILL, x) for x in (
            'compilation', 'steps', 'save', 'save', 'evaluation')),
        _signal(TERM, 'compilation'), _signal(TERM, 'evaluation'),
        _signal(INT, 'save'), _signal(INT, 'steps', TERM), _stop,
        _kill_in_cache, _file_limit,
        _damage(self._damages.pop()), _damage(self._damages.pop()), *OUTSIDE]
    if self.can_mount:
      cards += [_full_disk, _read_only, _read_only_within]
    if not short:
      cards += [
          _signal(KILL, 'start'), *[_signal(KILL, 'save')] * 3,
          _signal(INT, 'start'), _signal(INT, 'compilation'),
          _signal(TERM, 'steps'), _signal(TERM, 'save'),
          _signal(INT, 'evaluation'), _signal(TERM, 'save', INT), _file_limit]
      if self.can_mount:
        cards.append(_full_disk)
    self.deck = self._shuffled(cards)

  def deal_outside(self, each):
    """Shuffles so many of each kind of `OUTSIDE` into the deck."""
    pairs = [(_failing_disk('EIO'), _failing_disk('ESTALE'),
              _failing_disk('ENOSPC')), (_second_start, _two_at_once),
             (_hang(1), _hang(2)), (_kill_of_two,)]
    self.deck = self._shuffled([
        kind[i % len(kind)] for kind in pairs for i in range(each)])

  def _shuffled(self, cards):
    return [cards[i] for i in self.rng.permutation(len(cards))]

  def play(self, most):
    """Disturbs a run until it ends, up to `most` times, and compares it."""
    self._runs += 1
    run = disturbed.Run(self._folder / f'run-{self._runs}', self.rng,
                        self._undisturbed.steps()[-1], self.can_mount)
    pending, missed = [], []
    try:
      while self.deck and most and run.status != 0:
        fault, most, row = self.deck.pop(), most - 1, 'what comes next'
        row = fault(run)
        self._settle(run, pending)
        if row:
          pending.append(row)
          self.table[row][0] += 1
        else:
          missed.append(fault)
      if run.status != 0:
        run.start()
        run.must_end()
      self._settle(run, pending)
      for row in pending:  # of a process that went on
        self.table[row][1] += 1
      difference = run.difference(self._undisturbed)
      if difference:
        print(f'run {self._runs}, last {row}: {difference}')
        self.table[row][3] += 1
    except (AssertionError, subprocess.TimeoutExpired) as e:
      print(f'run {self._runs}, {pending}, {row}: {e}')
      self.table[row][2] += 1
    finally:
      run.close()
    self.deck = missed + self.deck

  def _settle(self, run, pending):
    """Counts the faults that the last start has recovered from."""
    if run.lost is not None and pending:
      for row in pending:
        self.table[row][1] += 1
      self._steps_lost[pending[-1]].append(run.lost)
      pending.clear()
    run.lost = None

  def total(self, column):
    return sum(counts[column] for counts in self.table.values())

  def kills(self):
    return sum(counts[0] for row, counts in self.table.items()
               if row.startswith('SIGKILL'))

  def text(self):
    """The table, in Markdown."""
    lines = ['| fault | tried | recovered | runs lost | differing | '
             'steps lost: mean, max |', '|---|---|---|---|---|---|']
    everything = [self.total(column) for column in range(4)]
    self._steps_lost['all'] = sum(self._steps_lost.values(), [])
    for row, counts in [*sorted(self.table.items()), ('all', everything)]:
      lost = self._steps_lost[row] or [0]
      lines.append(f'| {row} | ' + ' | '.join(map(str, counts)) + ' | '
                   f'{np.mean(lost):.1f}, {max(lost)} |')
    return '\n'.join(lines)


def main(argv):
  parser = argparse.ArgumentParser()
  parser.add_argument('--kills', type=int, default=100)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
      '--outside', type=int, default=0, metavar='N',
      help='instead: N times a disk that fails, two starts, a main thread that '
      'hangs, and kills of two processes that are started again')
  args = parser.parse_args(argv)
  logging.getLogger('absl').setLevel(logging.ERROR)  # orbax, of its options
  start = time.time()
  with tempfile.TemporaryDirectory(prefix='faults_') as folder:
    faults = Faults(args.seed, folder)
    if args.outside:
      faults.deal_outside(args.outside)
    while faults.deck if args.outside else faults.kills() < args.kills:
      if not faults.deck:
        faults.deal()
      faults.play(most=int(faults.rng.integers(1, 9)))
      print(f'{faults.kills()} kills, {faults.total(0)} faults in '
            f'{time.time() - start:.0f} s', flush=True)
  shutil.rmtree(os.environ['XDG_CACHE_HOME'])  # of conftest
  print(faults.text())
  if not faults.can_mount:
    print('nothing can be mounted here: no full disk, no read-only directory')
  return int(faults.total(2) + faults.total(3) > 0)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
