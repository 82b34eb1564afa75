"""What a run wrote of itself while it trained: its epochs, its end, its rates.

These files may be a stranger's: what they hold is read as numbers, or refused.
"""

from collections.abc import Iterator
import dataclasses
import struct
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from flax_imdb.checkpoint import records, run
from flax_imdb.config import read_config
from flax_imdb.errors import UserError
from flax_imdb.storage import files

_MOST_EVENT_BYTES = 1 << 26
_MOST_CHARACTERS = 100  # of a version
_MOST_EPOCH = 1 << 31  # steps are int32
_RATE = 'reviews_per_second'  # its tag in TensorBoard's events
# What conversions to numbers raise of a damaged file.
_DAMAGE = ValueError, KeyError, TypeError, AttributeError, OverflowError

Scores = dict[str, float]  # loss, accuracy, n and perhaps macro_f1


@dataclasses.dataclass(frozen=True)
class Epoch:
  """A line of metrics.jsonl."""
  number: int  # from 1
  step: int
  train: Scores
  validation: Scores  # {} of a run that does not validate


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
  """What summary.json says; older ones lack some."""
  step: int
  best_step: int | None
  stopped_epoch: int | None
  scores: dict[str, Scores]  # by split
  linear: dict[str, Scores]  # of the linear model alone, by split
  confusion: np.ndarray | None  # int64 [K, K] of test, see `confusion`
  ece: float | None  # the expected calibration error on test
  reliability: list[dict[str, float]]  # of test, as of `calibration`
  seconds: float
  parameters: int
  params_sha256: str
  environment: dict[str, str]  # versions and devices


@dataclasses.dataclass(frozen=True, eq=False)
class History:
  """A run directory without its weights."""
  workdir: str
  config: ConfigDict
  labels: tuple[str, ...]
  epochs: list[Epoch]  # [] where none has ended
  summary: Summary | None  # None of a run that has not ended
  rates: list[tuple[int, float]]  # step, and reviews a second until then


def read(workdir: str) -> History:
  """Reads a run directory's own account; runs and changes nothing.

  Raises UserError if it is no run directory, or config.json, labels.json,
  metrics.jsonl or summary.json is damaged. A last line that is half-written, as
  a kill leaves it, is left out.
  """
  if not run.is_run(workdir):
    raise UserError(
        f'{workdir} is no run directory: train one with python -m '
        f'flax_imdb.main --workdir={workdir}, or give another')
  labels = records.read_labels(workdir)
  return History(
      workdir, read_config(files.as_path(workdir) / 'config.json'), labels,
      _epochs(workdir), _summary(workdir, len(labels)), _rates(workdir))


def _epochs(workdir: str) -> list[Epoch]:
  found: list[Epoch] = []
  for line in records.read_history(workdir):
    try:
      epoch = Epoch(
          _whole(line['epoch']), _whole(line['step']),
          _scores(line['train']), _scores(line.get('validation')))
      if found and epoch.step <= found[-1].step:
        raise ValueError('it comes before the line above')
      found.append(epoch)
    except _DAMAGE as e:
      raise UserError(
          f'{workdir}/metrics.jsonl has a damaged line {line!r:.40}: delete '
          'the line, or report on another --workdir') from e
  return found


def _summary(workdir: str, class_count: int) -> Summary | None:
  path = files.as_path(workdir) / 'summary.json'
  if not path.exists():
    return None
  found = records.read_summary(workdir)
  try:
    calibrated = found.get('calibration', {}).get('test', {})
    matrix = found.get('test', {}).get('confusion')
    return Summary(
        step=_whole(found['step']),
        best_step=_perhaps(_whole, found.get('best_step')),
        stopped_epoch=_perhaps(_whole, found.get('stopped_epoch')),
        scores={name: _scores(found[name]) for name in (
            'train', 'validation', 'test') if name in found},
        linear={name: _scores(found['linear'][name]) for name in (
            'validation', 'test') if name in found.get('linear', {})},
        confusion=None if matrix is None else _matrix(matrix, class_count),
        ece=_perhaps(float, calibrated.get('ece')),
        reliability=[{key: float(row[key]) for key in (
            'n', 'confidence', 'accuracy')}
                     for row in calibrated.get('reliability', ())],
        seconds=float(found['seconds']),
        parameters=_whole(found['parameters']),
        params_sha256=str(found['params_sha256'])[:64],
        environment={
            str(name)[:_MOST_CHARACTERS]: str(value)[:_MOST_CHARACTERS]
            for name, value in found.get('environment', {}).items()})
  except _DAMAGE as e:
    raise UserError(f'{path} is damaged ({type(e).__name__}: {e!s:.60}): '
                    'delete it and start the run again, which evaluates and '
                    'writes it anew') from e


def _whole(value: Any) -> int:
  if type(value) is not int or not 0 <= value < _MOST_EPOCH:
    raise ValueError(f'{value!r:.40} is no whole number of its kind')
  return value


def _perhaps(kind: Any, value: Any) -> Any:
  return None if value is None else kind(value)


def _scores(values: Any) -> Scores:
  """Loss, accuracy, n and what else is known of them, as numbers."""
  if values is None:
    return {}
  found = {key: float(values[key]) for key in ('loss', 'accuracy', 'n')}
  if 'macro_f1' in values:
    found['macro_f1'] = float(values['macro_f1'])
  return found


def _matrix(values: Any, class_count: int) -> np.ndarray:
  matrix = np.array(values)
  if (matrix.shape != (class_count, class_count) or matrix.dtype != np.int64
      or matrix.min() < 0):
    raise ValueError(f'its matrix is not one of {class_count} classes')
  return matrix


def _rates(workdir: str) -> list[tuple[int, float]]:
  """Of each epoch the rate that TensorBoard was told last; [] if of none.

  The events are beside the run, not of it: of what is damaged nothing is read,
  as TensorBoard does.
  """
  found: dict[int, float] = {}
  for path in sorted(
      files.as_path(workdir).glob('events.out.tfevents.*'), key=str):
    try:
      content = files.read_bounded(path, _MOST_EVENT_BYTES)
    except (ValueError, OSError):
      continue
    found |= dict(_rates_of(content))
  return sorted(found.items())


def _rates_of(content: bytes) -> Iterator[tuple[int, float]]:
  """Step and rate of the records that are whole, see `writers`."""
  from google.protobuf.message import DecodeError
  from tensorboardX.proto.event_pb2 import Event  # takes a second

  at = 0
  while at + 12 <= len(content):
    (length,) = struct.unpack_from('<Q', content, at)
    at += length + 16
    if at > len(content):
      return
    event = Event()
    try:
      event.ParseFromString(content[at - length - 4:at - 4])
    except DecodeError:
      return
    for value in event.summary.value:
      if value.tag == _RATE and np.isfinite(value.simple_value):
        yield event.step, value.simple_value
