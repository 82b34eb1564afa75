"""The confusion matrix and its figures: by hand, and as scikit-learn's."""

import json

import numpy as np
import pytest

from flax_imdb.inference import confusion, evaluate

LABELS = np.array([0, 0, 0, 1, 1, 2])
PREDICTED = np.array([0, 0, 1, 1, 2, 1])


def test_rows_are_labels_and_columns_predictions():
  found = confusion.matrix(PREDICTED, LABELS, 4)
  assert found.tolist() == [
      [2, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
  assert found.dtype == np.int64


def test_figures_by_hand():
  matrix = confusion.matrix(PREDICTED, LABELS, 4)
  got = {k: x.tolist() for k, x in confusion.by_class(matrix).items()}
  assert got == {'precision': [1, 1 / 3, 0, 0],
                 'recall': [pytest.approx(2 / 3), 0.5, 0, 0],
                 'f1': [pytest.approx(0.8), pytest.approx(0.4), 0, 0],
                 'support': [3, 2, 1, 0]}
  # The fourth is neither there nor predicted; the third is, and never right.
  assert confusion.macro_f1(matrix) == pytest.approx(1.2 / 3)


@pytest.mark.parametrize('count', [2, 3, 12])
def test_they_are_those_of_scikit_learn(count):
  metrics = pytest.importorskip('sklearn.metrics')
  rng = np.random.default_rng(count)
  labels = rng.integers(0, count, 60).astype(np.int16)
  labels[labels == count - 1] = 0  # no review of the last class
  logits = rng.normal(size=60) if count == 2 else rng.normal(size=(60, count))
  predicted = evaluate.predicted(logits.astype(np.float32))
  matrix = evaluate.confusion_matrix(logits.astype(np.float32), labels)
  every = range(count)
  np.testing.assert_array_equal(
      matrix, metrics.confusion_matrix(labels, predicted, labels=every))
  *figures, support = metrics.precision_recall_fscore_support(
      labels, predicted, labels=every, zero_division=0)
  got = confusion.by_class(matrix)
  for key, want in zip(
      ('precision', 'recall', 'f1'), figures, strict=True):
    np.testing.assert_allclose(got[key], want, rtol=1e-12)
  np.testing.assert_array_equal(got['support'], support)
  score = evaluate.score(logits.astype(np.float32), labels)
  assert score['macro_f1'] == pytest.approx(metrics.f1_score(
      labels, predicted, average='macro', zero_division=0), rel=1e-12)
  assert score['accuracy'] == metrics.accuracy_score(labels, predicted)
  if count > 2:
    p = np.exp(logits.astype(np.float32).astype(np.float64))
    assert score['loss'] == pytest.approx(metrics.log_loss(
        labels, p / p.sum(axis=1, keepdims=True), labels=every), rel=1e-12)


def test_a_summary_is_json_by_name_and_no_million_of_numbers():
  matrix = confusion.matrix(PREDICTED, LABELS, 3)
  found = confusion.summary(matrix, ['a', 'b', 'Ö'])
  assert json.loads(json.dumps(found)) == found
  assert found['confusion'] == matrix.tolist()
  assert found['classes']['b'] == {
      'precision': 1 / 3, 'recall': 0.5, 'f1': pytest.approx(0.4), 'support': 2}
  names = [str(i) for i in range(101)]
  large = confusion.summary(confusion.matrix(PREDICTED, LABELS, 101), names)
  assert list(large) == ['classes'] and list(large['classes']) == names


def test_a_table_has_a_line_a_class():
  lines = confusion.table(
      confusion.matrix(PREDICTED, LABELS, 3), ['a', 'Börse', 'c']).split('\n')
  assert [line.split() for line in lines] == [
      ['class', 'precision', 'recall', 'F1', 'reviews', 'taken', 'for'],
      ['a', '1.0000', '0.6667', '0.8000', '3', 'Börse', '(1)'],
      ['Börse', '0.3333', '0.5000', '0.4000', '2', 'c', '(1)'],
      ['c', '0.0000', '0.0000', '0.0000', '1', 'Börse', '(1)'],
      ['macro', 'F1', '0.4000']]


def test_of_many_classes_the_worst_are_shown():
  matrix = np.diag(np.arange(1, 31))
  matrix[7, 8] = matrix[22, 3] = 40
  lines = confusion.table(matrix, [f'class{i}' for i in range(30)]).split('\n')
  assert len(lines) == 1 + 20 + 2
  assert {line.split()[0] for line in lines[1:5]} == {
      'class22', 'class3', 'class7', 'class8'}
  assert lines[-2] == '  and 10 more with a higher F1'
