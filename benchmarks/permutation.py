"""An order of any number of texts that is computed instead of stored.

  python benchmarks/permutation.py

simulates what docs/large_data.md plans for 10^9 texts: the text at a place of a
pass is a function of (seed, pass, place), a permutation of n numbers by a
Feistel network, of which those that fall outside n are sent through again
(Black & Rogaway 2002, "Ciphers with arbitrary finite domains", cycle walking).
Eight bytes a text, which the order of a pass takes today, become none.

It prints whether it is a permutation (all of 10^6 and of 999,983 places), what
a place costs, and how it mixes 10^9 beside NumPy's own permutation of 10^6:
chi-square of 100 x 100 boxes of (place, text) for 10^6 places, whose mean is
9,801 and standard deviation 140 where the order is random; and the correlation
of a text's number with the next one's, whose standard deviation is 0.001.
"""

import time

import numpy as np

ROUNDS = 6
BOXES = 100
SAMPLE = 1_000_000


def mixed(x: np.ndarray, key: np.uint64) -> np.ndarray:
  """uint64 [m] -> uint64 [m], all bits on all (Stafford 2011, mix 13)."""
  x = x + key
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def texts_at(places: np.ndarray, n: int, seed: int, number: int) -> np.ndarray:
  """uint64 [m] places of pass `number` -> uint64 [m], the texts there."""
  half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
  mask = np.uint64((1 << int(half)) - 1)
  keys = np.random.default_rng([seed, number]).integers(
      0, 1 << 64, ROUNDS, np.uint64)

  def network(x: np.ndarray) -> np.ndarray:
    left, right = x >> half, x & mask
    for key in keys:
      left, right = right, left ^ (mixed(right, key) & mask)
    return left << half | right
  found = network(places)
  while len(outside := np.flatnonzero(found >= np.uint64(n))):
    found[outside] = network(found[outside])
  return found


def chi_square(places: np.ndarray, texts: np.ndarray, n: int) -> float:
  """Of the boxes, as above."""
  box = np.uint64(BOXES)
  counts = np.bincount((places * box // np.uint64(n) * box
                        + texts * box // np.uint64(n)).astype(np.int64),
                       minlength=BOXES**2)
  mean = len(places) / BOXES**2
  return float(((counts - mean) ** 2 / mean).sum())


def main() -> None:
  """Prints the figures."""
  for n in (1_000_000, 999_983):
    found = texts_at(np.arange(n, dtype=np.uint64), n, 0, 0)
    print(f'{n:,} places: a permutation: '
          f'{(np.sort(found) == np.arange(n)).all()}')
  for n in (1_000_000, 1_000_000_000):
    places = np.sort(np.random.default_rng(1).choice(
        n, SAMPLE, replace=False, shuffle=False)).astype(np.uint64)
    start = time.perf_counter()
    texts = texts_at(places, n, 0, 0)
    cost = (time.perf_counter() - start) / SAMPLE
    neighbours = texts_at(np.arange(SAMPLE, dtype=np.uint64), n, 0, 1)
    print(f'{n:,} texts, computed: {cost * 1e9:.0f} ns a place, chi-square '
          f'{chi_square(places, texts, n):,.0f}, correlation of neighbours '
          f'{np.corrcoef(neighbours[:-1], neighbours[1:])[0, 1]:+.4f}')
  n = 1_000_000
  stored = np.random.default_rng(0).permutation(n).astype(np.uint64)
  print(f'{n:,} texts, stored by NumPy: chi-square '
        f'{chi_square(np.arange(n, dtype=np.uint64), stored, n):,.0f}, '
        'correlation of neighbours '
        f'{np.corrcoef(stored[:-1], stored[1:])[0, 1]:+.4f}')


if __name__ == '__main__':
  main()
