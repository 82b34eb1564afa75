"""The linear model: the minimum that Newton's method finds, too."""

import numpy as np
from scipy import sparse

from flax_imdb.data import linear


def _problem(n=300, n_grams=12, soft=False):
  rng = np.random.default_rng(0)
  present = (rng.random((n, n_grams)) < 0.4).astype(np.float32)
  log_odds = rng.normal(size=n_grams).astype(np.float32)
  p = 1 / (1 + np.exp(-present @ (log_odds * rng.random(n_grams)) - 0.3))
  return present, log_odds, p if soft else (rng.random(n) < p).astype(float)


def _newton(x, y):
  """The weights of the penalised logistic regression, in float64."""
  x, w, penalty = x.astype(np.float64), np.zeros(x.shape[1]), 1 / 0.1
  for _ in range(20):
    p = 1 / (1 + np.exp(-x @ w))
    hessian = (x.T * (p * (1 - p))) @ x + penalty * np.eye(len(w))
    w -= np.linalg.solve(hessian, x.T @ (p - y) + penalty * w)
  return w


def test_it_is_the_minimum_of_the_penalised_loss():
  for soft in (False, True):
    present, log_odds, targets = _problem(soft=soft)
    want = _newton(present * log_odds, targets)
    weights = linear.fit(
        sparse.csr_matrix(present), log_odds[:, None],
        np.stack([1 - targets, targets], axis=1))
    assert weights.dtype == np.float32
    # Its gradient is of float32, and it stops when little changes.
    np.testing.assert_allclose(weights, want * log_odds, atol=1e-3)
    assert np.abs(want).max() > 0.1
