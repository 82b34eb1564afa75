"""What a run writes: the terminal, metrics.jsonl and TensorBoard events."""

import json
import os
import pathlib
import tempfile
import time
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeRemainingColumn

from flax_imdb import files
from flax_imdb import remote
from flax_imdb.errors import UserError

_MOST_BYTES = 1 << 24  # of metrics.jsonl: 50,000 epochs of 300 bytes each


class Terminal:
  """Lines for a person: a live one on a terminal, plain ones elsewhere."""

  def __init__(self, quiet: bool = False):
    self._console = Console(highlight=False, soft_wrap=True, markup=False,
                            emoji=False, quiet=quiet)
    self._live: Progress | None = None

  def announce(self, text: str) -> None:
    """Prints a line; above the live one if there is one.

    Raises:
      UserError: it can't be printed, for instance to a file on a full disk.
    """
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


class Writers:
  """metrics.jsonl and TensorBoard events of a run directory.

  metrics.jsonl holds nothing that depends on the machine's speed: the lines of
  two runs of one config can be compared byte by byte.
  """

  def __init__(self, workdir: str, step: int):
    """Goes on after `step`: what an interrupted run wrote beyond it is cut.

    Raises:
      UserError: a line is damaged, or nothing can be written.
    """
    self._path = files.path(workdir) / 'metrics.jsonl'
    kept = []
    if self._path.exists():
      for line in files.read(self._path, _MOST_BYTES).splitlines(keepends=True):
        if not line.endswith(b'\n'):
          break  # half-written
        try:
          if json.loads(line)['step'] <= step:
            kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError) as e:
          raise UserError(f'{self._path} has a damaged line {line!r:.40}: '
                          'delete the line, or take another --workdir') from e
    self._content = b''.join(kept)
    files.write(self._path, self._content)
    self._start = step
    self._events: Any = None
    # Where the events of a remote directory are made, to be copied whole.
    self._local = (tempfile.TemporaryDirectory(prefix='flax_imdb_events_')
                   if remote.is_remote(self._path) else None)

  def write(self, line: dict[str, Any], rates: dict[str, float]) -> None:
    """Writes one line, on disk when this returns.

    Args:
      line: must have 'step'; nested dicts become tags such as train/loss.
      rates: figures that only TensorBoard is told, such as seconds.

    Raises:
      UserError: it can't be written; a half-written line is cut when the run
        resumes.
    """
    text = json.dumps(line) + '\n'
    with files.writing(self._path):
      if remote.is_remote(self._path):  # nothing is added to an object
        self._content += text.encode()
        files.write(self._path, self._content)
      else:
        with open(self._path, 'a', encoding='utf-8') as f:
          f.write(text)
          f.flush()
          os.fsync(f.fileno())
      values = [{'tag': tag, 'simple_value': value}
                for tag, value in _flat(line | rates).items() if tag != 'step']
      self._write_event(line['step'], summary={'value': values})
      if self._local:
        file, = pathlib.Path(self._local.name).iterdir()
        files.write(self._path.with_name(file.name), file.read_bytes())

  def _write_event(self, step: int, **what: Any) -> None:
    # Only now: it imports PyTorch where there is one, a second that the first
    # step need not wait for. Not SummaryWriter: what its flush() leaves in the
    # queue of its thread is lost in a kill.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2

    if self._events is None:
      folder = self._local.name if self._local else self._path.parent
      self._events = EventsWriter(f'{folder}/events', f'.{self._start}')
      log = event_pb2.SessionLog
      self._write_event(  # events past it are purged
          self._start + 1, session_log=log(status=log.START))
    self._events.write_event(
        event_pb2.Event(wall_time=time.time(), step=step, **what))
    self._events.flush()

  def close(self) -> None:
    """Closes the events file; raises as `write`."""
    if self._events is not None:
      with files.writing(f'{self._path.parent}/events'):
        self._events.close()
    if self._local:
      self._local.cleanup()


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


def _flat(tree: dict[str, Any]) -> dict[str, float]:
  """{'train': {'loss': 0.1}} -> {'train/loss': 0.1}."""
  flat: dict[str, float] = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= {f'{key}/{k}': v for k, v in _flat(value).items()}
    else:
      flat[key] = value
  return flat
