"""What a person sees: lines, bars, a live view, rates, what compiles."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import datetime
import functools
import logging
import os
import signal
import sys
import textwrap
import threading
import time
from typing import Any, Protocol

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress import (
  BarColumn,
  Progress,
  ProgressColumn,
  TaskProgressColumn,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from flax_imdb.storage import bucket, files

_LINE_SECONDS = 10  # between lines on a long pass, where nothing is live
_REFRESHES = 1  # of what is live, a second: each takes some milliseconds
_LOOK_SECONDS = 0.1  # between looks at a pass that reports each of its items
_BAR_WIDTH = 30  # columns, where there is room
_BESIDE_WIDTH = 26  # beside the name of a pass: the shortest bar, and its time

# What is done, such as 'evaluating'; how much of it; of how much. 0 of 0 is a
# pass whose length nobody knows, n of n the end.
ShowProgress = Callable[[str, int, int], None]


def show_nothing(what: str, done: int, total: int) -> None:
  """The `ShowProgress` of whoever has no bars."""


class View(Protocol):
  """What is live for longer than a bar, see `Terminal.showing`."""

  def __rich_console__(
      self, console: Console, options: ConsoleOptions) -> RenderResult:
    """As rich calls it, each second and in a thread of its own."""

  def update(self, *figures: Any) -> None:
    """Takes what is new."""

  def line(self) -> str:
    """The same in a line, for a log."""


class _Console(Console):
  """Draws bars in ASCII where the locale is C by the user's own wish."""

  @property
  def encoding(self) -> str:
    # Python itself writes UTF-8 there, for C is mostly no locale at all.
    return ('ascii' if os.environ.get('LC_ALL') in ('C', 'POSIX')
            else super().encoding)


class Terminal:
  """Lines for a person; on a terminal bars and a live view below them.

  Elsewhere, as in a log, a pass that takes long has a line each 10 s. Where it
  is `quiet` nothing is printed. Use it as a context: what is live when it ends,
  however that ends, is taken away.
  """

  def __init__(self, quiet: bool = False):
    # This stdout: tfds' banners are caught in another, and the bars are not.
    self._console = _Console(
        file=sys.stdout, highlight=False, soft_wrap=True, markup=False,
        emoji=False, quiet=quiet, force_jupyter=False)  # lines there, too
    # A variable such as FORCE_COLOR may take a log for a terminal.
    self._can_live = (not quiet and self._console.is_interactive
                      and self._console.file.isatty())
    self._live: Live | None = None
    self._view: View | None = None
    self._bar: Progress | None = None  # of one task, the pass under way
    self._spoke_at = self._looked_at = time.monotonic()

  def __enter__(self) -> 'Terminal':
    return self

  def __exit__(self, *error: object) -> None:
    self._view = self._bar = None
    self._draw()

  def __rich_console__(
      self, console: Console, options: ConsoleOptions) -> RenderResult:
    """What is live at this moment."""
    if self._view:
      yield self._view
    if self._bar:
      yield self._bar
    elif self._view:  # which is not to jump when a bar comes
      yield Text()
    # For the ^C that a terminal writes: it must not begin another line.
    yield Text()

  def announce(self, text: str, whole: bool = False) -> None:
    """Prints lines, above what is live; UserError if the disk is full.

    A bar is over when something is said of its pass. On a terminal lines break
    between words, but for one that is to be copied, which stays `whole`.
    """
    self._bar = None
    self._draw()
    if self._can_live and not whole:
      text = '\n'.join(textwrap.fill(
          line, self._console.width, subsequent_indent='  ',
          break_long_words=False, break_on_hyphens=False)
          for line in text.split('\n'))
    self._print(text)

  def table(self, rows: Sequence[Sequence[str]], lines: Sequence[str]) -> None:
    """Shows rows on a terminal, the first of names, and elsewhere lines."""
    if not self._can_live:
      for line in lines:
        self.announce(line)
      return
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for i, name in enumerate(rows[0]):
      table.add_column(name, justify='right' if i else 'left')
    for row in rows[1:]:
      table.add_row(*row)
    self._print(table, soft_wrap=False)

  def progress(self, what: str, done: int, total: int) -> None:
    """Shows how far a pass has come, see `ShowProgress`; one at a time."""
    bar, now = self._bar, time.monotonic()
    is_new = not bar or bar.tasks[0].fields['what'] != what
    if done >= total > 0:
      self._bar = None
      self._draw()
    elif is_new or now - self._looked_at >= _LOOK_SECONDS:
      self._looked_at = now
      if is_new:
        bar = self._bar = _bar(what, total, self._console.width)
      assert bar
      bar.update(bar.tasks[0].id, completed=done)
      self._draw()
      self._log(lambda: f'{what}: {_counted(bar, done, total)}')

  @contextlib.contextmanager
  def showing(self, view: View) -> Iterator[None]:
    """Shows a view while the context lasts, on a terminal only."""
    self._view = view
    self._draw()
    try:
      yield
    finally:
      self._view = self._bar = None
      self._draw()

  def update(self, *figures: Any) -> None:
    """Hands figures to the view; elsewhere its line may be due."""
    if self._view:
      self._view.update(*figures)
      self._log(self._view.line)

  def leave(self) -> None:
    """Gives the cursor back where the process ends at once."""
    if self._live:
      os.write(self._console.file.fileno(), b'\x1b[?25h\r\n')

  def _draw(self) -> None:
    """Begins to draw what is live, or takes it away."""
    if not self._can_live:
      return
    is_wanted = bool(self._view or self._bar)
    if is_wanted and not self._live:
      # stdout may be another one at this moment: Live would put that back.
      self._live = Live(self, console=self._console, transient=True,
                        refresh_per_second=_REFRESHES, redirect_stdout=False)
      with _uninterrupted():
        self._live.start(refresh=True)
    elif self._live and not is_wanted:
      with _uninterrupted():
        self._live.stop()
        self._live = None

  def _log(self, line: Callable[[], str]) -> None:
    if not self._can_live and (
        time.monotonic() - self._spoke_at >= _LINE_SECONDS):
      self._print(line())

  def _print(self, what: Any, **options: Any) -> None:
    with files.writing('standard output'):
      self._console.print(what, **options)
    self._spoke_at = time.monotonic()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
  """Lets Ctrl-C wait: in the midst of it half a drawing would stay for good."""
  if threading.current_thread() is not threading.main_thread():
    yield  # which is never interrupted
    return
  came: list[tuple[int, Any]] = []
  before = signal.signal(
      signal.SIGINT, lambda number, frame: came.append((number, frame)))
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)
    if came and callable(before):  # not sent again: a second one ends at once
      before(*came[0])


