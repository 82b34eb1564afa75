"""Notices that another process is lost or stuck, and ends this one.

What jax has is not enough: in a collective with a process that is stopped all
others wait for ever, and when process 0 dies the others abort without a word.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from flax_imdb.errors import TransientError

# A process that has not been heard of for so long is lost, in seconds; after
# an error, which is then probably of its making, for only so long.
SILENT = 20.0
SILENT_AFTER_ERROR = 5.0
# All are heard of, but none has moved.
STUCK = 900.0
_BEAT = 1.0


class Watchdog:
  """Beats each second in jax' key-value store, and listens for the others."""

  def __init__(self, index: int, count: int):
    self.index, self.count = index, count
    self.client: Any = None
    self._lock = threading.Lock()
    self._stopped = threading.Event()
    self._step = self._turns = 0
    self._silent_after = SILENT
    self._aborted = 'jax aborted'

  def catch_abort(self, message: str) -> None:
    """Lets an abort of jax' C++ code end in one line instead."""
    self._aborted = message
    # Python's own handlers would run too late: abort() does not return. It is
    # called in a thread that holds no lock of Python's, so this may run there.
    self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(
        lambda _: self.end(self._aborted, TransientError.status))
    _c_signal(self._on_abort)

  def start(self, client: Any) -> None:
    """Starts two threads: one talks, which may hang, the other judges."""
    self.prepare(client, time.monotonic())
    for loop in (self._talk, self._judge):
      threading.Thread(target=loop, daemon=True).start()

  def prepare(self, client: Any, now: float) -> None:
    """Begins with all alive at that monotonic time."""
    self.client = client
    self._answered = now
    self._heard = dict.fromkeys(range(self.count), now)
    self._beats: dict[int, list[int]] = {}
    self._moved = now
    if self.index:
      self._aborted = ''  # only the loss of process 0 aborts another

  def stop(self) -> None:
    """Ends the watch; jax' C++ code may abort again."""
    self._stopped.set()
    _c_signal(None)

  def report_alive(self, step: int | None) -> None:
    """Notes that the main thread moves, and the steps it has done."""
    self._turns += 1
    self._step = self._step if step is None else step

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
    line = message or self._loss([0])
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
    number = 0
    while not self._stopped.is_set():
      number += 1
      try:
        self.client.key_value_set(
            f'beat/{self.index}', json.dumps([number, self._turns]),
            allow_overwrite=True)
        beats = self.client.key_value_dir_get('beat/')
        ended = self.client.key_value_dir_get('ended/')
      except JaxRuntimeError:  # `_judge` sees the silence
        self._stopped.wait(_BEAT)
        continue
      if ended:
        line, status = json.loads(min(ended)[1])
        self.end(line, status)
      self.listen({int(key.rpartition('/')[2]): json.loads(beat)
                   for key, beat in beats}, time.monotonic())
      self._stopped.wait(_BEAT)

  def listen(self, beats: dict[int, list[int]], now: float) -> None:
    """Takes in what was read of all: each one's beat and turns."""
    self._answered = now
    for i, beat in beats.items():
      before = self._beats.get(i)
      if beat != before:
        self._heard[i] = now
      if before is None or beat[1] != before[1]:
        self._moved = now
    self._beats = beats

  def _judge(self) -> None:
    before = time.monotonic()
    while not self._stopped.wait(_BEAT):
      now = time.monotonic()
      if now - before > 5 * _BEAT:  # it is this process that stood still
        self._answered = self._moved = now
        self._heard = dict.fromkeys(self._heard, now)
      before = now
      if loss := self.verdict(now):
        self.end(loss, TransientError.status)

  def verdict(self, now: float) -> str:
    """What is wrong with the others at that monotonic time; '' if nothing."""
    if lost := self._silent(now):
      return self._loss(lost)
    if self._step and now - self._moved > STUCK:
      turns = {i: beat[1] for i, beat in self._beats.items()}
      last = [i for i in turns if turns[i] == min(turns.values())]
      return self._loss(last, 'stuck')
    return ''

  def _silent(self, now: float) -> list[int]:
    """The processes that have not been heard of for too long."""
    if now - self._answered > self._silent_after:
      return [0]  # of the others nothing can be known
    return [i for i, heard in self._heard.items()
            if i != self.index and now - heard > self._silent_after]

  def _loss(self, lost: list[int], how: str = 'lost') -> str:
    # The step of this process: it waits for the lost one there, or would soon.
    return (f'process {", ".join(map(str, lost))} of {self.count} is {how} at '
            f'step {self._step}: start the run again, if need be with fewer '
            'processes, and it goes on from its last checkpoint')


def _c_signal(handler: Any) -> None:
  """C's own signal(SIGABRT, handler); None is the default."""
  ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)
