"""The temperature is the one that is best, and errors are as by hand."""

import math

import numpy as np
import pytest

from flax_imdb.checkpoint.records import TEMPERATURES
from flax_imdb.inference import calibration
from flax_imdb.inference.evaluate import score


def _drawn(temperature, n=20_000):
  """Logits [n], and labels that are right as often as logits / T say."""
  rng = np.random.default_rng(0)
  logits = (3 * rng.normal(size=n)).astype(np.float32)
  share = 1 / (1 + np.exp(-logits / temperature))
  return logits, (rng.uniform(size=n) < share).astype(np.int8)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.5])
def test_the_temperature_with_which_labels_were_drawn_is_found(temperature):
  logits, labels = _drawn(temperature)
  found = calibration.fit_temperature(logits, labels)
  assert type(found) is float and found == pytest.approx(temperature, rel=0.03)
  assert found == calibration.fit_temperature(logits, labels)
  z = logits.astype(np.float64)
  least = score(z / found, labels)['loss']
  for other in (found * 0.999, found * 1.001):
    assert score(z / other, labels)['loss'] > least
  # As sure as it is right, on what it was fitted to.
  before, after = (calibration.expected_calibration_error(z / t, labels)
                   for t in (1.0, found))
  assert after < 0.01 and (temperature == 1 or before > 5 * after)


@pytest.mark.parametrize(('logits', 'labels', 'want'), [
    ([-2, 3, 1e-3], [0, 1, 1], TEMPERATURES[0]),  # all right
    ([3e38], [1], TEMPERATURES[0]),
    ([-2, 3, 1], [1, 0, 0], TEMPERATURES[1]),  # all wrong
    ([1, 1, 1], [1, 1, 0], 1 / math.log(2)),
    ([1, math.inf], [1, 1], 1.0), ([1, math.nan], [1, 1], 1.0)])
def test_the_temperature_has_bounds(logits, labels, want):
  found = calibration.fit_temperature(
      np.array(logits, np.float32), np.array(labels, np.int8))
  least, most = TEMPERATURES
  assert least <= found <= most and found == pytest.approx(want, rel=1e-14)


def test_of_several_classes_the_temperature_is_found_and_is_the_best():
  rng = np.random.default_rng(0)
  z = (3 * rng.normal(size=(20_000, 3))).astype(np.float32)
  labels = (z / 2.5 + rng.gumbel(size=z.shape)).argmax(axis=1)
  found = calibration.fit_temperature(z, labels)
  assert type(found) is float and found == pytest.approx(2.5, rel=0.03)
  least = score(z.astype(np.float64) / found, labels)['loss']
  for other in (found * 0.999, found * 1.001):
    assert score(z.astype(np.float64) / other, labels)['loss'] > least
  before, after = (calibration.expected_calibration_error(z / t, labels)
                   for t in (1.0, found))
  assert after < 0.015 and before > 5 * after
  assert calibration.fit_temperature(
      np.full((4, 3), np.nan, np.float32), labels[:4]) == 1.0


def test_of_several_classes_confidence_is_that_of_the_predicted_one():
  p = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.25, 0.5, 0.25]])
  rows = calibration.reliability(np.log(p), np.array([0, 2, 0]))
  assert rows == [
      {'n': 2, 'confidence': pytest.approx(0.5), 'accuracy': 0.5},
      {'n': 1, 'confidence': pytest.approx(0.8), 'accuracy': 1.0}]


def _logit(p):
  return math.log(p / (1 - p))


def test_errors_are_those_computed_by_hand():
  """Of 8/15 < 0.55 < 9/15 one bin, of 10/15 < 0.7 < 11/15 another, and 1."""
  logits = np.array([_logit(0.55), -_logit(0.57), _logit(0.7), _logit(0.72),
                     -_logit(0.68), -50.0])
  labels = np.array([1, 1, 1, 0, 0, 0])
  assert calibration.reliability(logits, labels) == [
      {'n': 2, 'confidence': pytest.approx(0.56), 'accuracy': 0.5},
      {'n': 3, 'confidence': pytest.approx(0.7),
       'accuracy': pytest.approx(2 / 3)},
      {'n': 1, 'confidence': pytest.approx(1), 'accuracy': 1.0}]
  error = calibration.expected_calibration_error(logits, labels)
  assert error == pytest.approx((2 * 0.06 + 3 * (0.7 - 2 / 3)) / 6)


def test_bins_have_the_edges_of_guo_et_al():
  """(7/15, 8/15], and so on; 0 is sure by half, and counts as negative."""
  edge = _logit(8 / 15)
  rows = calibration.reliability(
      np.array([0.0, edge - 1e-9, edge + 1e-9]), np.array([0, 1, 1]))
  assert [row['n'] for row in rows] == [2, 1]
  assert rows[0]['confidence'] == pytest.approx((0.5 + 8 / 15) / 2)
  last, = calibration.reliability(np.array([_logit(0.95), 50]), np.ones(2))
  assert last['n'] == 2 and last['accuracy'] == 1  # 1 is in the last bin
  assert calibration.expected_calibration_error(
      np.zeros(4), np.array([0, 1, 1, 1])) == 0.25


def test_both_splits_are_scored_with_the_temperature_of_validation():
  validation, test = _drawn(2.0), _drawn(0.5, n=300)
  found = calibration.calibrate(validation, test)
  assert list(found) == ['temperature', 'validation', 'test']
  assert found['temperature'] == calibration.fit_temperature(*validation)
  for name, (logits, labels) in ('validation', validation), ('test', test):
    z = logits.astype(np.float64) / found['temperature']
    assert found[name]['loss'] == score(z, labels)['loss']
    assert found[name]['ece'] == calibration.expected_calibration_error(
        z, labels)
  assert set(found['validation']) == {'loss', 'ece'}
  rows = found['test']['reliability']
  assert sum(row['n'] for row in rows) == 300
  assert rows == calibration.reliability(z, labels)


def test_what_is_not_finite_is_scored_so():
  """As by `score`: the summary says NaN, and the run ends as it did."""
  bad = np.array([1.0, math.nan], np.float32), np.array([1, 0], np.int8)
  found = calibration.calibrate(bad, bad)
  assert found['temperature'] == 1.0
  assert math.isnan(found['test']['loss']) and math.isnan(found['test']['ece'])


def test_text_of_a_calibration():
  assert calibration.text({
      'temperature': 1.10172, 'test': {'ece': 0.00826}}) == (
          'calibrated: temperature 1.102  expected calibration error 0.0083 on '
          'test')
