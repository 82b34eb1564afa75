"""Classes: their names, how much of each a review is, what each counts.

Two are told apart by one number, positive for the second of them; K > 2 have a
number each.
"""

from collections.abc import Sequence

import numpy as np

MOST = 1000
MOST_CHARACTERS = 200  # of a name


def columns(class_count: int) -> int:
  """How many numbers, such as logits, tell K classes apart."""
  return 1 if class_count == 2 else class_count


def check_names(names: Sequence[str]) -> None:
  """Raises ValueError, in one line, unless these are names of classes.

  They are 2 to `MOST` texts that differ, printable and of 200 characters at
  most: of a prediction's line each is a part.
  """
  if not 2 <= len(names) <= MOST:
    raise ValueError(f'{len(names):,} classes are not 2 to {MOST:,}')
  for name in names:
    if (not isinstance(name, str) or not name.isprintable()
        or not 1 <= len(name) <= MOST_CHARACTERS):
      raise ValueError(f'the class {name!r:.40} is no printable text of 1 to '
                       f'{MOST_CHARACTERS} characters')
  if len({*names}) < len(names):
    raise ValueError('two classes have the same name')


def shares(labels: np.ndarray, class_count: int) -> np.ndarray:
  """float64 [n, K], how much of each class a review is; nothing if unknown.

  Labels are int [n]; or float, as a teacher gave them: [n] the probability of
  the second of two classes, or [n, K] of each. Negative is unknown.
  """
  if labels.ndim == 2:
    return np.where(labels < 0, 0, labels).astype(np.float64)
  if labels.dtype.kind == 'f':
    known = np.where(labels < 0, 0, [1 - labels, labels])
    return known.T.astype(np.float64)
  return (labels[:, None] == np.arange(class_count)).astype(np.float64)


def weights(kind: str, labels: np.ndarray,
            class_count: int) -> np.ndarray | None:
  """float64 [K], what a review of each class counts; None where all count 1.

  `kind` is config.class_weights, labels are as of `shares`. Balanced, a review
  counts n / (K * the reviews of its class), with n those that have a label:
  each class counts as much as any other, and all together n. Source: King &
  Zeng 2001, as `compute_class_weight` of scikit-learn has it.
  """
  if kind == 'none':
    return None
  count_K = shares(labels, class_count).sum(axis=0)
  # What one without reviews counts does not matter.
  return count_K.sum() / (class_count * np.maximum(count_K, 1e-9))
