"""What the words before make of a token: word pairs, and log-odds of classes.

And, if it is asked for, what a linear model makes of all n-grams of a review.

Both are learned from the training reviews alone, and saved with the run as
`ngrams.npz`: a run directory answers for any text.
"""

import dataclasses
import io
import os

from ml_collections import ConfigDict
import numpy as np
import scipy

from flax_imdb.data import classes, linear
from flax_imdb.data.reviews import Reviews
from flax_imdb.errors import UserError
from flax_imdb.storage import files, npz

_LEAST = 2  # what comes once is most of the n-grams, and says next to nothing
_FEW = _LEAST - 0.5  # the same of sums of shares, which rounding makes 1.99...
_MOST_TOKENS = 1 << 25  # of training; to count takes some 60 bytes each
_FOLDS = 10  # a training review's log-odds are counted on the nine others
_ID_BITS = 20  # config.data.vocab_size is at most 1 << 20
# Numbers, of float32 2 GiB, of float64 1 GiB: more classes than two multiply
# what is kept of each token, and counted of each n-gram.
_MOST_FEATURES = 1 << 29
_MOST_COUNTS = 1 << 27


@dataclasses.dataclass(frozen=True, eq=False)
class Ngrams:
  """The n-grams that a model knows, by key; arrays are empty if unused."""
  pairs: np.ndarray  # int64 [P] ascending; their ids are 1 to P, 0 any other
  keys: np.ndarray  # int64 [N] ascending, of n-grams of all orders
  log_odds: np.ndarray  # float32 [N, C], C as of `classes.columns`
  weights: np.ndarray  # of the linear model: float32 [N], or [N, K] of K > 2
  order: int  # words of the longest of these n-grams
  inputs: str  # config.model.inputs

  def annotate(self, reviews: Reviews) -> Reviews:
    """Adds what the model reads beside the ids, as if they were never seen."""
    found, logits = {}, None
    if 'bigrams' in self.inputs:
      found['bigrams'] = 1 + _look_up(self.pairs, _keys(reviews, 2))
    if 'log_odds' in self.inputs:
      none = np.zeros((1, self.log_odds.shape[1]), np.float32)
      table = np.concatenate([self.log_odds, none])  # place -1 is the last
      places = [_look_up(self.keys, _keys(reviews, n))
                for n in range(1, self.order + 1)]
      found['log_odds'] = np.concatenate(
          [table[place] for place in places], axis=-1)
      if 'linear' in self.inputs:
        weights = np.atleast_2d(self.weights.T)  # [C, N]
        sums = np.zeros((len(weights), len(reviews)))
        for place in places:
          ngram, review = _present(reviews, place)
          for own, total in zip(weights, sums, strict=True):
            total += np.bincount(review, own[ngram], minlength=len(reviews))
        logits = np.ascontiguousarray(sums.T, np.float32)
        if self.weights.ndim == 1:
          logits = logits[:, 0]
    return dataclasses.replace(reviews, features=found, linear=logits)

  def linear_parts(self, reviews: Reviews) -> np.ndarray:
    """float64 [order, tokens, C], what adds up to each review's `linear`.

    That is the weight of the n-gram of this order which ends there. It counts
    once in a review: where it comes several times each has an equal part, for
    without any one of them it would still be there. Source: the Shapley value
    of being present.
    """
    weights = np.atleast_2d(self.weights.T).T.astype(np.float64)  # [N, C]
    table = np.concatenate([weights, np.zeros((1, weights.shape[1]))])
    n = len(reviews)
    of_review = np.repeat(np.arange(n), np.diff(reviews.offsets))
    found = []
    for order in range(1, self.order + 1):
      place = _look_up(self.keys, _keys(reviews, order))
      _, same, counts = np.unique(
          place.astype(np.int64) * n + of_review, return_inverse=True,
          return_counts=True)
      found.append(table[place] / counts[same, None])
    return np.array(found)


# Of a model that reads words alone.
NONE = Ngrams(np.zeros(0, np.int64), np.zeros(0, np.int64),
              np.zeros((0, 1), np.float32), np.zeros(0, np.float32), 0, 'words')


