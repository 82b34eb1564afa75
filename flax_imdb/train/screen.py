"""What a person sees while a run trains: epochs, curves, rates, time left."""

from collections.abc import Sequence
import math
import os
import pathlib
import resource
import textwrap
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import (
  BarColumn,
  Progress,
  TaskProgressColumn,
  TextColumn,
  TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from flax_imdb.checkpoint.manager import Progress as RunProgress
from flax_imdb.cluster import devices
from flax_imdb.data.batches import TrainBatches
from flax_imdb.terminal import Rate, clock
from flax_imdb.train import stopping

# Of a curve, the lowest first; and where the terminal is not of UTF-8.
_LEVELS, _ASCII_LEVELS = '▁▂▃▄▅▆▇█', "_.-'"
_CURVE_WIDTH = 20  # epochs of a curve, where there is room
_NUMBERS_WIDTH = 30  # columns of a row beside its two curves
_BAR_WIDTH = 30  # columns
_NO_BREAK = '\xa0'
_STATM = pathlib.Path('/proc/self/statm')


class Screen:
  """The view of `Terminal.showing`, and its line for a log."""

  def __init__(self, config: ConfigDict, batches: TrainBatches, step: int,
               epochs: Sequence[dict[str, Any]], progress: RunProgress,
               where: str, recurrence: str):
    """Begins after `step` steps.

    `epochs` are the lines of metrics.jsonl, and `progress` is that of early
    stopping: the run changes both as it goes on. `where` it runs, and how the
    `recurrence` is computed, is shown as it is given.
    """
    self._config, self._epochs, self._progress = config, epochs, progress
    self._step, self._where, self._recurrence = step, where, recurrence
    self._steps_per_epoch = batches.steps_per_epoch
    self._steps_total = config.num_epochs * batches.steps_per_epoch
    self._means: dict[str, float] = {}  # of the epoch so far
    self._rates: list[str] = []
    # The average since the epoch began, or the run, of which validation is a
    # part. It is never started: it is a part of this view.
    self._bars = Progress(
        TextColumn('{task.description}'),
        BarColumn(None, table_column=Column(max_width=_BAR_WIDTH)),
        TaskProgressColumn(), TimeRemainingColumn(), TextColumn('left'),
        speed_estimate_period=math.inf)
    self._epoch_bar = self._bars.add_task('', total=self._steps_per_epoch)
    self._run_bar = self._bars.add_task(
        'run', total=self._steps_total, completed=step)
    self._epoch = -1
    self._move()

  def _move(self) -> None:
    """Moves the bars to where the run is."""
    epoch = max(0, self._step - 1) // self._steps_per_epoch
    done = self._step - epoch * self._steps_per_epoch
    if epoch != self._epoch:
      self._epoch = epoch
      self._bars.reset(
          self._epoch_bar, completed=done,
          description=f'epoch {epoch + 1}/{self._config.num_epochs}')
    self._bars.update(self._epoch_bar, completed=done)
    self._bars.update(self._run_bar, completed=self._step)

  def update(self, step: int, means: dict[str, float], rate: Rate) -> None:
    """Takes what is done: the steps, and the `Metrics.means` of their epoch."""
    self._step, self._means = step, means
    self._rates = [f'{rate.per_second():,.0f} reviews/s',
                   f'{rate.tokens_per_second():,.0f} tokens/s']
    self._move()

  def line(self) -> str:
    """Where the run is, for a log."""
    left = self._bars.tasks[1].time_remaining
    return '  '.join([
        f'epoch {self._epoch + 1}  step {self._step}/{self._steps_total}',
        *(f'{name} {self._means[name]:.4f}' for name in ('loss', 'accuracy')),
        *self._rates[:1], *([] if left is None else [f'{clock(left)} left'])])

  def __rich_console__(
      self, console: Console, options: ConsoleOptions) -> RenderResult:
    """Some ten lines, none longer than the terminal is wide."""
    yield self._bars
    yield self._curves(options.max_width, options.ascii_only)
    for facts in (
        [f'step {self._step:,} of {self._steps_total:,}', *self._rates],
        self._standing(), [*_memory(), self._where], [self._recurrence]):
      # Lines break between facts, and where one is too long inside it.
      for line in textwrap.wrap('  '.join(
          fact.replace(' ', _NO_BREAK) if len(fact) <= options.max_width else
          fact for fact in facts), options.max_width):
        yield Text(line.replace(_NO_BREAK, ' '))

  def _curves(self, width: int, ascii_only: bool) -> Table:
    """Loss and accuracy of each split, the last number and all as a curve."""
    levels = _ASCII_LEVELS if ascii_only else _LEVELS
    length = max(1, min(_CURVE_WIDTH, (width - _NUMBERS_WIDTH) // 2))
    table = Table.grid(padding=(0, 1))
    table.add_column()
    for _ in range(2):
      table.add_column(style='bold')
      table.add_column(style='cyan', width=length)
    for column in table.columns:  # an ellipsis is not ASCII
      column.no_wrap, column.overflow = True, 'crop'
    table.add_row('', 'loss', '', 'accuracy', '')
    for split in 'train', 'validation':
      scores = [line[split] for line in self._epochs if split in line]
      if split == 'train' and self._means and len(scores) <= self._epoch:
        scores.append(self._means)
      row = [split]
      for name in 'loss', 'accuracy':
        values = [score[name] for score in scores]
        row += [f'{values[-1]:.4f}' if values else '-',
                curve(values[-length:], levels)]
      if values or split == 'train':
        table.add_row(*row)
    return table

  def _standing(self) -> list[str]:
    """The best epoch so far, and how long a better one is waited for."""
    early_stopping = self._config.early_stopping
    scores = {line['epoch']: stopping.score(early_stopping, line['validation'])
              for line in self._epochs if 'validation' in line}
    if not scores:
      return []
    best = max(scores, key=scores.__getitem__)
    facts = [f'best: epoch {best}, validation {early_stopping.monitor} '
             f'{abs(scores[best]):.4f}']
    if patience := early_stopping.patience:
      facts.append(f'{max(0, patience - self._progress.waited)} of {patience} '
                   'epochs of patience left')
    return facts


def curve(values: Sequence[float], levels: str = _LEVELS) -> str:
  """A character a number, from the lowest of `levels` to the highest.

  The middle one where all are the same; a space where one is not finite.
  """
  known = [x for x in values if math.isfinite(x)]
  low, span = min(known, default=0), max(known, default=0) - min(
      known, default=0)
  return ''.join(
      ' ' if not math.isfinite(x) else levels[len(levels) // 2] if not span else
      levels[round((x - low) / span * (len(levels) - 1))] for x in values)


def _memory() -> list[str]:
  """What the process holds, and of the first device, where it says so."""
  if _STATM.exists():
    held = int(_STATM.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    facts = [f'memory {held / 1e9:.2f} GB']
  else:  # of macOS, in bytes
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = [f'memory {most / 1e9:.2f} GB at most']
  if found := devices.memory():
    facts.append('device {:.2f} of {:.2f} GB'.format(*(x / 1e9 for x in found)))
  return facts
