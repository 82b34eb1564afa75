"""What the words before make of a token: word pairs, and log-odds of classes.

And, if it is asked for, what a linear model makes of all n-grams of a review.

Both are learned from the training reviews alone, see `counting`, and saved with
the run as `ngrams.npz`: a run directory answers for any text.
"""

from collections.abc import Callable, Mapping
from concurrent import futures
import dataclasses
import io
import os
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from flax_imdb import environment
from flax_imdb.data import classes
from flax_imdb.data.reviews import Reviews
from flax_imdb.errors import UserError
from flax_imdb.storage import files, npz

FOLDS = 10  # a training review's log-odds are counted on the nine others
_ID_BITS = 20  # config.data.vocab_size is at most 1 << 20
_MOST_COUNTS = 1 << 27  # float64, 1 GiB
_MANY_TOKENS = 1 << 16  # to start threads takes a millisecond


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
      found['bigrams'] = 1 + look_up(self.pairs, keys_of(reviews, 2))
    if 'log_odds' in self.inputs:
      none = np.zeros((1, self.log_odds.shape[1]), np.float32)
      table = np.concatenate([self.log_odds, none])  # place -1 is the last
      def of_length(length: int) -> tuple[np.ndarray, np.ndarray | None]:
        place = look_up(self.keys, keys_of(reviews, length))
        return table.take(place, axis=0), (
            self._sums(reviews, place) if 'linear' in self.inputs else None)
      each = of_each_length(of_length, self.order, len(reviews.ids))
      found['log_odds'] = np.concatenate([x for x, _ in each], axis=-1)
      if 'linear' in self.inputs:
        logits = sum(sums for _, sums in each).astype(np.float32)
        if self.weights.ndim == 1:
          logits = logits[:, 0]
    return dataclasses.replace(reviews, features=found, linear=logits)

  def _sums(self, reviews: Reviews, places: np.ndarray) -> np.ndarray:
    """float64 [n, C], what n-grams at `present_in`'s places add to logits."""
    ngram, review = present_in(reviews, places)
    return np.stack([
        np.bincount(review, own[ngram], minlength=len(reviews))
        for own in np.atleast_2d(self.weights.T)], axis=-1)

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
      place = look_up(self.keys, keys_of(reviews, order))
      _, same, counts = np.unique(
          place.astype(np.int64) * n + of_review, return_inverse=True,
          return_counts=True)
      found.append(table[place] / counts[same, None])
    return np.array(found)


# Of a model that reads words alone.
NONE = Ngrams(np.zeros(0, np.int64), np.zeros(0, np.int64),
              np.zeros((0, 1), np.float32), np.zeros(0, np.float32), 0, 'words')


def most_counted(class_count: int) -> int:
  """N-grams of a length whose counts, of K > 2 classes, memory has room for."""
  return _MOST_COUNTS // FOLDS // class_count


def of_each_length(of_length: Callable[[int], Any], longest: int,
                   tokens: int) -> list[Any]:
  """What a function says of n-grams of 1, 2, ... `longest` words.

  Of many tokens side by side: numpy and Arrow, in which it spends its time, let
  other threads run. The longest take longest and so begin first. Raises what
  the function does.
  """
  if tokens < _MANY_TOKENS:
    return list(map(of_length, range(1, longest + 1)))
  with futures.ThreadPoolExecutor(environment.available_cores()) as pool:
    return list(pool.map(of_length, range(longest, 0, -1)))[::-1]


def keys_of(reviews: Reviews, order: int) -> np.ndarray:
  """int64 [tokens] of the n-gram that ends there; -1 before there is one."""
  ids = reviews.ids.astype(np.int64)
  keys = ids | order << 3 * _ID_BITS
  for back in range(1, order):
    keys[back:] |= ids[:-back] << back * _ID_BITS
  starts = reviews.offsets[:-1]
  for place in range(order - 1):
    keys[starts[place < np.diff(reviews.offsets)] + place] = -1
  return keys


def look_up(known: np.ndarray, keys: np.ndarray) -> np.ndarray:
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


def present_in(reviews: Reviews, places: np.ndarray) -> tuple[
    np.ndarray, np.ndarray]:
  """Each n-gram of a review once: int [m], its place, and int [m], the review.

  `places` are int [tokens], those of the n-grams that end there; -1 is none.
  """
  n = len(reviews)
  of_review = np.repeat(np.arange(n), np.diff(reviews.offsets))
  # np.unique would take ten times as long.
  pairs = np.sort((places.astype(np.int64) * n + of_review)[places >= 0])
  return np.divmod(pairs[np.diff(pairs, prepend=-1) > 0], n)


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
  if config.model.inputs == 'words':
    return NONE
  most_pairs, most_keys = _most(config, class_count)
  most = (8 * most_pairs + (8 + 8 * classes.columns(class_count)) * most_keys
          + 4096)
  content = files.read_bytes(path, most)
  try:
    return of_arrays(
        npz.read_arrays(io.BytesIO(content), most), config, class_count)
  except npz.ERRORS as e:
    raise UserError(f'{os.fspath(path)} is damaged ({e}): copy it again from '
                    'the run directory, or train again') from e


def of_arrays(arrays: Mapping[str, np.ndarray], config: ConfigDict,
              class_count: int) -> Ngrams:
  """What arrays by the names of `Ngrams` are, for a model of this config.

  Raises one of `npz.ERRORS` where an embedding or a search would answer with
  them without a word.
  """
  inputs, columns = config.model.inputs.split('+'), classes.columns(class_count)
  pairs, keys = arrays['pairs'], arrays['keys']
  for known, count in zip(
      (pairs, keys), _most(config, class_count), strict=True):
    if (known.dtype != np.int64 or known.ndim != 1 or len(known) > count
        or (np.diff(known) <= 0).any()):
      raise ValueError(f'its n-grams are not up to {count} ascending keys')
  log_odds, weights = NONE.log_odds, NONE.weights
  shape = len(keys), columns
  if 'log_odds' in inputs:
    log_odds = arrays['log_odds']
    _check_numbers('log-odds', log_odds, shape)
  if 'linear' in inputs:
    weights = arrays['weights']
    _check_numbers('weights', weights, shape if columns > 1 else shape[:1])
  return Ngrams(pairs, keys, log_odds, weights, config.data.log_odds_order,
                config.model.inputs)


def _most(config: ConfigDict, class_count: int) -> tuple[int, int]:
  """How many pairs and n-grams a model of this config knows at most."""
  data, inputs = config.data, config.model.inputs.split('+')
  most_keys = data.log_odds_ngrams
  if class_count > 2:
    most_keys = min(most_keys, most_counted(class_count))
  return ((data.bigrams - 1) * ('bigrams' in inputs),
          most_keys * data.log_odds_order * ('log_odds' in inputs))


def _check_numbers(
    name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
  """Raises ValueError unless there are numbers for each n-gram."""
  if (array.dtype != np.float32 or array.shape != shape
      or not np.isfinite(array).all()):
    raise ValueError(f'its {name} are not a number for each n-gram and class')