def fit(config: ConfigDict, reviews: Reviews, pairs: np.ndarray | None = None,
        class_count: int = 2) -> tuple[Ngrams, Reviews]:
  """Learns what config.model.inputs asks for from the training reviews.

  `pairs` are those of `Ngrams` where an embedding of them is there already.
  Also returns these with features to train with. Their log-odds are counted
  without the tenth of the reviews that they are in: a review's own label must
  not be read from its rare words. One with a pseudo-label counts for each class
  as much as that says, and one without a label for none. Raises UserError if
  they, or the classes, are too many for the memory to count them.
  """
  if config.model.inputs != 'words' and len(reviews.ids) > _MOST_TOKENS:
    raise UserError(
        f'config.model.inputs={config.model.inputs} counts n-grams in memory, '
        f'of {_MOST_TOKENS:,} words at most, and these are '
        f'{len(reviews.ids):,}: give --config.model.inputs=words')
  inputs, data = config.model.inputs.split('+'), config.data
  keys, log_odds, features = NONE.keys, NONE.log_odds, {}
  weights = NONE.weights
  if 'bigrams' not in inputs:
    pairs = NONE.pairs
  elif pairs is None:
    pairs, features['bigrams'] = _frequent_pairs(reviews, data.bigrams - 1)
  else:
    features['bigrams'] = 1 + _look_up(pairs, _keys(reviews, 2))
  if 'log_odds' in inputs:
    shares = classes.shares(reviews.labels, class_count)
    _check_size(reviews, data.log_odds_order, class_count)
    keys, log_odds, features['log_odds'], present = _log_odds(
        reviews, shares, data.log_odds_order, data.log_odds_ngrams)
    if 'linear' in inputs:
      ones = np.ones(len(present[0]), np.float32)
      matrix = scipy.sparse.csr_matrix(
          (ones, present), (len(reviews), len(keys)))
      known = shares.sum(axis=1) > 0
      counts = classes.weights(
          config.class_weights, reviews.labels, class_count)
      weights = linear.fit(
          matrix[known], log_odds, shares[known],
          None if counts is None else shares[known] @ counts)
  ngrams = Ngrams(pairs, keys, log_odds, weights, data.log_odds_order,
                  config.model.inputs)
  return ngrams, dataclasses.replace(reviews, features=features)


def _keys(reviews: Reviews, order: int) -> np.ndarray:
  """int64 [tokens] of the n-gram that ends there; -1 before there is one."""
  ids = reviews.ids.astype(np.int64)
  keys = ids | order << 3 * _ID_BITS
  for back in range(1, order):
    keys[back:] |= ids[:-back] << back * _ID_BITS
  starts = reviews.offsets[:-1]
  for place in range(order - 1):
    keys[starts[place < np.diff(reviews.offsets)] + place] = -1
  return keys


def _look_up(known: np.ndarray, keys: np.ndarray) -> np.ndarray:
  """int32, the place of each key in `known`, which ascends; -1 of others."""
  if not len(known):
    return np.full(len(keys), -1, np.int32)
  if len(keys) < len(known):  # to hash these takes longer than to search
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[at] == keys, at, -1).astype(np.int32)
  import pyarrow as pa  # only now: it takes a tenth of a second
  import pyarrow.compute as pc

  found = pc.index_in(pa.array(keys), value_set=pa.array(known))
  return found.fill_null(-1).to_numpy()


