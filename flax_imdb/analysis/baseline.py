"""What a linear model makes of the same reviews: what an LSTM must beat.

If the run has learned one of n-grams, it is that; else logistic regression on
the tf-idf of words, by scikit-learn.
"""

from collections.abc import Callable
import json
from typing import Any

import numpy as np
import scipy

from flax_imdb.checkpoint import run
from flax_imdb.data.reviews import Reviews, load_splits
from flax_imdb.errors import UserError
from flax_imdb.fields import validates
from flax_imdb.inference.evaluate import score
from flax_imdb.storage import files

_MOST_REVIEWS = 200_000  # to learn from; the first of more
_STEPS = 1000  # of L-BFGS at most
_NEVER = -87.0  # log of the least float32, of a class that was not learned from


def compare(workdir: str, restored: run.Run, test: Reviews,
            announce: Callable[[str], None]) -> dict[str, Any]:
  """Writes report/baseline.json of a run, and returns what is in it.

  That is `model`, in words, and the scores on test and validation, as of
  `evaluate.score`. The reviews of `test` have their features. `announce` is
  told the accuracy on test. Raises UserError as `load_splits` and
  `files.write`, and where there is one class alone to learn from, and
  ImportError without scikit-learn.
  """
  config = restored.config
  held_out = ['validation'] if validates(config.data) else []
  learned = len(restored.ngrams.weights) > 0
  splits = {'test': test} | load_splits(
      config, restored.tokenizer, announce,
      held_out if learned else ['train', *held_out], len(restored.labels))
  if learned:
    model = 'the linear model of n-grams, which is a part of this one'
    scores = {}
    for name in 'test', *held_out:
      reviews = splits[name]
      if reviews.linear is None:
        reviews = restored.ngrams.annotate(reviews)
      assert reviews.linear is not None
      scores[name] = score(reviews.linear, reviews.labels)
  else:
    model = 'logistic regression on the tf-idf of words'
    scores = _fitted(splits, ['test', *held_out], config.data.vocab_size,
                     len(restored.labels))
  found = {'model': model, **scores}
  path = files.as_path(workdir) / 'report' / 'baseline.json'
  files.write(path, json.dumps(found, indent=2) + '\n')
  announce(f'{model}: accuracy {scores["test"]["accuracy"]:.4f} on test')
  return found


def _fitted(splits: dict[str, Reviews], names: list[str],
            vocab_size: int, class_count: int) -> dict[str, Any]:
  """The scores of a model that is fitted to the training split."""
  from sklearn.feature_extraction.text import TfidfTransformer
  from sklearn.linear_model import LogisticRegression
  from sklearn.pipeline import make_pipeline
  train = splits['train'][:_MOST_REVIEWS]
  if len(np.unique(train.labels)) < 2:
    raise UserError('all reviews to learn from are of one class: no logistic '
                    'regression can be fitted to them')
  fitted = make_pipeline(
      TfidfTransformer(sublinear_tf=True),
      LogisticRegression(C=3, max_iter=_STEPS)).fit(
          _counts(train, vocab_size), train.labels)
  def logits(reviews: Reviews) -> np.ndarray:
    counts = _counts(reviews, vocab_size)
    if class_count == 2:
      return fitted.decision_function(counts)
    found = np.full((len(reviews), class_count), _NEVER)
    found[:, fitted.classes_] = fitted.predict_log_proba(counts)
    return found
  return {name: score(logits(splits[name]), splits[name].labels)
          for name in names}


def _counts(reviews: Reviews, vocab_size: int) -> 'scipy.sparse.csr_matrix':
  """float64 [n, vocab_size], how often each id is in each review."""
  matrix = scipy.sparse.csr_matrix(
      (np.ones(len(reviews.ids)), reviews.ids.astype(np.int64),
       reviews.offsets), (len(reviews), vocab_size))
  matrix.sum_duplicates()
  return matrix
