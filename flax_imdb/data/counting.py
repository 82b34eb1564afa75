"""Training reviews in, out what `Ngrams` knows and what they are trained with.

It takes seconds, so what was counted once is cached.
"""

import contextlib
import dataclasses
import hashlib
import pathlib
import time

from ml_collections import ConfigDict
import numpy as np
import scipy

from flax_imdb.cluster import processes
from flax_imdb.data import classes, linear
from flax_imdb.data.ngrams import (
  FOLDS,
  NONE,
  Ngrams,
  keys_of,
  look_up,
  most_counted,
  of_arrays,
  of_each_length,
  present_in,
)
from flax_imdb.data.reviews import Announce, Reviews
from flax_imdb.errors import TransientError, UserError
from flax_imdb.storage import cache, npz

_VERSION = 1  # of what is counted; what another one cached is not read
_MOST_CACHED = 1 << 30  # bytes of all that is cached of n-grams
_FEATURES = {'bigrams': 'token_bigrams', 'log_odds': 'token_log_odds'}
_LEAST = 2  # what comes once is most of the n-grams, and says next to nothing
_FEW = _LEAST - 0.5  # the same of sums of shares, which rounding makes 1.99...
_MOST_TOKENS = 1 << 25  # of training; to count takes some 200 bytes each
# Numbers, float32 of 2 GiB: more classes than two multiply those of each token.
_MOST_FEATURES = 1 << 29


def fit_or_read(
    config: ConfigDict, reviews: Reviews, sha256: str,
    announce: Announce, pairs: np.ndarray | None = None,
    class_count: int = 2) -> tuple[Ngrams, Reviews]:
  """As `fit`, the same bits, from the cache if it holds them.

  `sha256` is that of `reviews_sha256`; `announce` is told how long it took, and
  what could not be cached. What is read from there is mapped, and to be read
  only. Errors as of `fit`.
  """
  start = time.perf_counter()
  def path_of(pairs_sha256: str) -> pathlib.Path:
    return cache.path(
        'ngrams', config.data.name, '.npz', _VERSION, np.__version__,
        scipy.__version__, sha256, config.model.inputs, config.data.bigrams,
        config.data.log_odds_order, config.data.log_odds_ngrams,
        config.class_weights, class_count, pairs_sha256)
  def checked(arrays: dict[str, np.ndarray]) -> tuple[Ngrams, Reviews]:
    known = of_arrays(arrays, config, class_count)
    return known, _featured(reviews, arrays, known)
  with processes.one_at_a_time():
    found = npz.cached(path := path_of(''), checked, announce)
    if pairs is not None and not (
        found and np.array_equal(pairs, found[0].pairs)):  # another run's
      path = path_of(hashlib.sha256(pairs).hexdigest())
      found = npz.cached(path, checked, announce)
    verb = 'read'
    if found is None:
      found, verb = fit(config, reviews, pairs, class_count), 'counted'
      try:
        _write(path, *found)
      except (UserError, TransientError) as e:
        announce(f'{e}; going on without')
  known = found[0]
  announce(
      f'{verb} n-grams in {time.perf_counter() - start:.1f} s: '
      f'{len(known.pairs):,} pairs to embed, {len(known.keys):,} with log-odds')
  return found


def _featured(reviews: Reviews, arrays: dict[str, np.ndarray],
              known: Ngrams) -> Reviews:
  """With features as `_write` wrote them; raises ValueError for any others."""
  tokens, features = len(reviews.ids), {}
  if 'bigrams' in known.inputs:
    features['bigrams'] = bigrams = arrays[_FEATURES['bigrams']]
    if (bigrams.dtype != np.int32 or bigrams.shape != (tokens,)
        or bigrams.min() < 0 or bigrams.max() > len(known.pairs)):
      raise ValueError('its pairs are not of these reviews')
  if 'log_odds' in known.inputs:
    features['log_odds'] = log_odds = arrays[_FEATURES['log_odds']]
    if (log_odds.dtype != np.float32 or log_odds.shape != (
        tokens, known.order * known.log_odds.shape[1])
        or not np.isfinite(log_odds).all()):
      raise ValueError('its log-odds are not of these reviews')
  for array in features.values():
    npz.release(array)  # of which all was read
  return dataclasses.replace(reviews, features=features)


