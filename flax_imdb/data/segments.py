"""Long reviews in segments, which are read side by side and pooled together.

A batch has always the same number of places for segments, so that a step is
compiled once. Reviews are dealt to the batches and devices such that hardly a
place stays empty. Training may read but some segments of a review in a step,
drawn anew each time; evaluation reads all.
"""

from collections.abc import Iterator
import dataclasses

import numpy as np

from flax_imdb.data.reading import Batch, Reading, Share, gather, of_reviews
from flax_imdb.data.reviews import Reviews

# Places for segments that evaluation has for each review of a batch: reviews
# of IMDB have 2.8 of 100 tokens.
_EVAL_SEGMENTS = 3


def most_segments(reading: Reading) -> int:
  """K, the segments of the longest review."""
  return -(-reading.max_length // reading.segment_length)


def counts(lengths: np.ndarray, reading: Reading) -> np.ndarray:
  """Segments, 1 to K, of reviews of so many tokens; int [n] both."""
  return -(-np.minimum(lengths, reading.max_length) // reading.segment_length)


def most_train_segments(reading: Reading) -> int:
  """K, the most segments of a review that a training step reads."""
  most = most_segments(reading)
  return min(most, reading.train_segments or most)


def train_counts(lengths: np.ndarray, reading: Reading) -> np.ndarray:
  """As `counts`, of those that a training step reads."""
  return np.minimum(counts(lengths, reading), most_train_segments(reading))


def eval_size(rows: int, reading: Reading) -> int:
  """S, the places for segments that evaluation has for `rows` reviews."""
  return max(_EVAL_SEGMENTS * rows, most_segments(reading))


def train_size(rows: int, reading: Reading) -> int:
  """S of a training step of `rows` reviews, of whose lengths nothing is known.

  As many as evaluation has, or, where few of each are read, room for these.
  """
  return min(most_train_segments(reading) * rows, eval_size(rows, reading))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """Which numbers of segments share a batch: the same in every epoch."""
  counts: np.ndarray  # int [n] segments of each review that a step reads
  batch_of: np.ndarray  # int [n] of the reviews in order of falling counts
  segments_a_device: int  # S, the places that each device needs at most

  def draw(self, rng: np.random.Generator) -> list[np.ndarray]:
    """The reviews of each batch, those with the most segments first.

    Which review of those with equally many goes where, and the order of the
    batches, is drawn.
    """
    order = rng.permutation(len(self.counts))
    order = order[np.argsort(-self.counts[order], kind='stable')]
    sizes = np.bincount(self.batch_of)
    batches = np.split(order[np.argsort(self.batch_of, kind='stable')],
                       np.cumsum(sizes)[:-1])
    return [batches[i] for i in rng.permutation(len(batches))]


def plan(counts: np.ndarray, batch_size: int, devices: int) -> Plan:
  """Deals reviews of these numbers of segments to the batches of an epoch."""
  falling = -np.sort(-counts)
  n = -(-len(counts) // batch_size)
  batch_of = deal(falling, n)
  # Of all batches at once: the numbers of each, which fall, and zeros.
  order = np.argsort(batch_of, kind='stable')
  sizes = np.bincount(batch_of, minlength=n)
  own = np.zeros((n, sizes.max(initial=0)), int)
  own[np.arange(own.shape[1]) < sizes[:, None]] = falling[order]
  heap = np.arange(n)[:, None] * devices + deal(own, devices)
  most = np.bincount(heap.ravel(), own.ravel()).max(initial=0)
  return Plan(counts, batch_of, int(most))


def deal(falling: np.ndarray, n: int) -> np.ndarray:
  """Deals numbers to n heaps, a number each in turn, the larger to the lower.

  `falling` are int [..., m], the largest first, of as many deals. Returns int
  [..., m] of 0 to n - 1. The heaps differ by one number at most in how many
  they have, and in their sums by no more than the largest number.
  """
  heaps = np.zeros((*falling.shape[:-1], n), int)
  chosen = np.empty(falling.shape, int)
  for start in range(0, falling.shape[-1], n):
    some = falling[..., start:start + n]
    lowest = np.argsort(heaps, axis=-1, kind='stable')[..., :some.shape[-1]]
    chosen[..., start:start + n] = lowest
    sums = np.take_along_axis(heaps, lowest, axis=-1) + some
    np.put_along_axis(heaps, lowest, sums, axis=-1)
  return chosen


def _all(rows: int, reading: Reading) -> np.ndarray:
  """Of each review 0, 1, ..., K - 1 for its segments: int [rows, K]."""
  return np.tile(np.arange(most_segments(reading)), (rows, 1))


def _drawn(counts: np.ndarray, reading: Reading,
           rng: np.random.Generator) -> np.ndarray:
  """Which of its segments a training step reads of each review, in order.

  `counts` int [m] are all that they have. Returns int [m, K] of 0 to the count
  less 1, all as likely; of a review with fewer than K then larger numbers.
  """
  keys = rng.random((len(counts), most_segments(reading)))
  keys[np.arange(keys.shape[1]) >= counts[:, None]] = np.inf
  first = np.argsort(keys, axis=1)[:, :most_train_segments(reading)]
  return np.sort(first, axis=1)


def pad(reviews: Reviews, rows: np.ndarray, batch_size: int,
        segments_a_device: int, reading: Reading, share: Share,
        rng: np.random.Generator | None = None) -> Batch:
  """Makes one batch of some reviews of a split, dealt to the devices.

  Args:
    reviews: the split.
    rows: int [m] indices of reviews, 1 <= m <= batch_size, those with the most
      segments first.
    batch_size: B, a multiple of the devices.
    segments_a_device: S.
    reading: how far they are read, in segments of L tokens.
    share: the devices whose rows to return.
    rng: draws which segments of a review a training step reads, the same ones
      for any number of devices; None reads all.

  Returns for each device, one after another, ids int32 [S, L] and lengths int32
  [S] of segments; segments int32 [B / devices, K], the places in these of each
  review's, S for none; labels, weights and places [B / devices] as of
  `batches.pad`, where a place is that in `rows`. Also what `gather` returns.
  """
  _, lengths = reading.spans(reviews, rows)
  number = counts(lengths, reading)
  chosen = (_drawn(number, reading, rng) if rng and reading.train_segments
            else _all(len(rows), reading))
  device = deal(np.minimum(number, chosen.shape[1]), share.devices)
  table = np.full((share.devices, batch_size // share.devices), -1)
  for i in range(share.devices):
    own = np.flatnonzero(device == i)
    table[i, :len(own)] = own
  return _fill(reviews, np.where(table < 0, -1, rows[table]), table,
               chosen[table.ravel()], segments_a_device, reading, share)


def _fill(reviews: Reviews, table: np.ndarray, places: np.ndarray,
          chosen: np.ndarray, size: int, reading: Reading,
          share: Share) -> Batch:
  """As `pad`; `table` int [devices, reviews a device], -1 for none.

  `chosen` int [all of table, K] are the segments to read, as far as a review
  has them.
  """
  real = table.ravel() >= 0
  rows = np.where(real, table.ravel(), 0)
  starts, lengths = reading.spans(reviews, rows)
  number = np.where(real, counts(lengths, reading), 0)
  read = np.minimum(number, chosen.shape[1])
  # Of each that is read: its review, how many of that come before, its place.
  of = np.repeat(np.arange(len(rows)), read)
  k = np.arange(len(of)) - np.repeat(np.cumsum(read) - read, read)
  by_device = read.reshape(table.shape)
  first = (np.cumsum(by_device, axis=1) - by_device).ravel()
  place = first[of] + k
  at = of // table.shape[1] * size + place
  length = reading.segment_length
  begins, sizes = np.zeros((2, share.devices * size), np.int64)
  begins[at] = starts[of] + np.where(
      number[of] > 1,
      chosen[of, k] * (lengths[of] - length) // np.maximum(number[of] - 1, 1),
      0)
  sizes[at] = np.minimum(lengths[of], length)
  segments = np.full(chosen.shape, size, np.int32)
  segments[of, k] = place
  part = share.rows(len(rows))
  return gather(reviews, begins, sizes, length,
                share.rows(share.devices * size)) | of_reviews(
                    reviews, rows[part]) | {
      'segments': segments[part], 'weights': real[part].astype(np.float32),
      'places': np.maximum(places, 0).ravel()[part].astype(np.int32)}


def eval_batches(reviews: Reviews, batch_size: int, reading: Reading,
                 share: Share) -> Iterator[tuple[np.ndarray, Batch]]:
  """Every review once, in their order; see `batches.eval_batches`.

  A device has as many reviews as its rows and places for segments allow.
  """
  rows = batch_size // share.devices
  size = eval_size(rows, reading)
  number = counts(np.diff(reviews.offsets), reading).tolist()
  chosen = _all(batch_size, reading)
  row = 0
  while row < len(number):
    table = np.full((share.devices, rows), -1)
    for device in range(share.devices):
      free, i = size, 0
      while i < rows and row < len(number) and number[row] <= free:
        table[device, i] = row
        free, i, row = free - number[row], i + 1, row + 1
    yield table.ravel(), _fill(
        reviews, table, table, chosen, size, reading, share)
