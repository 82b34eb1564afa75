"""How far a probability can be believed, and the temperature that mends it.

A model that goes on learning once it is right grows too sure of itself. Its
logits divided by one number, chosen on reviews that did not train it, are as
sure as it is right; what is predicted stays.

Logits are float [n] of two classes, [n, C] of C > 2; labels int [n].
"""

from typing import Any

import numpy as np
import scipy

from flax_imdb.checkpoint.records import TEMPERATURES
from flax_imdb.inference.evaluate import predicted, score

_BINS = 15  # of Guo et al.
_HALVINGS = 64  # of an interval of 10, more than float64 can tell apart


def calibrate(validation: tuple[np.ndarray, np.ndarray],
              test: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
  """Fits the temperature on validation; scores both splits with it.

  A split is its logits and labels. Returns temperature; of both splits loss, as
  of `score`, and ece, as of `expected_calibration_error`; of test
  `reliability`, too.
  """
  temperature = fit_temperature(*validation)
  result: dict[str, Any] = {'temperature': temperature}
  for name, (logits, labels) in ('validation', validation), ('test', test):
    divided = logits.astype(np.float64) / temperature
    result[name] = {'loss': score(divided, labels)['loss'],
                    'ece': expected_calibration_error(divided, labels)}
    if name == 'test':
      result[name]['reliability'] = reliability(divided, labels)
  return result


def text(calibrated: dict[str, Any]) -> str:
  """One line about what `calibrate` returned."""
  return ('calibrated: temperature {temperature:.3f}  expected calibration '
          'error {test[ece]:.4f} on test').format(**calibrated)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
  """The T with the least mean cross entropy of logits / T.

  Computed in float64. One of `TEMPERATURES`: where all are right the loss falls
  with T for ever, and where most are wrong it rises. 1.0 where a logit is not
  finite, for no T is better. Source: Guo, Pleiss, Sun & Weinberger 2017,
  section 4.2.
  """
  z = logits.astype(np.float64)
  if not np.isfinite(z).all():
    return 1.0
  # The loss is convex in 1 / T, so its slope there changes sign only once.
  low, high = (1 / t for t in reversed(TEMPERATURES))
  for _ in range(_HALVINGS):
    middle = (low + high) / 2
    if _slope(middle * z, z, labels) > 0:
      high = middle
    else:
      low = middle
  return 2 / (low + high)


def _slope(scaled: np.ndarray, z: np.ndarray, labels: np.ndarray) -> float:
  """The slope of the mean loss of `scaled` in the factor that scales z."""
  if z.ndim == 1:
    return ((_logistic(scaled) - labels) * z).mean()
  expected = (scipy.special.softmax(scaled, axis=1) * z).sum(axis=1)
  return (expected - z[np.arange(len(z)), labels]).mean()


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
  """How far confidence and accuracy are apart, averaged over reviews: 0 to 1.

  The sum over the bins B of `reliability`, of which arguments are, of
  |B| / n * |accuracy(B) - confidence(B)|. Source: Guo et al. 2017, equation 3,
  after Naeini, Cooper & Hauskrecht 2015.
  """
  return sum(row['n'] * abs(row['accuracy'] - row['confidence'])
             for row in reliability(logits, labels)) / len(logits)


def reliability(logits: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
  """Reviews by confidence, the probability of the class that is predicted.

  A row is a bin, one of 15 of equal width, ((m - 1) / 15, m / 15]: n, the
  reviews in it; their mean confidence; their accuracy. Bins without reviews are
  left out: of two classes the first seven always are. Source: Guo et al. 2017,
  section 2.
  """
  z = logits.astype(np.float64)
  confidence = (_logistic(np.abs(z)) if z.ndim == 1
                else scipy.special.softmax(z, axis=1).max(axis=1))
  right = predicted(z) == labels
  bins = np.searchsorted(np.linspace(0, 1, _BINS + 1), confidence)
  return [{'n': int(inside.sum()),
           'confidence': float(confidence[inside].mean()),
           'accuracy': float(right[inside].mean())}
          for inside in (bins == m for m in np.unique(bins))]


def _logistic(x: np.ndarray) -> np.ndarray:
  """1 / (1 + exp(-x)), of which exp would overflow."""
  return 0.5 + np.tanh(x / 2) / 2
