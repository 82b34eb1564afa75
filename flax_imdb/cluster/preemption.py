"""SIGTERM and SIGINT: finish the step, save, leave; the second leaves at once.

Cloud machines are taken away with a SIGTERM, a person presses Ctrl-C: both mean
the same. Of several processes one gets it, and all stop at the same step.
"""

import collections
from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import threading
from typing import Any

import numpy as np

from flax_imdb.cluster import devices, processes
from flax_imdb.errors import Preempted, Terminated

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_unheeded: list[str] = []  # that came when a run had nothing left to stop


class Stop:
  """Whether the run has been asked to stop, the same in all processes.

  One process knows by itself. Several vote in each train step, whose all-reduce
  adds the votes up. Each `look_every` steps all look at the sum of the oldest
  of that many, so that the queue of an accelerator never runs dry for it. Who
  wants to stop votes so ever after: what is not looked at is not lost.
  """

  def __init__(self, look_every: int):
    self.signal: str | None = None  # that this process got, such as 'SIGTERM'
    self._several = processes.count() > 1
    self._look_every = look_every
    self._votes: collections.deque = collections.deque(maxlen=look_every)
    self._steps = 0
    self._agreed = False

  def with_vote(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch of `devices.shard` as `voting` calls the step with it."""
    if not self._several:
      return batch
    return batch | {devices.VOTES: np.full_like(
        batch['weights'], self.signal is not None)}

  def voting(self, train_step: Callable[[Any, dict], Any]) -> Callable:
    """Lets each call of a `devices.data_parallel` step carry a vote."""
    def step(state, batch):
      state, (sums, total) = train_step(state, self.with_vote(batch))
      self._votes.append(total)
      self._steps += 1
      return state, sums
    return step if self._several else train_step

  def agreed(self, wait: bool = False) -> bool:
    """Whether all stop now; all must ask, after the same steps.

    With `wait` the last step's votes count, though they may be under way.
    """
    if not self._several:
      return self.signal is not None
    if self._votes and (wait or self._steps % self._look_every == 0):
      seen = self._votes[-1 if wait else 0]
      processes.report_alive('wait')
      self._agreed |= bool(devices.to_host(seen) > 0)
    return self._agreed

  def leave_if_asked(self, step: int, steps_total: int) -> None:
    """Raises Preempted in all if any got a signal, once `step` is saved."""
    if signals := {*processes.gather(self.signal or '')} - {''}:
      raise Preempted(
          f'stopped by {" and ".join(sorted(signals))} after step {step} of '
          f'{steps_total}, which is saved: the same command goes on from there')


@contextlib.contextmanager
def heeded() -> Iterator[None]:
  """Where SIGTERM is not `deferred` it ends the context with Terminated.

  On the way there it is a KeyboardInterrupt, which nobody takes for a failure.
  """
  asked = False

  def interrupt(number, frame):
    nonlocal asked
    del number, frame
    asked = True
    raise KeyboardInterrupt

  handler = signal.signal(signal.SIGTERM, interrupt)
  try:
    yield
  except KeyboardInterrupt:
    if not asked:
      raise
    raise Terminated('stopped by SIGTERM, with nothing new to save: the same '
                     'command goes on') from None
  finally:
    signal.signal(signal.SIGTERM, handler)


def leave_if_unheeded() -> None:
  """Raises Terminated in all if a signal came to any when a run just ended.

  For who goes on with another one; the one that ended is done all the same.
  """
  if signals := {*processes.gather(' '.join(_unheeded))} - {''}:
    raise Terminated(f'stopped by {" and ".join(sorted(signals))} after a '
                     'teacher was trained: the same command goes on from there')


@contextlib.contextmanager
def deferred(look_every: int,
             leave: Callable[[], None] = lambda: None) -> Iterator[Stop]:
  """Holds back SIGTERM and SIGINT while the context lasts.

  The first one is noted in the `Stop` it yields. The second ends the process at
  once, with 128 + its number as status, also while jax compiles and Python
  can't run a handler; `leave` is called, in a thread, and no other cleaning up.
  """
  stop = Stop(look_every)
  _unheeded.clear()

  def note(number, frame):
    del frame
    stop.signal = signal.Signals(number).name

  # Python's handlers wait for the main thread to leave C++. What Python writes
  # to this pipe at once a thread can read meanwhile.
  read_end, write_end = os.pipe()
  os.set_blocking(write_end, False)
  count = 0

  def watch():
    nonlocal count
    while number := os.read(read_end, 1):
      count += number[0] in _SIGNALS
      if count > 1:
        leave()
        os._exit(128 + number[0])

  handlers = {number: signal.signal(number, note) for number in _SIGNALS}
  wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
  watcher = threading.Thread(target=watch, daemon=True)
  watcher.start()
  try:
    yield stop
    if stop.signal:
      _unheeded.append(stop.signal)
  finally:
    signal.set_wakeup_fd(wakeup)
    for number, handler in handlers.items():
      signal.signal(number, handler)
    os.close(write_end)  # the watcher reads the end of the file
    watcher.join()
    os.close(read_end)