def _bar(what: str, total: int, width: int) -> Progress:
  """A bar, which is not shown yet."""
  columns: list[ProgressColumn] = (
      [TaskProgressColumn(), TimeRemainingColumn(), TextColumn('left')]
      if total else [TimeElapsedColumn()])
  bar = Progress(
      TextColumn('{task.description}', markup=False),
      BarColumn(None, table_column=Column(max_width=_BAR_WIDTH)), *columns)
  # Cut by itself: rich would cut all columns, and write an ellipsis.
  bar.add_task(what[:max(0, width - _BESIDE_WIDTH)], total=total or None,
               what=what)
  return bar


def _counted(bar: Progress, done: int, total: int) -> str:
  """How far it is, in words."""
  if not total:
    return f'{done:,}' if done else f'{bar.tasks[0].elapsed or 0:.0f} s so far'
  left = bar.tasks[0].time_remaining
  return f'{done:,} of {total:,}' + (
      '' if left is None else f', {clock(left)} left')


def clock(seconds: float) -> str:
  """Such as 0:01:05, of a minute and five seconds."""
  return str(datetime.timedelta(seconds=round(seconds)))


class Rate:
  """What is done, which others add up, and the time that it took."""

  def __init__(self):
    self.reviews = self.tokens = 0
    self._start = time.perf_counter()

  def seconds(self) -> float:
    """The time since this was made."""
    return time.perf_counter() - self._start

  def per_second(self) -> float:
    """Reviews a second."""
    return self.reviews / self.seconds()

  def tokens_per_second(self) -> float:
    """Tokens a second."""
    return self.tokens / self.seconds()


class CompileClock:
  """Times the compilations: the first call for each batch shape.

  `begins` is called before each, which a bar stands for.
  """

  def __init__(self, begins: Callable[[], None] = lambda: None,
               progress: ShowProgress = show_nothing):
    self._begins, self._progress = begins, progress
    self._count, self._seconds = 0, 0.0
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
      self._progress('compiling a batch shape', 0, 0)
      start = time.perf_counter()
      result = jax.block_until_ready(function(state, batch))
      self._count += 1
      self._seconds += time.perf_counter() - start
      self._progress('compiling a batch shape', 1, 1)
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
