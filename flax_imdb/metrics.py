"""What a run writes: the terminal, metrics.jsonl and TensorBoard events."""

import json
import os
import pathlib
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeRemainingColumn


class Terminal:
  """Lines for a person: a live one on a terminal, plain ones elsewhere."""

  def __init__(self, stderr: bool = False):
    """Prints to standard output, or to standard error if `stderr`."""
    self._console = Console(
        stderr=stderr, highlight=False, soft_wrap=True, markup=False)
    self._live: Progress | None = None

  def announce(self, text: str) -> None:
    """Prints a line; above the live one if there is one."""
    self._console.print(text)

  def start(self, step: int, steps_total: int) -> None:
    """Shows the live line, on a terminal only."""
    if self._console.is_terminal:
      self._live = Progress(
          TextColumn('{task.description}'), TimeRemainingColumn(),
          console=self._console, transient=True)
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


class Writers:
  """metrics.jsonl and TensorBoard events of a run directory.

  metrics.jsonl holds nothing that depends on the machine's speed: the lines of
  two runs of one config can be compared byte by byte.
  """

  def __init__(self, workdir: str, step: int):
    """Goes on after `step`: what an interrupted run wrote beyond it is cut."""
    from tensorboardX import SummaryWriter  # 0.1 s that eval need not pay

    self._path = pathlib.Path(workdir, 'metrics.jsonl')
    kept = []
    if self._path.exists():
      for line in self._path.read_bytes().splitlines(keepends=True):
        if line.endswith(b'\n') and json.loads(line)['step'] <= step:
          kept.append(line)
    temporary = self._path.with_suffix('.tmp')
    temporary.write_bytes(b''.join(kept))
    os.replace(temporary, self._path)
    self._events = SummaryWriter(workdir, purge_step=step + 1)

  def write(self, line: dict[str, Any], rates: dict[str, float]) -> None:
    """Writes one line, on disk when this returns.

    Args:
      line: must have 'step'; nested dicts become tags such as train/loss.
      rates: figures that only TensorBoard is told, such as seconds.
    """
    with open(self._path, 'a', encoding='utf-8') as f:
      f.write(json.dumps(line) + '\n')
      f.flush()
      os.fsync(f.fileno())
    for tag, value in _flat(line | rates).items():
      self._events.add_scalar(tag, value, line['step'])
    self._events.flush()

  def close(self) -> None:
    """Closes the events file."""
    self._events.close()


class Rate:
  """Reviews a second since this was made."""

  def __init__(self):
    self._start, self._reviews = time.perf_counter(), 0

  def add(self, reviews: int) -> None:
    """Counts reviews that are done."""
    self._reviews += reviews

  def seconds(self) -> float:
    """The time so far."""
    return time.perf_counter() - self._start

  def per_second(self) -> float:
    """The rate so far."""
    return self._reviews / self.seconds()


def means(sums: dict[str, Any]) -> dict[str, float]:
  """Divides a step's sums, float [] each, by the weight they stand for."""
  weight = float(sums['weight'])
  return {'loss': float(sums['loss']) / weight,
          'accuracy': float(sums['correct']) / weight, 'n': round(weight)}


def fail(message: str) -> None:
  """Prints an error as one line on standard error."""
  print('error: ' + ' '.join(message.split()), file=sys.stderr)


def _flat(tree: dict[str, Any]) -> dict[str, float]:
  """{'train': {'loss': 0.1}} -> {'train/loss': 0.1}."""
  flat: dict[str, float] = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= {f'{key}/{k}': v for k, v in _flat(value).items()}
    else:
      flat[key] = value
  return flat
