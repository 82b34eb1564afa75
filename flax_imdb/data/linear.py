"""A linear model of n-grams: what a review says if the order is forgotten.

Logistic regression on the n-grams present in a review, each by its log-odds. It
errs on other reviews than an LSTM does, which adds to its logit what the order
of the words tells. Source: Wang & Manning 2012, whose NBSVM this is with the
logistic loss.
"""

import numpy as np
from scipy import optimize, sparse

_STRENGTH = 0.1  # C: the inverse of the weights' penalty
_MOST_STEPS = 30  # of L-BFGS; more fit the training reviews alone


def fit(present: sparse.csr_matrix, log_odds: np.ndarray,
        targets: np.ndarray) -> np.ndarray:
  """Fits a weight for each n-gram: those of a review add up to its logit.

  Args:
    present: float32 [n, N], 1 where a review has an n-gram.
    log_odds: float32 [N] of the n-grams.
    targets: float [n], the probability that each review is positive.

  Returns float32 [N], of which the log-odds are a factor.
  """
  x = sparse.csr_matrix((log_odds[present.indices], present.indices,
                         present.indptr), present.shape)
  def loss_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
    z = (x @ weights.astype(np.float32)).astype(np.float64)
    loss = np.logaddexp(0, z) - targets * z
    error = 1 / (1 + np.exp(-z)) - targets
    return (loss.sum() + weights @ weights / (2 * _STRENGTH),
            x.T @ error.astype(np.float32) + weights / _STRENGTH)

  weights = optimize.minimize(
      loss_and_gradient, np.zeros(len(log_odds)), jac=True, method='L-BFGS-B',
      options={'maxiter': _MOST_STEPS, 'maxcor': 5}).x
  return (weights * log_odds).astype(np.float32)
