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
        targets: np.ndarray) -> tuple[np.ndarray, float]:
  """Fits weights and bias: a review's logit is the sum of its weights + bias.

  Args:
    present: float32 [n, N], 1 where a review has an n-gram.
    log_odds: float32 [N] of the n-grams.
    targets: float [n], the probability that each review is positive.

  Returns float32 [N], which the log-odds are part of, and the bias.
  """
  x = sparse.csr_matrix((log_odds[present.indices], present.indices,
                         present.indptr), present.shape)
  def loss_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
    weights, bias = parameters[:-1], parameters[-1]
    z = x @ weights.astype(np.float32) + bias
    loss = np.logaddexp(0, z) - targets * z
    error = 1 / (1 + np.exp(-z)) - targets
    gradient = x.T @ error.astype(np.float32) + weights / _STRENGTH
    return (loss.sum() + weights @ weights / (2 * _STRENGTH),
            np.append(gradient, error.sum()))

  found = optimize.minimize(
      loss_and_gradient, np.zeros(len(log_odds) + 1), jac=True,
      method='L-BFGS-B', options={'maxiter': _MOST_STEPS, 'maxcor': 5}).x
  return (found[:-1] * log_odds).astype(np.float32), float(found[-1])
