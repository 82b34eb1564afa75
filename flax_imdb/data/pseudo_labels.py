"""Labels that a teacher gave: with what it was, and what they are of."""

import dataclasses
import io
import json
import os
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from flax_imdb.data import classes, sources
from flax_imdb.errors import UserError
from flax_imdb.storage import files, npz

_MOST_BYTES = 1 << 16  # of what is told of the teachers


@dataclasses.dataclass(frozen=True, eq=False)
class PseudoLabels:
  """Of the n reviews of a split without labels, in its order."""
  # float32 [n] that the label is 1, or [n, K] of each of more than two classes.
  probabilities: np.ndarray
  of: dict[str, Any]  # `source` of these
  teachers: list[dict[str, Any]]  # what they were, such as their params_sha256


def source(config: ConfigDict) -> dict[str, Any]:
  """What the reviews without labels of this config are, as `of` says it."""
  data = config.data
  return {'name': data.name, 'split': data.unlabelled_split,
          'fingerprint': sources.fingerprint(data)}


def save(labels: PseudoLabels, path: str | os.PathLike[str]) -> None:
  """Writes `pseudo_labels.npz`; errors as `files.write`."""
  about = json.dumps({'of': labels.of, 'teachers': labels.teachers})
  npz.write_arrays(path, probabilities=labels.probabilities,
                   about=np.frombuffer(about.encode(), np.uint8))


def load(path: str | os.PathLike[str], of: dict[str, Any],
         n: int, class_count: int = 2) -> PseudoLabels:
  """Reads what `save` wrote of n reviews and so many classes.

  Raises UserError if it is missing, damaged, or not of the data set and split
  `of`.
  """
  fix = 'delete it, and training makes it again'
  columns = classes.columns(class_count)
  most = 4 * n * columns + _MOST_BYTES + 4096  # and the heads of the arrays
  content = files.read_bytes(path, most, fix)
  try:
    arrays = npz.read_arrays(io.BytesIO(content), most)
    probabilities = arrays['probabilities']
    about = json.loads(arrays['about'].tobytes()[:_MOST_BYTES])
    found, teachers = about['of'], about['teachers']
    if (probabilities.dtype != np.float32
        or probabilities.shape[1:] != ((columns,) if columns > 1 else ())
        or not ((probabilities >= 0) & (probabilities <= 1)).all()):
      raise ValueError('its labels are no probabilities')
  except (*npz.ERRORS, TypeError, RecursionError) as e:
    raise UserError(f'{os.fspath(path)} is damaged ({e}): {fix}') from e
  if found != of or len(probabilities) != n:
    raise UserError(
        f'{os.fspath(path)} has labels of {len(probabilities):,} reviews of '
        f'{found}, not of {n:,} of {of}: {fix}')
  return PseudoLabels(probabilities, found, teachers)
