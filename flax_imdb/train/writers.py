"""What a run writes of each epoch: metrics.jsonl and TensorBoard events."""

from collections.abc import Sequence
import json
import socket
import time
from typing import Any

from flax.traverse_util import flatten_dict

from flax_imdb.cluster import processes
from flax_imdb.errors import UserError
from flax_imdb.storage import files
from flax_imdb.train import events as event_files

_MOST_BYTES = 1 << 24  # of metrics.jsonl: 50,000 epochs of 300 bytes each


class Writers:
  """metrics.jsonl, byte by byte the same of equal runs, and TensorBoard's."""

  def __init__(self, workdir: str, step: int):
    """Goes on after `step`: what an interrupted run wrote beyond it is cut.

    Raises UserError if a line is damaged, or nothing can be written.
    """
    self.lines: list[dict[str, Any]] = []  # that are there, of all epochs
    self._silent = processes.index() > 0  # of several the first one writes
    if self._silent:
      return
    self._path = files.as_path(workdir) / 'metrics.jsonl'
    kept = []
    if self._path.exists():
      content = files.read_bytes(self._path, _MOST_BYTES)
      for line in content.splitlines(keepends=True):
        if not line.endswith(b'\n'):
          break  # half-written
        try:
          if (found := json.loads(line))['step'] <= step:
            kept.append(line)
            self.lines.append(found)
        except (ValueError, KeyError, TypeError, RecursionError) as e:
          raise UserError(f'{self._path} has a damaged line {line!r:.40}: '
                          'delete the line, or take another --workdir') from e
    files.write(self._path, b''.join(kept))
    self._start = step
    self._events: Any = None  # their file, once there is one

  def write(self, line: dict[str, Any], rates: dict[str, float],
            summaries: Sequence[Any] = ()) -> None:
    """Writes one line, which has a 'step', on disk when this returns.

    TensorBoard is told the `rates` as well, and `summaries`, those of `board`.
    Raises as `files.append`; a half-written line is cut later.
    """
    if self._silent:
      return
    files.append(self._path, json.dumps(line).encode() + b'\n')
    self.lines.append(line)
    step = line['step']
    events = [{'step': step, 'summary': summary} for summary in (
        event_files.scalars(scalars(line | rates)), *summaries)]
    if self._events is None:
      name = f'{time.time():.0f}.{socket.gethostname()}.{self._start}'
      self._events = self._path.with_name(f'events.out.tfevents.{name}')
      events = [event_files.VERSION,
                # START: what other files say of later steps is purged.
                {'step': self._start + 1, 'session_log': {'status': 1}},
                *events]
    files.append(self._events, event_files.records(events))


def scalars(line: dict[str, Any]) -> dict[str, float]:
  """The numbers of a line by tags such as train/loss; not its step."""
  return {tag: value for tag, value in flatten_dict(line, sep='/').items()
          if tag != 'step'}
