"""Classes: names that can be shown, shares, and what a review counts."""

import numpy as np
import pytest

from flax_imdb.data import classes


@pytest.mark.parametrize(('names', 'says'), [
    (['one'], '1 classes are not 2 to 1,000'),
    ([str(i) for i in range(1001)], '1,001 classes are not'),
    (['a', ''], 'no printable text of 1 to 200'), (['a', 7], 'no printable'),
    (['a', None], 'no printable'), (['a', 'x' * 201], 'no printable'),
    (['a', 'b\nc'], 'no printable'), (['a', '\x1b[2J'], 'no printable'),
    (['a', 'b', 'a'], 'the same name')])
def test_names_that_can_not_be_used_are_refused(names, says):
  with pytest.raises(ValueError, match=says) as caught:
    classes.check_names(names)
  assert '\n' not in str(caught.value)


def test_names_that_can_be_used():
  classes.check_names(['1', 'Börse & Geld'])
  classes.check_names([str(i) for i in range(1000)])


def test_shares_are_of_labels_of_any_kind():
  def shares(labels, dtype, count):
    return classes.shares(np.array(labels, dtype), count).tolist()
  assert shares([2, -1, 0], 'i2', 3) == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
  assert shares([1, 0.25, -1], 'f4', 2) == [[0, 1], [0.75, 0.25], [0, 0]]
  assert shares([[0.5, 0.25, 0.25], [-1, -1, -1]], 'f4', 3) == [
      [0.5, 0.25, 0.25], [0, 0, 0]]


@pytest.mark.parametrize('count', [2, 4])
def test_balanced_weights_are_those_of_scikit_learn(count):
  weight = pytest.importorskip('sklearn.utils.class_weight')
  labels = np.random.default_rng(0).choice(
      count, 90, p=[0.9, 0.1] if count == 2 else [0.6, 0.2, 0.15, 0.05])
  got = classes.weights('balanced', labels, count)
  np.testing.assert_allclose(got, weight.compute_class_weight(
      'balanced', classes=np.arange(count), y=labels), rtol=1e-12)
  assert got[labels].sum() == pytest.approx(90)  # all together as many
  assert np.ptp(np.bincount(labels, got[labels])) < 1e-9  # each class the same


def test_reviews_without_a_label_and_classes_without_reviews_do_not_count():
  labels = np.array([0, 0, 0, 1, -1, -1], np.int16)
  got = classes.weights('balanced', labels, 3)
  np.testing.assert_allclose(got[:2], [4 / 9, 4 / 3])
  assert np.isfinite(got).all()
  assert classes.weights('none', labels, 3) is None


def test_pseudo_labels_count_by_their_shares():
  labels = np.array([[1, 0, 0], [0.5, 0.25, 0.25], [0, 0, 1]], np.float32)
  np.testing.assert_allclose(
      classes.weights('balanced', labels, 3), 3 / (3 * labels.sum(axis=0)))