def _distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The distinct keys, ascending, and int32, the place of each among these.

  As np.unique, which sorts all of them: hashed, it takes a fifth to a third.
  """
  import pyarrow as pa  # only now: it takes a tenth of a second

  encoded = pa.array(keys).dictionary_encode()
  distinct = encoded.dictionary.to_numpy()
  place = encoded.indices.to_numpy()
  order = np.argsort(distinct)
  rank = np.empty(len(order), np.int32)
  rank[order] = np.arange(len(order), dtype=np.int32)
  return distinct[order], rank[place]


def _frequent_pairs(
    reviews: Reviews, most: int) -> tuple[np.ndarray, np.ndarray]:
  """The keys of up to `most` pairs, ascending; int32 ids [tokens]."""
  keys, place = _distinct(_keys(reviews, 2))
  kept = _most_common(keys, np.bincount(place, minlength=len(keys)), most)
  ids = np.zeros(len(keys), np.int32)
  ids[kept] = 1 + np.arange(len(kept))
  return keys[kept], ids[place]


def _present(reviews: Reviews, places: np.ndarray) -> tuple[
    np.ndarray, np.ndarray]:
  """Each n-gram of a review once: int [m], its place, and int [m], the review.

  `places` are int [tokens], those of the n-grams that end there; -1 is none.
  """
  n = len(reviews)
  of_review = np.repeat(np.arange(n), np.diff(reviews.offsets))
  # np.unique would take ten times as long.
  pairs = np.sort((places.astype(np.int64) * n + of_review)[places >= 0])
  return np.divmod(pairs[np.diff(pairs, prepend=-1) > 0], n)


def _log_odds(
    reviews: Reviews, shares: np.ndarray, order: int, most: int) -> tuple[
        np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
  """Keys and log-odds as of `Ngrams`, and the features of these reviews.

  And which reviews have which n-grams: int [m] rows, and int [m], the places of
  these in the keys. `shares` are those of `classes.shares`.

  Of each length the `most` n-grams that are in the most reviews. Source: the
  log-count ratio of Wang & Manning 2012, of n-grams present or not.
  """
  n = len(reviews)
  fold = np.random.default_rng(0).integers(_FOLDS, size=n)
  class_count = shares.shape[1]
  own = np.stack([np.bincount(fold, shares[:, k], minlength=_FOLDS)
                  for k in range(class_count)], axis=-1)
  prior = _prior(own.sum(axis=0))
  # Where a fold has more of a class, the others have less of it, and so have
  # all their n-grams: measured against the share in all reviews, each token of
  # the fold would speak against its own class.
  priors = _prior(own.sum(axis=0) - own)  # [folds, classes]
  of_review = np.repeat(np.arange(n), np.diff(reviews.offsets))
  known, log_odds, features = [], [], []
  rows, columns, count = [], [], 0
  for length in range(1, order + 1):
    keys, place = _distinct(_keys(reviews, length))
    ngram, review = _present(reviews, place)
    kept = _most_common(keys, np.bincount(ngram, minlength=len(keys)), most)
    number = np.full(len(keys), -1)
    number[kept] = np.arange(len(kept))
    review, ngram = review[number[ngram] >= 0], number[ngram]
    ngram = ngram[ngram >= 0]
    if class_count > 2 and len(kept) * _FOLDS * class_count > _MOST_COUNTS:
      raise UserError(
          f'{len(kept):,} n-grams of {length} words are too many to count for '
          f'{class_count:,} classes: give --config.data.log_odds_ngrams='
          f'{_MOST_COUNTS // _FOLDS // class_count} or less')
    cell = ngram * _FOLDS + fold[review]
    counts = np.stack([np.bincount(
        cell, shares[review, k], minlength=len(kept) * _FOLDS).reshape(
            -1, _FOLDS) for k in range(class_count)], axis=-1)
    total = counts.sum(axis=1)
    total[total.sum(axis=-1) < _FEW] = 0
    known.append(keys[kept])
    log_odds.append(_ratios(total, prior))
    rest = total[:, None] - counts  # [kept, folds, classes]
    # What would not be kept without its fold is unknown there, too: training
    # reads as few n-grams as evaluation does.
    rest[rest.sum(axis=-1) < _FEW] = 0
    others = _ratios(rest, priors)  # [kept, folds, C]
    rows.append(review)
    columns.append(count + ngram)
    count += len(kept)
    others = np.concatenate([others, np.zeros_like(others, shape=(
        1, *others.shape[1:]))])  # place -1 is the last
    features.append(others[number[place], fold[of_review]])
  return (np.concatenate(known), np.concatenate(log_odds),
          np.concatenate(features, axis=-1),
          (np.concatenate(rows), np.concatenate(columns)))


def _check_size(reviews: Reviews, order: int, class_count: int) -> None:
  """Raises UserError if the features of all tokens are too many."""
  size = len(reviews.ids) * order * class_count
  if class_count > 2 and size > _MOST_FEATURES:
    raise UserError(
        f'the log-odds of {class_count:,} classes are {size:,} numbers for '
        f'{len(reviews.ids):,} tokens, more than {_MOST_FEATURES:,}: leave '
        'them out with --config.model.inputs=words+bigrams, or lower '
        'config.data.log_odds_order')


def _most_common(keys: np.ndarray, counts: np.ndarray, most: int) -> np.ndarray:
  """The places, ascending, of up to `most` keys that come twice or more."""
  common = np.flatnonzero((keys >= 0) & (counts >= _LEAST))
  return np.sort(common[np.argsort(-counts[common], kind='stable')[:most]])


def _prior(counts: np.ndarray) -> np.ndarray:
  """[..., K] reviews by class -> the share of each; one unseen has some."""
  return (counts + 1) / (counts + 1).sum(axis=-1, keepdims=True)


def _ratios(counts: np.ndarray, prior: np.ndarray) -> np.ndarray:
  """[..., K] reviews by class -> float32 [..., C] log-odds, 0 of no reviews."""
  smooth = counts + 2 * prior  # 1 and 1 for two classes of equal size
  odds = np.log(smooth / (smooth.sum(axis=-1, keepdims=True) - smooth))
  odds = (odds - np.log(prior / (1 - prior))).astype(np.float32)
  return odds[..., 1:] if prior.shape[-1] == 2 else odds


def save(ngrams: Ngrams, path: str | os.PathLike[str]) -> None:
  """Writes `ngrams.npz`; errors as `files.write`."""
  npz.write_arrays(path, pairs=ngrams.pairs, keys=ngrams.keys,
                   log_odds=ngrams.log_odds, weights=ngrams.weights)


def load(path: str | os.PathLike[str], config: ConfigDict,
         class_count: int = 2) -> Ngrams:
  """Reads what `save` wrote, for a model of this config and so many classes.

  Raises UserError if it is missing, or a stranger's with which an embedding or
  a search would answer without a word.
  """
  data, inputs = config.data, config.model.inputs.split('+')
  if inputs == ['words']:
    return NONE
  most_pairs = (data.bigrams - 1) * ('bigrams' in inputs)
  most_keys = (data.log_odds_ngrams * data.log_odds_order
               * ('log_odds' in inputs))
  columns = classes.columns(class_count)
  if columns > 1:  # as `_log_odds`
    most_keys = min(most_keys, data.log_odds_order * (
        _MOST_COUNTS // _FOLDS // class_count))
  most = 8 * most_pairs + (8 + 8 * columns) * most_keys + 4096
  content = files.read_bytes(path, most)
  try:
    arrays = npz.read_arrays(io.BytesIO(content), most)
    pairs, keys, log_odds = (
        arrays[name] for name in ('pairs', 'keys', 'log_odds'))
    for known, count in (pairs, most_pairs), (keys, most_keys):
      if (known.dtype != np.int64 or known.ndim != 1 or len(known) > count
          or (np.diff(known) <= 0).any()):
        raise ValueError(f'its n-grams are not up to {count} ascending keys')
    weights, shape = NONE.weights, (len(keys), columns)
    _check_numbers('log-odds', log_odds, shape)
    if 'linear' in inputs:
      weights = arrays['weights']
      _check_numbers('weights', weights, shape if columns > 1 else shape[:1])
  except npz.ERRORS as e:
    raise UserError(f'{os.fspath(path)} is damaged ({e}): copy it again from '
                    'the run directory, or train again') from e
  return Ngrams(pairs, keys, log_odds, weights, data.log_odds_order,
                config.model.inputs)


def _check_numbers(
    name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
  """Raises ValueError unless there are numbers for each n-gram."""
  if (array.dtype != np.float32 or array.shape != shape
      or not np.isfinite(array).all()):
    raise ValueError(f'its {name} are not a number for each n-gram and class')
