"""Reviews of one film in one group, so that validation holds films unseen.

Which film a review is of, the data sets do not say. But reviews of one film
share rare names: of its actors, its characters, itself. On a random part of the
training reviews an accuracy is too high, for the names of films in the other
part, good or bad, have been learned.
"""

from collections.abc import Sequence
import itertools
import re

import numpy as np

# Raise it when `group` or `validation_rows` changes its answer.
VERSION = 1
_MOST_REVIEWS = 40  # of a group, and with a name: more is no film's own
_LEAST_SIMILAR = 0.12  # cosine from which on two reviews are joined
# Capitalised words, and runs of them, each of at least three letters.
_NAMES = re.compile(r"[A-Z][a-z']{2,}(?: [A-Z][a-z']{2,})*")


def validation_rows(texts: Sequence[str], fraction: float) -> np.ndarray:
  """Chooses whole groups, in a shuffled order that is always the same.

  Returns bool [n], True for the reviews that validate: the first groups that
  together have round(n * fraction) reviews, the last of them cut to size.
  """
  groups = group(texts)
  order = np.random.default_rng(0).permutation(len(texts))
  place = np.argsort(np.argsort(order)[groups], kind='stable')
  chosen = np.zeros(len(texts), bool)
  chosen[place[:round(len(texts) * fraction)]] = True
  return chosen


def group(texts: Sequence[str]) -> np.ndarray:
  """Joins reviews that share rare names, the most similar first.

  Returns int [n]: the row of one review of the group, the same for all in it.
  """
  rows, columns, count = _names(texts)
  shared = np.bincount(columns, minlength=count)
  rare = (shared >= 2) & (shared <= _MOST_REVIEWS)
  weights = np.log((1 + len(texts)) / np.maximum(shared, 1))  # never 0
  rows, columns = rows[rare[columns]], columns[rare[columns]]
  norms = np.sqrt(np.bincount(
      rows, weights[columns] ** 2, minlength=len(texts)))
  pairs, similar = _similarities(rows, columns, weights)
  similar = similar / (norms[pairs[0]] * norms[pairs[1]])
  joined = np.flatnonzero(similar > _LEAST_SIMILAR)
  joined = joined[np.argsort(-similar[joined], kind='stable')]
  return _join(pairs[:, joined].T.tolist(), len(texts))


def _names(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
  """Each name of each review once: its row, its name's number; their count."""
  numbers: dict[str, int] = {}
  rows, columns = [], []
  for row, text in enumerate(texts):
    found: dict[str, None] = {}  # a set's order is another in each process
    for run in _NAMES.findall(text):
      words = run.split()
      found |= dict.fromkeys(
          [*words, *map(' '.join, itertools.pairwise(words))])
    columns += [numbers.setdefault(name, len(numbers)) for name in found]
    rows += [row] * len(found)
  return np.array(rows, int), np.array(columns, int), len(numbers)


def _similarities(rows: np.ndarray, columns: np.ndarray,
                  weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Pairs of rows that share columns, int [2, pairs], and the squared weights.

  `rows` and `columns` are the places of a sparse matrix that are not 0.
  """
  order = np.lexsort((rows, columns))
  rows, columns = rows[order], columns[order]
  starts = np.flatnonzero(np.diff(columns, prepend=-1))
  sizes = np.diff(starts, append=len(columns))
  n = rows.max(initial=0) + 1
  keys, values = [np.zeros(0, int)], [np.zeros(0)]
  for size in np.unique(sizes):
    first = starts[sizes == size]
    of_name = rows[first[:, None] + np.arange(size)]  # [names, size]
    a, b = np.triu_indices(size, k=1)
    keys.append((of_name[:, a] * n + of_name[:, b]).ravel())
    values.append(np.repeat(weights[columns[first]] ** 2, len(a)))
  pairs, place = np.unique(np.concatenate(keys), return_inverse=True)
  return (np.stack(np.divmod(pairs, n)),
          np.bincount(place, np.concatenate(values), minlength=len(pairs)))


def _join(pairs: list[list[int]], n: int) -> np.ndarray:
  """Union-find over pairs in their order, groups up to `_MOST_REVIEWS`."""
  parents, sizes = list(range(n)), [1] * n
  def find(row: int) -> int:
    while parents[row] != row:
      parents[row] = row = parents[parents[row]]
    return row
  for a, b in pairs:
    a, b = find(a), find(b)
    if a != b and sizes[a] + sizes[b] <= _MOST_REVIEWS:
      parents[b] = a
      sizes[a] += sizes[b]
  return np.array([find(row) for row in range(n)], int)
