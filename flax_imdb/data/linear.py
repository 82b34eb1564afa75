"""A linear model of n-grams: what a review says if the order is forgotten.

Logistic regression on the n-grams present in a review, each by its log-odds. It
errs on other reviews than an LSTM does, which adds to its logit what the order
of the words tells. Source: Wang & Manning 2012, whose NBSVM this is with the
logistic loss; of more than two classes with that of the softmax, where each
class has log-odds and weights of its own.
"""

from collections.abc import Callable

import numpy as np
import scipy

_STRENGTH = 0.1  # C: the inverse of the weights' penalty
_MOST_STEPS = 30  # of L-BFGS; more fit the training reviews alone


def fit(present: 'scipy.sparse.csr_matrix', log_odds: np.ndarray,
        targets: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
  """Fits weights for each n-gram: those of a review add up to its logits.

  Args:
    present: float32 [n, N], 1 where a review has an n-gram.
    log_odds: float32 [N, C] of the n-grams, C as of `classes.columns`.
    targets: float [n, K], the probability of each class.
    counts: float [n], how much each review counts in the loss; None for 1.

  Returns float32 [N], or [N, K] of K > 2, of which the log-odds are a factor.
  """
  if counts is None:
    counts = np.ones(len(targets))
  if targets.shape[1] > 2:
    return _fit_each(present, log_odds, targets, counts)
  log_odds, targets = log_odds[:, 0], targets[:, 1]
  x = scipy.sparse.csr_matrix((
      log_odds[present.indices], present.indices, present.indptr),
      present.shape)
  def loss_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
    z = (x @ weights.astype(np.float32)).astype(np.float64)
    loss = counts * (np.logaddexp(0, z) - targets * z)
    error = counts * (1 / (1 + np.exp(-z)) - targets)
    return (loss.sum() + weights @ weights / (2 * _STRENGTH),
            x.T @ error.astype(np.float32) + weights / _STRENGTH)

  weights = _least(loss_and_gradient, len(log_odds))
  return (weights * log_odds).astype(np.float32)


def _fit_each(present: 'scipy.sparse.csr_matrix', log_odds: np.ndarray,
              targets: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """As `fit`, of K > 2 classes: cross entropy of the softmax."""
  def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
    weights = flat.reshape(log_odds.shape)
    z = (present @ (weights * log_odds).astype(np.float32)).astype(np.float64)
    total = scipy.special.logsumexp(z, axis=1)
    loss = counts * (total - (targets * z).sum(axis=1))
    error = counts[:, None] * (np.exp(z - total[:, None]) - targets)
    slope = log_odds * (present.T @ error.astype(np.float32))
    return (loss.sum() + flat @ flat / (2 * _STRENGTH),
            slope.ravel() + flat / _STRENGTH)

  weights = _least(loss_and_gradient, log_odds.size).reshape(log_odds.shape)
  return (weights * log_odds).astype(np.float32)


def _least(loss_and_gradient: Callable, count: int) -> np.ndarray:
  """float64 [count], where the loss is least, or nearly so."""
  return scipy.optimize.minimize(
      loss_and_gradient, np.zeros(count), jac=True, method='L-BFGS-B',
      options={'maxiter': _MOST_STEPS, 'maxcor': 5}).x
