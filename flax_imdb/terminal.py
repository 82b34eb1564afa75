"""What a person sees: lines, a live one, how fast it goes, what compiles."""

from collections.abc import Callable
import functools
import logging
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn

from flax_imdb.storage import bucket, files


class Terminal:
  """Lines for a person: a live one on a terminal, plain ones elsewhere."""

  def __init__(self, quiet: bool = False):
    self._console = Console(highlight=False, soft_wrap=True, markup=False,
                            emoji=False, quiet=quiet)
    self._live: Progress | None = None

  def announce(self, text: str) -> None:
    """Prints a line, above the live one; UserError if the disk is full."""
    with files.writing('standard output'):
      self._console.print(text)

  def start(self, step: int, steps_total: int) -> None:
    """Shows the live line, on a terminal only."""
    if self._console.is_terminal:
      self._live = Progress(
          TextColumn('{task.description}'), TimeRemainingColumn(),
          TextColumn('left'), console=self._console, transient=True)
      self._task = self._live.add_task('', total=steps_total, completed=step)
      self._live.start()

  def update(self, step: int, text: str) -> None:
    """Changes the live line: `step` moves its time left."""
    if self._live:
      self._live.update(self._task, completed=step, description=text)

  def stop(self) -> None:
    """Takes the live line away."""
    if self._live:
      self._live.stop()
      self._live = None


class Rate:
  """The reviews that are done, which others add up, and the time they took."""

  def __init__(self):
    self.reviews, self._start = 0, time.perf_counter()

  def seconds(self) -> float:
    """The time since this was made."""
    return time.perf_counter() - self._start

  def per_second(self) -> float:
    """Reviews a second."""
    return self.reviews / self.seconds()


class CompileClock:
  """Times the compilations: the first call for each batch shape.

  `begins` is called before each.
  """

  def __init__(self, begins: Callable[[], None] = lambda: None):
    self._begins, self._count, self._seconds = begins, 0, 0.0
    self._compiled: set[tuple[Callable, tuple[int, ...]]] = set()

  def note(self, function: Callable, batch: dict[str, Any]) -> bool:
    """Notes that what `wrap` returned is compiled for the shape of this batch.

    Returns whether that is new: then a call would have been timed.
    """
    program = function, batch['ids'].shape
    is_new = program not in self._compiled
    self._compiled.add(program)
    return is_new

  def wrap(self, function: Callable[[Any, dict], Any]) -> Callable:
    """Counts what function(state, batch) compiles; waits for it."""
    import jax  # only now: this module comes before jax

    @functools.wraps(function)  # and its `lower`
    def timed(state, batch):
      if not self.note(timed, batch):
        return function(state, batch)
      self._begins()
      start = time.perf_counter()
      result = jax.block_until_ready(function(state, batch))
      self._count += 1
      self._seconds += time.perf_counter() - start
      return result
    return timed

  def take(self) -> str:
    """A few words on the compilations since the last call, '' if none."""
    count, seconds = self._count, self._seconds
    self._count, self._seconds = 0, 0.0
    if not count:
      return ''
    shapes = 'batch shape' if count == 1 else 'batch shapes'
    return f', {count} {shapes} compiled in {seconds:.1f} s'


def quiet_libraries() -> None:
  """Drops what libraries print beside the errors that they also raise."""
  # orbax also warns of each reading of a run directory that is not to change.
  for name in ('absl', *bucket.CLIENTS):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  # When one array fails, orbax raises and closes its event loop; those of the
  # other arrays still end, and each complains that it is closed, or that nobody
  # asked for its own error.
  logging.getLogger('asyncio').addFilter(
      lambda record: 'was never retrieved' not in record.getMessage())
  hook = sys.unraisablehook
  if getattr(hook, '__name__', '') != 'drop_closed_loop':
    def drop_closed_loop(unraisable):
      if str(unraisable.exc_value) != 'Event loop is closed':
        hook(unraisable)
    sys.unraisablehook = drop_closed_loop