def _write(path: pathlib.Path, known: Ngrams, reviews: Reviews) -> None:
  """Caches both, and removes what was cached first where all is too much.

  Raises as `files.replacing`.
  """
  arrays = {'pairs': known.pairs, 'keys': known.keys,
            'log_odds': known.log_odds, 'weights': known.weights}
  arrays |= {_FEATURES[name]: found for name, found in reviews.features.items()}
  room = _MOST_CACHED - sum(array.nbytes for array in arrays.values())
  if room < 0:
    return
  npz.write_parts(path, {name: (array.shape, array.dtype, [array])
                         for name, array in arrays.items()})
  with contextlib.suppress(FileNotFoundError):  # another run removed one, too
    others = [(other.stat().st_mtime, other)
              for other in path.parent.glob('*.npz') if other != path]
    for _, other in sorted(others, reverse=True):
      room -= other.stat().st_size
      if room < 0:
        other.unlink()


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
  order = data.log_odds_order if 'log_odds' in inputs else 0
  if order:
    shares = classes.shares(reviews.labels, class_count)
    _check_size(reviews, order, class_count)
  def distinct(length: int) -> tuple[np.ndarray, np.ndarray]:
    return _distinct(keys_of(reviews, length))
  hashed = of_each_length(distinct, order, len(reviews.ids))
  if 'bigrams' not in inputs:
    pairs = NONE.pairs
  elif pairs is None:
    pairs, features['bigrams'] = _frequent_pairs(
        hashed[1] if order > 1 else distinct(2), data.bigrams - 1)
  else:
    features['bigrams'] = 1 + look_up(pairs, keys_of(reviews, 2))
  if order:
    keys, log_odds, features['log_odds'], present = _log_odds(
        reviews, shares, hashed, data.log_odds_ngrams)
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
  found = Ngrams(pairs, keys, log_odds, weights, data.log_odds_order,
                 config.model.inputs)
  return found, dataclasses.replace(reviews, features=features)


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


def _frequent_pairs(hashed: tuple[np.ndarray, np.ndarray],
                    most: int) -> tuple[np.ndarray, np.ndarray]:
  """`_distinct` pairs -> the keys of up to `most`, ascending; int32 ids."""
  keys, place = hashed
  kept = _most_common(keys, np.bincount(place, minlength=len(keys)), most)
  ids = np.zeros(len(keys), np.int32)
  ids[kept] = 1 + np.arange(len(kept))
  return keys[kept], ids[place]


def _log_odds(
    reviews: Reviews, shares: np.ndarray,
    hashed: list[tuple[np.ndarray, np.ndarray]], most: int) -> tuple[
        np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
  """Keys and log-odds as of `Ngrams`, and the features of these reviews.

  And which reviews have which n-grams: int [m] rows, and int [m], the places of
  these in the keys. `shares` are those of `classes.shares`, `hashed` what
  `_distinct` says of the n-grams of each length.

  Of each length the `most` n-grams that are in the most reviews. Source: the
  log-count ratio of Wang & Manning 2012, of n-grams present or not.
  """
  n = len(reviews)
  fold = np.random.default_rng(0).integers(FOLDS, size=n)
  class_count = shares.shape[1]
  own = np.stack([np.bincount(fold, shares[:, k], minlength=FOLDS)
                  for k in range(class_count)], axis=-1)
  prior = _prior(own.sum(axis=0))
  # Where a fold has more of a class, the others have less of it, and so have
  # all their n-grams: measured against the share in all reviews, each token of
  # the fold would speak against its own class.
  priors = _prior(own.sum(axis=0) - own)  # [folds, classes]
  fold_of_token = np.repeat(fold, np.diff(reviews.offsets))

  def of_length(length: int) -> tuple[np.ndarray, ...]:
    keys, place = hashed[length - 1]
    ngram, review = present_in(reviews, place)
    kept = _most_common(keys, np.bincount(ngram, minlength=len(keys)), most)
    number = np.full(len(keys), -1)
    number[kept] = np.arange(len(kept))
    review, ngram = review[number[ngram] >= 0], number[ngram]
    ngram = ngram[ngram >= 0]
    if class_count > 2 and len(kept) > most_counted(class_count):
      raise UserError(
          f'{len(kept):,} n-grams of {length} words are too many to count for '
          f'{class_count:,} classes: give --config.data.log_odds_ngrams='
          f'{most_counted(class_count)} or less')
    cell = ngram * FOLDS + fold[review]
    counts = np.stack([np.bincount(
        cell, shares[review, k], minlength=len(kept) * FOLDS).reshape(
            -1, FOLDS) for k in range(class_count)], axis=-1)
    total = counts.sum(axis=1)
    total[total.sum(axis=-1) < _FEW] = 0
    rest = total[:, None] - counts  # [kept, folds, classes]
    # What would not be kept without its fold is unknown there, too: training
    # reads as few n-grams as evaluation does.
    rest[rest.sum(axis=-1) < _FEW] = 0
    others = _ratios(rest, priors)  # [kept, folds, C]
    others = np.concatenate([others, np.zeros_like(others, shape=(
        1, *others.shape[1:]))])  # place -1 is the last
    return (keys[kept], _ratios(total, prior),
            others[number[place], fold_of_token], review, ngram)

  known, log_odds, features, rows, columns = zip(
      *of_each_length(of_length, len(hashed), len(reviews.ids)),
      strict=True)
  before = np.cumsum([0, *map(len, known)])
  return (np.concatenate(known), np.concatenate(log_odds),
          np.concatenate(features, axis=-1),
          (np.concatenate(rows), np.concatenate(
              [a + b for a, b in zip(columns, before[:-1], strict=True)])))


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
