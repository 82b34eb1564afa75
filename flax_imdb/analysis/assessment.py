"""What a run's logits on a split say: scores, curves, and where it errs.

Logits are float [n] of two classes, [n, C] of C > 2; labels int [n].
"""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any

import numpy as np
import scipy

from flax_imdb.errors import UserError
from flax_imdb.inference import calibration, evaluate

_MOST_CURVES = 6  # of one class against the others
_GRID = 300  # places along an axis: more points are not seen
_LENGTHS = 10  # groups of reviews by length
MOST_MISTAKES = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
  """A curve of one class against the others, from (0, ..) to (1, ..)."""
  name: str  # of the class
  x: np.ndarray  # float64 [points]
  y: np.ndarray
  area: float  # under the ROC curve; of precision and recall the mean precision


@dataclasses.dataclass(frozen=True, eq=False)
class Assessment:
  """What there is to say of a split."""
  scores: dict[str, float]  # as of `evaluate.score`
  confusion: np.ndarray  # int64 [K, K], see `confusion`
  ece: float  # of calibrated probabilities, see `calibration`
  reliability: list[dict[str, Any]]  # the same by confidence
  roc: list[Curve]  # x false and y true positives, as shares
  precision_recall: list[Curve]  # x recall, y precision
  by_length: list[dict[str, float]]  # as of `accuracy_by_length`
  mistakes: list[int]  # rows, the most confident first


def assess(logits: np.ndarray, labels: np.ndarray, lengths: np.ndarray,
           temperature: float, names: Sequence[str]) -> Assessment:
  """Assesses a split whose reviews have int [n] lengths, in words.

  Probabilities are of logits / temperature; `names` are those of the classes.
  Raises UserError if a logit is not finite, and ImportError without
  scikit-learn.
  """
  if not np.isfinite(logits).all():
    raise UserError('some of its logits are not finite: train it again with '
                    'a lower config.learning_rate')
  divided = logits.astype(np.float64) / temperature
  right = evaluate.predicted(logits) == labels
  roc, precision_recall = _curves(divided, labels, names)
  wrong = np.flatnonzero(~right)
  order = np.argsort(-_confidence(divided)[wrong], kind='stable')
  return Assessment(
      evaluate.score(logits, labels),
      evaluate.confusion_matrix(logits, labels),
      calibration.expected_calibration_error(divided, labels),
      calibration.reliability(divided, labels), roc, precision_recall,
      accuracy_by_length(right, lengths),
      wrong[order[:MOST_MISTAKES]].tolist())


def accuracy_by_length(
    right: np.ndarray, lengths: np.ndarray) -> list[dict[str, float]]:
  """Ten groups of reviews by length, about as many in each: a row a group.

  `right` is bool [n], `lengths` int [n]. A row has least, middle (the median)
  and most, lengths; n; accuracy; and its standard error as error. Equal lengths
  stay together, so there may be fewer groups.
  """
  edges = np.unique(np.quantile(
      lengths, np.linspace(0, 1, _LENGTHS + 1)[1:], method='lower'))
  group = np.searchsorted(edges, lengths)
  rows = []
  for i in np.unique(group):
    inside = group == i
    p, n = right[inside].mean(), inside.sum()
    of_group = lengths[inside]
    rows.append({
        'least': float(of_group.min()), 'middle': float(np.median(of_group)),
        'most': float(of_group.max()), 'n': float(n), 'accuracy': float(p),
        'error': evaluate.share_error(p, n)})
  return rows


def _confidence(logits: np.ndarray) -> np.ndarray:
  """float64 [n], in the order of the probability of what is predicted.

  Of two classes the distance from 0: probabilities near 1 are equal.
  """
  if logits.ndim == 1:
    return np.abs(logits)
  largest = np.sort(logits, axis=1)
  return largest[:, -1] - scipy.special.logsumexp(largest[:, :-1], axis=1)


def _curves(logits: np.ndarray, labels: np.ndarray,
            names: Sequence[str]) -> tuple[list[Curve], list[Curve]]:
  """ROC and precision-recall of the second class, or of each of several.

  Of more than six those with the least area under the ROC curve. A class that
  no review has, or all have, has none.
  """
  from sklearn import metrics  # only now: it takes a second

  found = []
  for name, scores, is_one in _against_the_others(logits, labels, names):
    false, true, _ = metrics.roc_curve(is_one, scores)
    precision, recall, _ = metrics.precision_recall_curve(is_one, scores)
    found.append((
        Curve(name, *_thinned(false, true), float(metrics.auc(false, true))),
        Curve(name, *_thinned(recall[::-1], precision[::-1]),
              float(metrics.average_precision_score(is_one, scores)))))
  kept = sorted(sorted(range(len(found)), key=lambda i: found[i][0].area)[
      :_MOST_CURVES])
  return [found[i][0] for i in kept], [found[i][1] for i in kept]


def _against_the_others(
    logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Iterator[
        tuple[str, np.ndarray, np.ndarray]]:
  """Name, scores float64 [n] and bool [n] of each class that can be told."""
  columns = ([(1, logits)] if logits.ndim == 1 else
             list(enumerate(scipy.special.log_softmax(logits, axis=1).T)))
  for k, scores in columns:
    is_one = labels == k
    if is_one.any() and not is_one.all():
      yield names[k], scores, is_one


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The same curve with the points that are seen: both ends, and all turns."""
  places = np.round(np.stack([x, y]) * _GRID)
  moved = (np.diff(places, axis=1) != 0).any(axis=0)
  kept = np.concatenate([[True], moved]) | np.concatenate([moved, [True]])
  return x[kept], y[kept]
