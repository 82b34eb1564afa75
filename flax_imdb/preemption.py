"""SIGTERM and SIGINT: finish the step, save, leave; the second leaves at once.

Cloud machines are taken away with a SIGTERM and seconds to spare; a person
presses Ctrl-C. While a run holds what is not yet saved, both mean the same.
"""

from collections.abc import Iterator
import contextlib
import os
import signal
import threading

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# As EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again.
EXIT_STATUS = 75


class Preempted(Exception):
  """A run that was asked to stop, and has saved what it had."""


class Request:
  """Whether a signal has asked the run to stop.

  Attributes:
    name: of the signal, such as 'SIGTERM'; None as long as there was none.
  """

  def __init__(self):
    self.name: str | None = None


@contextlib.contextmanager
def deferred() -> Iterator[Request]:
  """Holds back SIGTERM and SIGINT while the context lasts.

  Yields:
    A request, to be looked at between steps. The first signal is noted there;
    the second ends the process at once, with 128 + its number as status, also
    while jax compiles and Python can't run a handler.
  """
  request = Request()

  def note(number, frame):
    del frame
    request.name = signal.Signals(number).name

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
        os._exit(128 + number[0])

  handlers = {number: signal.signal(number, note) for number in _SIGNALS}
  wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
  watcher = threading.Thread(target=watch, daemon=True)
  watcher.start()
  try:
    yield request
  finally:
    signal.set_wakeup_fd(wakeup)
    for number, handler in handlers.items():
      signal.signal(number, handler)
    os.close(write_end)  # the watcher reads the end of the file
    watcher.join()
    os.close(read_end)
