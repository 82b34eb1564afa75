"""What a run directory says of itself, in small JSON files.

labels.json holds the names of the classes, in order of their numbers. Older
runs, without it, have `sources.LABELS`. data.json holds by split the SHA-256 of
the reviews that train and validate, with which alone a run goes on; an older
one has none. metrics.jsonl has a line an epoch, summary.json the scores at the
end.

calibration.json holds a step and a temperature: the logits of that step's
weights, which are those that the run evaluates at its end, are divided by it to
become probabilities. A run without validation has none, nor has an older one.
"""

from collections.abc import Sequence
import json
import os
from typing import Any

from flax_imdb.cluster import processes
from flax_imdb.data import classes, sources
from flax_imdb.errors import UserError
from flax_imdb.storage import files

TEMPERATURES = 0.1, 10.0  # the least and the greatest that there may be
_MOST_BYTES = 1 << 10  # of calibration.json; ours have 55
_MOST_DATA_BYTES = 1 << 10  # of data.json; ours have 170
_MOST_LABEL_BYTES = 1 << 20  # of labels.json; `classes` allows 800,000
_MOST_HISTORY_BYTES = 1 << 24  # of metrics.jsonl: 50,000 epochs of 300 each
_MOST_SUMMARY_BYTES = 1 << 24  # a matrix of 1,000 classes has 3 MB


def read_labels(workdir: str) -> tuple[str, ...]:
  """The names of a run's classes, of labels.json; see `classes.check_names`.

  Raises UserError if the file, which may be a stranger's, is damaged or can't
  be read.
  """
  path = files.as_path(workdir) / 'labels.json'
  if not path.exists():
    return sources.LABELS
  content = files.read_bytes(path, _MOST_LABEL_BYTES)
  try:
    names = json.loads(content)
    if not isinstance(names, list):
      raise ValueError('it is no list')
    classes.check_names(names)
  except (ValueError, RecursionError) as e:
    raise UserError(f'{path} holds no names of classes ({e}): copy it again '
                    'from the run directory, or train again') from e
  return tuple(names)


def write_labels(workdir: str, labels: Sequence[str]) -> None:
  """Writes labels.json; errors as `files.write`."""
  files.write(f'{workdir}/labels.json',
              json.dumps(labels, ensure_ascii=False, indent=2) + '\n')


def read_data(workdir: str) -> dict[str, Any]:
  """The SHA-256 of each split of a run, of data.json; {} of an older one.

  Raises UserError if the file, which may be a stranger's, is damaged or can't
  be read.
  """
  path = files.as_path(workdir) / 'data.json'
  if not files.exists(path):
    return {}
  return _read_object(path, files.read_bytes(path, _MOST_DATA_BYTES))


def write_data(workdir: str, data_sha256: dict[str, str]) -> None:
  """Writes data.json; errors as `files.write`."""
  files.write(f'{workdir}/data.json', json.dumps(data_sha256, indent=2) + '\n')


def read_history(workdir: str) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl, one an epoch; [] before the first has ended.

  Each has epoch, step, and the scores of train and, if there is one, of
  validation. A last line that is half-written is left out. Raises UserError if
  another, which may be a stranger's, is damaged, or the file can't be read.
  """
  path = files.as_path(workdir) / 'metrics.jsonl'
  if not path.exists():
    return []
  lines = files.read_bytes(path, _MOST_HISTORY_BYTES).splitlines(keepends=True)
  return [_read_object(path, line) for line in lines if line.endswith(b'\n')]


def read_summary(workdir: str) -> dict[str, Any]:
  """What summary.json holds, as `train` returned it.

  Raises UserError if the run has not ended, or the file, which may be a
  stranger's, is damaged or can't be read.
  """
  path = files.as_path(workdir) / 'summary.json'
  if not path.exists():
    raise UserError(f'{workdir} has no summary.json yet: train it to its end')
  return _read_object(path, files.read_bytes(path, _MOST_SUMMARY_BYTES))


def write_summary(workdir: str, summary: dict[str, Any]) -> None:
  """Writes summary.json from the first process; errors as `files.write`."""
  if processes.index() == 0:
    files.write(f'{workdir}/summary.json', json.dumps(summary, indent=2) + '\n')


def read_temperature(path: str | os.PathLike[str], step: int) -> float:
  """What `write_calibration` wrote of this step; 1.0 if of another, or nothing.

  Raises UserError if the file, which may be a stranger's, is damaged or can't
  be read.
  """
  if not files.as_path(path).exists():
    return 1.0
  content = files.read_bytes(path, _MOST_BYTES)
  try:
    found = json.loads(content)
    fitted, temperature = found['step'], found['temperature']
    least, most = TEMPERATURES
    if type(fitted) is not int or len(found) > 2:
      raise ValueError('it holds more than a step and a temperature, or others')
    if type(temperature) is not float or not least <= temperature <= most:
      raise ValueError(f'its temperature is {temperature!r:.40}, not a number '
                       f'from {least} to {most}')
  except (ValueError, TypeError, KeyError, RecursionError) as e:
    raise UserError(f'{os.fspath(path)} is not a calibration ({e}): copy it '
                    'again from the run directory, or train again') from e
  return temperature if fitted == step else 1.0


def write_calibration(workdir: str, step: int, temperature: float) -> None:
  """Writes calibration.json from the first process; errors as `files.write`.

  `temperature`, in the bounds of `TEMPERATURES`, is for the weights of `step`.
  """
  if processes.index() == 0:
    files.write(f'{workdir}/calibration.json', json.dumps(
        {'step': step, 'temperature': temperature}, indent=2) + '\n')


def _read_object(path: files.Path, content: bytes) -> dict[str, Any]:
  try:
    found = json.loads(content)
    if not isinstance(found, dict):
      raise ValueError('it is no object')
  except (ValueError, RecursionError) as e:
    raise UserError(f'{path} is damaged ({e}) where it says {content!r:.40}: '
                    'copy it again from the run directory, or train again'
                    ) from e
  return found
