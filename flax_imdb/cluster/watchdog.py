"""Notices that a process is lost or stuck, and ends this one.

What jax has is not enough: in a collective with a process that is stopped all
others wait for ever, and when process 0 dies the others abort without a word.
A lone process, whose main thread may stand still as well, judges itself.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from typing import Any, NamedTuple, NoReturn

from flax_imdb.errors import TransientError

# A process that has not been heard of for so long is lost, in seconds; after
# an error, which is then probably of its making, for only so long.
SILENT = 20.0
SILENT_AFTER_ERROR = 5.0
# A main thread that has stood still in a phase for so many times as long as the
# phase has ever taken in this run is stuck, but not before so many seconds. A
# file server may need minutes to come back; nobody knows yet how long what is
# done for the first time takes, nor any compilation: there the processor's time
# is a sign of life, too.
TIMES = 10
LEAST = {'step': 60.0, 'wait': 60.0, 'evaluate': 60.0}
LEAST_ELSEWHERE = 300.0
FIRST = 900.0
_BEAT = 1.0
# The share of a processor that is work: what waits in gloo or for the store of
# jax takes up to a hundredth, and none in the main thread.
_WORK = 0.05


class Beat(NamedTuple):
  """What each process says of itself each second."""
  number: int
  turns: int  # how often the main thread has come to a place that all come to
  life: int  # grows while it works on something that may take any time
  phase: str
  limit: float  # seconds after which it is stuck


class Watchdog:
  """Beats each second in jax' key-value store, and listens for the others."""

  def __init__(self, index: int, count: int):
    self.index, self.count = index, count
    self.client: Any = None
    self._lock = threading.Lock()
    self._stopped = threading.Event()
    self._phase, self._since = 'start', time.monotonic()
    self._longest: dict[str, float] = {}  # seconds of each phase
    self._step = self._turns = self._life = self._number = 0
    self._work = _processor_seconds()
    self._silent_after = SILENT
    self._aborted = 'jax aborted', 1

  def catch_abort(self, message: str) -> None:
    """Lets an abort of jax' C++ code at the meeting end in one line instead."""
    self._aborted = message, TransientError.status
    # Python's own handlers would run too late: abort() does not return. It is
    # called in a thread that holds no lock of Python's, so this may run there.
    self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(
        lambda _: self.end(*self._aborted))
    _c_signal(self._on_abort)

  def start(self, client: Any) -> None:
    """Starts two threads: one talks, which may hang, the other judges.

    A lone process, without a client, has nobody to talk to.
    """
    self.prepare(client, time.monotonic())
    for loop in (self._talk, self._judge) if client else (self._judge,):
      threading.Thread(target=loop, daemon=True).start()

  def prepare(self, client: Any, now: float) -> None:
    """Begins with all alive at that monotonic time."""
    self.client = client
    self._answered = now
    self._heard = dict.fromkeys(range(self.count), now)
    self._moved = dict.fromkeys(range(self.count), now)
    self._beats: dict[int, Beat] = {}
    # Only the loss of process 0 aborts another; in process 0 it is a fault.
    self._aborted = (('', TransientError.status) if self.index else
                     ('jax aborted, as the lines above say', 1))

  def stop(self) -> None:
    """Ends the watch; jax' C++ code may abort again."""
    self._stopped.set()
    if self.count > 1:
      _c_signal(None)

  def report_alive(self, phase: str | None, step: int | None,
                   now: float) -> None:
    """Notes at that monotonic time that the main thread begins a phase.

    Without one the same goes on; `step` is how many have been begun.
    """
    if phase and phase != 'compile':  # which interrupts the phase before
      self._longest[self._phase] = max(
          now - self._since, self._longest.get(self._phase, 0))
    if phase:
      self._phase, self._since = phase, now
    self._turns += 1
    self._step = self._step if step is None else step

  def beat(self) -> Beat:
    """What is to be told of this process now; looks at what it has worked."""
    main, all_ = _processor_seconds()
    worked = main > self._work[0] or all_ - self._work[1] > _WORK * _BEAT
    self._work = main, all_
    phase = self._phase  # the main thread may change it meanwhile
    longest = self._longest.get(phase)
    self._life += worked and (longest is None or phase == 'compile')
    self._number += 1
    limit = FIRST if longest is None else max(
        LEAST.get(phase, LEAST_ELSEWHERE), TIMES * longest)
    return Beat(self._number, self._turns, self._life, phase, limit)

  def wait_for_the_lost(self) -> None:
    """Gives the watch the time to end this process with the reason."""
    self._silent_after = SILENT_AFTER_ERROR
    time.sleep(SILENT_AFTER_ERROR + 3 * _BEAT)

  def end(self, message: str, status: int, told: str | None = None) -> NoReturn:
    """Ends this process with a line, and all with this exit status.

    The others' line is `told`, or the same; '' stands for a lost process 0.
    """
    if not self._lock.acquire(blocking=False):
      time.sleep(60)  # another thread is about to end the process
    line = message or self._loss([0], 'lost')
    sys.stdout.flush()
    print('error: ' + ' '.join(line.split()), file=sys.stderr, flush=True)
    # In a thread, for without process 0 it may hang.
    teller = threading.Thread(
        target=self._tell, args=(told or line, status), daemon=True)
    teller.start()
    teller.join(5)
    os._exit(status)

  def _tell(self, line: str, status: int) -> None:
    if self.client is None:
      return
    from jax.errors import JaxRuntimeError
    try:
      self.client.key_value_set(
          f'ended/{self.index}', json.dumps([line, status]))
      # The others abort when process 0 goes: it goes last, as far as it can.
      while self.index == 0:
        gone = len(self.client.key_value_dir_get('ended/'))
        if gone >= self.count - len(self._silent(time.monotonic())):
          time.sleep(0.2)  # they have said it, now they go
          return
        time.sleep(0.05)
    except JaxRuntimeError:
      return  # the store is gone: nobody is left to be told

  def _talk(self) -> None:
    from jax.errors import JaxRuntimeError
    while not self._stopped.is_set():
      try:
        self.client.key_value_set(
            f'beat/{self.index}', json.dumps(self.beat()),
            allow_overwrite=True)
        beats = self.client.key_value_dir_get('beat/')
        ended = self.client.key_value_dir_get('ended/')
      except JaxRuntimeError:  # `_judge` sees the silence
        self._stopped.wait(_BEAT)
        continue
      if ended:
        line, status = json.loads(min(ended)[1])
        self.end(line, status)
      self.listen({int(key.rpartition('/')[2]): Beat(*json.loads(beat))
                   for key, beat in beats}, time.monotonic())
      self._stopped.wait(_BEAT)

  def listen(self, beats: dict[int, Beat], now: float) -> None:
    """Takes in what was read of all."""
    self._answered = now
    for i, beat in beats.items():
      before = self._beats.get(i)
      if beat != before:
        self._heard[i] = now
      if before is None or (beat.turns, beat.life) != (
          before.turns, before.life):
        self._moved[i] = now
    self._beats = beats

  def _judge(self) -> None:
    before = time.monotonic()
    while not self._stopped.wait(_BEAT):
      now = time.monotonic()
      if now - before > 5 * _BEAT:  # it is this process that stood still
        self._answered = now
        self._heard = dict.fromkeys(self._heard, now)
        self._moved = dict.fromkeys(self._moved, now)
      before = now
      if self.client is None:
        self.listen({0: self.beat()}, now)
      if loss := self.verdict(now):
        self.end(loss, TransientError.status)

  def verdict(self, now: float) -> str:
    """What is wrong with the others at that monotonic time; '' if nothing."""
    if lost := self._silent(now):
      return self._loss(lost, 'lost')
    # Who waits for another has come to the place where that one is missing.
    turns = {i: beat.turns for i, beat in self._beats.items()}
    last = [i for i in turns if turns[i] == min(turns.values())]
    if last and all(
        now - self._moved[i] > self._beats[i].limit for i in last):
      return self._loss(last, f'stuck in phase {self._beats[last[0]].phase}')
    return ''

  def _silent(self, now: float) -> list[int]:
    """The processes that have not been heard of for too long."""
    if now - self._answered > self._silent_after:
      return [0]  # of the others nothing can be known
    return [i for i, heard in self._heard.items()
            if i != self.index and now - heard > self._silent_after]

  def _loss(self, which: list[int], how: str) -> str:
    if self.count == 1:
      return (f'the run is {how} at step {self._step}: start it again, and it '
              'goes on from its last checkpoint')
    # The step of this process: it waits for the lost one there, or would soon.
    return (f'process {", ".join(map(str, which))} of {self.count} is {how} at '
            f'step {self._step}: start the run again, if need be with fewer '
            'processes, and it goes on from its last checkpoint')


def _processor_seconds() -> tuple[float, float]:
  """What the main thread has worked, where that can be known, and all threads.

  Threads that only wait take some, too.
  """
  main = 0.0
  if hasattr(time, 'pthread_getcpuclockid'):
    ident = threading.main_thread().ident
    assert ident is not None
    main = time.clock_gettime(time.pthread_getcpuclockid(ident))
  return main, time.process_time()


def _c_signal(handler: Any) -> None:
  """C's own signal(SIGABRT, handler); None is the default."""
  ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)
