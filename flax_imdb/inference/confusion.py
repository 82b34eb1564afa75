"""Which classes are taken for which: the confusion matrix, and what it says.

A matrix is int64 [K, K]; row i are the reviews of class i, column j those that
are predicted as class j.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

_MOST_CLASSES = 100  # whose matrix is kept: of 1,000 it would have a million
_MOST_ROWS = 20  # of a table on the screen


def matrix(
    predicted: np.ndarray, labels: np.ndarray, class_count: int) -> np.ndarray:
  """Counts reviews by label and prediction, int [n] of 0 to K - 1 each."""
  cells = labels.astype(np.int64) * class_count + predicted
  return np.bincount(
      cells, minlength=class_count**2).reshape(class_count, class_count)


def by_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
  """precision, recall and f1, float64 [K], and support, int64 [K].

  Precision is the share of right ones among what is predicted as a class,
  recall among its reviews, F1 their harmonic mean, support how many reviews it
  has. What would be 0 / 0 is 0. Source: van Rijsbergen 1979, chapter 7.
  """
  right = np.diag(confusion)
  predicted, support = confusion.sum(axis=0), confusion.sum(axis=1)
  def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
  return {'precision': share(right, predicted), 'recall': share(right, support),
          'f1': share(2 * right, predicted + support), 'support': support}


def macro_f1(confusion: np.ndarray) -> float:
  """The mean F1 of the classes, of which each counts as much.

  As in scikit-learn without those that have no review and are not predicted
  either, of which nothing is known.
  """
  known = confusion.sum(axis=0) + confusion.sum(axis=1) > 0
  return float(by_class(confusion)['f1'][known].mean())


def summary(confusion: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
  """What summary.json holds: classes, by name as of `by_class`; confusion.

  The matrix of more than 100 classes is left out.
  """
  figures = by_class(confusion)
  found: dict[str, Any] = {'classes': {
      name: {key: x[i].item() for key, x in figures.items()}
      for i, name in enumerate(names)}}
  if len(names) <= _MOST_CLASSES:
    found['confusion'] = confusion.tolist()
  return found


def largest_share(confusion: np.ndarray) -> float:
  """The accuracy of always saying the class that has the most reviews."""
  return float(confusion.sum(axis=1).max() / confusion.sum())


def rows(confusion: np.ndarray, names: Sequence[str]) -> list[dict[str, str]]:
  """`by_class` as texts: name, its figures, and what it is mostly taken_for.

  Of more than 20 classes those with the lowest F1.
  """
  figures = by_class(confusion)
  shown = list(range(len(names)))
  if len(names) > _MOST_ROWS:
    shown = np.argsort(figures['f1'], kind='stable')[:_MOST_ROWS].tolist()
  wrong = confusion - np.diag(np.diag(confusion))
  found = []
  for i in shown:
    other = int(wrong[i].argmax())
    found.append({
        'name': names[i],
        **{key: f'{figures[key][i]:.4f}' for key in (
            'precision', 'recall', 'f1')},
        'support': f'{figures["support"][i]:,}', 'taken_for': (
            f'{names[other]} ({wrong[i, other]:,})' if wrong[i, other] else '')
    })
  return found


def table(confusion: np.ndarray, names: Sequence[str]) -> str:
  """Lines of `rows`, and macro F1."""
  found = [('class', 'precision', 'recall', 'F1', 'reviews', 'taken for'),
           *(tuple(row.values()) for row in rows(confusion, names))]
  widths = [max(map(len, column)) for column in zip(*found, strict=True)]
  first, *numbers, _ = widths
  lines = ['  '.join([
      f'{name:<{first}}', *(f'{x:>{width}}' for x, width in zip(
          figures_of, numbers, strict=True)), taken_for]).rstrip()
           for name, *figures_of, taken_for in found]
  if (more := len(names) - len(found) + 1) > 0:
    lines.append(f'and {more:,} more with a higher F1')
  lines.append(f'macro F1 {macro_f1(confusion):.4f}')
  return '\n'.join(f'  {line}' for line in lines)
