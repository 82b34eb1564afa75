"""The linear model: the minimum that other methods find, too."""

import numpy as np
import pytest
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


def _of_four(n=300, n_grams=12):
  """present, log_odds [N, 4], labels [n]."""
  rng = np.random.default_rng(0)
  present = (rng.random((n, n_grams)) < 0.4).astype(np.float32)
  log_odds = rng.normal(size=(n_grams, 4)).astype(np.float32)
  z = present @ log_odds + rng.gumbel(size=(n, 4))
  return present, log_odds, z.argmax(axis=1)


def test_of_several_classes_no_step_lessens_the_loss_of_the_softmax():
  present, log_odds, labels = _of_four()
  counts = 0.5 + labels
  found = linear.fit(sparse.csr_matrix(present), log_odds, np.eye(4)[labels],
                     counts)
  assert found.dtype == np.float32 and found.shape == (12, 4)
  def loss(weights):
    z = present.astype(np.float64) @ (weights * log_odds)
    losses = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), labels]
    return counts @ losses + (weights**2).sum() / 0.2
  weights = (found / log_odds).astype(np.float64)
  rng, least = np.random.default_rng(1), loss(weights)
  assert least < 0.9 * loss(np.zeros((12, 4)))
  for _ in range(50):
    assert loss(weights + 0.02 * rng.normal(size=weights.shape)) > least


def test_it_is_that_of_scikit_learn():
  """Where all log-odds are 1: theirs multiply features, which it has not."""
  models = pytest.importorskip('sklearn.linear_model')
  present, log_odds, labels = _of_four()
  want = models.LogisticRegression(
      C=0.1, fit_intercept=False, tol=1e-8, max_iter=1000).fit(
          present, labels, sample_weight=0.5 + labels).coef_.T
  got = linear.fit(sparse.csr_matrix(present), np.ones_like(log_odds),
                   np.eye(4)[labels], 0.5 + labels)
  np.testing.assert_allclose(got, want, atol=2e-3)
  assert np.abs(want).max() > 0.3


def test_what_counts_twice_is_there_twice():
  present, log_odds, targets = _problem()
  counts = np.where(targets > 0, 2, 1)
  both = np.stack([1 - targets, targets], axis=1)
  twice = np.repeat(np.arange(300), counts)
  got, want = (linear.fit(sparse.csr_matrix(x), log_odds[:, None], y, c)
               for x, y, c in ((present, both, counts),
                               (present[twice], both[twice], None)))
  np.testing.assert_allclose(got, want, atol=1e-3)
