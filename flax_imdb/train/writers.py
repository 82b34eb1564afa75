"""What a run writes of each epoch: metrics.jsonl and TensorBoard events."""

import json
import time
from typing import Any, Self

from flax.traverse_util import flatten_dict

from flax_imdb.cluster import processes
from flax_imdb.errors import UserError
from flax_imdb.storage import files

_MOST_BYTES = 1 << 24  # of metrics.jsonl: 50,000 epochs of 300 bytes each


class Writers:
  """metrics.jsonl and TensorBoard events of a run directory.

  metrics.jsonl holds nothing that depends on the machine's speed: the lines of
  two runs of one config can be compared byte by byte. A context manager.
  """

  def __init__(self, workdir: str, step: int):
    """Goes on after `step`: what an interrupted run wrote beyond it is cut.

    Of several processes the first one writes, and the others' are silent.

    Raises:
      UserError: a line is damaged, or nothing can be written.
    """
    self._silent = processes.index() > 0
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
          if json.loads(line)['step'] <= step:
            kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError) as e:
          raise UserError(f'{self._path} has a damaged line {line!r:.40}: '
                          'delete the line, or take another --workdir') from e
    files.write(self._path, b''.join(kept))
    self._start = step
    self._events: Any = None
    self._staging = files.staging(workdir)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def write(self, line: dict[str, Any], rates: dict[str, float]) -> None:
    """Writes one line, on disk when this returns.

    Args:
      line: must have 'step'; nested dicts become tags such as train/loss.
      rates: figures that only TensorBoard is told, such as seconds.

    Raises:
      UserError: it can't be written; a half-written line is cut when the run
        resumes.
    """
    if self._silent:
      return
    files.append(self._path, json.dumps(line) + '\n')
    values = [{'tag': tag, 'simple_value': value} for tag, value in
              flatten_dict(line | rates, sep='/').items() if tag != 'step']
    with files.writing(self._path.parent / 'events'):
      self._write_event(line['step'], summary={'value': values})
      self._staging.publish()

  def _write_event(self, step: int, **what: Any) -> None:
    # Only now: it imports PyTorch where there is one, a second that the first
    # step need not wait for. Not SummaryWriter: what its flush() leaves in the
    # queue of its thread is lost in a kill.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2

    if self._events is None:
      self._events = EventsWriter(
          f'{self._staging.folder}/events', f'.{self._start}')
      log = event_pb2.SessionLog
      self._write_event(  # events past it are purged
          self._start + 1, session_log=log(status=log.START))
    self._events.write_event(
        event_pb2.Event(wall_time=time.time(), step=step, **what))
    self._events.flush()

  def close(self) -> None:
    """Closes the events file; raises as `write`."""
    if self._silent:
      return
    if self._events is not None:
      with files.writing(self._path.parent / 'events'):
        self._events.close()
    self._staging.close()
