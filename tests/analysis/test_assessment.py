"""What test logits say: against scikit-learn on all points, and by hand."""

import numpy as np
import pytest
from scipy import special

from flax_imdb.analysis import assessment
from flax_imdb.errors import UserError

metrics = pytest.importorskip('sklearn.metrics')
RNG = np.random.default_rng(0)


def _drawn(n, classes):
  labels = RNG.integers(0, classes, n)
  logits = RNG.normal(size=(n, classes)).astype(np.float32)
  logits[np.arange(n), labels] += 1
  return (logits[:, 1] - logits[:, 0] if classes == 2 else logits), labels


def _names(count):
  return [f'class {i}' for i in range(count)]


def test_areas_are_of_all_points_and_curves_near_them():
  logits, labels = _drawn(5000, 2)
  lengths = RNG.integers(1, 300, 5000)
  found = assessment.assess(logits, labels, lengths, 2.0, _names(2))
  roc, = found.roc
  pr, = found.precision_recall
  assert roc.name == pr.name == 'class 1'
  assert roc.area == pytest.approx(metrics.roc_auc_score(labels, logits))
  assert pr.area == pytest.approx(
      metrics.average_precision_score(labels, logits))
  assert len(roc.x) < 1500
  x, y, _ = metrics.roc_curve(labels, logits)
  assert (roc.x[0], roc.x[-1]) == (x[0], x[-1])
  at = np.linspace(0, 1, 50)
  np.testing.assert_allclose(
      np.interp(at, roc.x, roc.y), np.interp(at, x, y), atol=0.01)


def test_of_many_classes_the_worst_are_drawn_against_the_others():
  logits, labels = _drawn(4000, 9)
  logits[:, :4] *= 0.1  # the first four are the hardest to tell
  found = assessment.assess(
      logits, labels, np.ones(4000, int), 1.0, _names(9))
  scores = special.softmax(logits, axis=1)
  areas = [metrics.roc_auc_score(labels == k, scores[:, k]) for k in range(9)]
  worst = sorted(np.argsort(areas)[:6].tolist())
  assert [curve.name for curve in found.roc] == [f'class {k}' for k in worst]
  assert [curve.area for curve in found.roc] == pytest.approx(
      [areas[k] for k in worst])


def test_a_class_that_no_review_has_is_left_out():
  logits, _ = _drawn(50, 3)
  labels = np.arange(50) % 2
  found = assessment.assess(logits, labels, np.ones(50, int), 1.0, _names(3))
  assert [curve.name for curve in found.roc] == ['class 0', 'class 1']
  one = assessment.assess(
      logits[:, 0], np.zeros(50, int), np.ones(50, int), 1.0, _names(2))
  assert one.roc == one.precision_recall == []


def test_mistakes_are_the_most_confident_first():
  logits = np.array([3, -9, 5, 1, -2, 40, 50], np.float32)
  labels = np.array([0, 1, 1, 0, 1, 0, 0])
  found = assessment.assess(logits, labels, np.ones(7, int), 1.0, _names(2))
  # Also where probabilities of float32 would all be 1.
  assert found.mistakes == [6, 5, 1, 0, 4, 3]
  several = np.array([[9, 8.9, 0], [2, 0, -5], [0, 30, 0]], np.float32)
  found = assessment.assess(
      several, np.array([1, 1, 1]), np.ones(3, int), 1.0, _names(3))
  assert found.mistakes == [1, 0]


def test_logits_that_are_not_finite_are_refused():
  with pytest.raises(UserError, match='not finite'):
    assessment.assess(np.array([np.nan, 1]), np.array([0, 1]),
                      np.ones(2, int), 1.0, _names(2))


def test_groups_by_length_have_all_reviews_and_keep_equals_together():
  lengths = np.sort(RNG.integers(1, 1000, 1000))
  right = RNG.random(1000) < 0.8
  rows = assessment.accuracy_by_length(right, lengths)
  assert len(rows) == 10 and sum(row['n'] for row in rows) == 1000
  for row in rows:
    inside = (lengths >= row['least']) & (lengths <= row['most'])
    assert inside.sum() == row['n'] and 90 <= row['n'] <= 110
    p = right[inside].mean()
    assert row['accuracy'] == p
    assert row['error'] == pytest.approx((p * (1 - p) / row['n']) ** 0.5)
    assert row['middle'] == np.median(lengths[inside])
  equal = assessment.accuracy_by_length(np.ones(5, bool), np.full(5, 7))
  assert [row['n'] for row in equal] == [5]
