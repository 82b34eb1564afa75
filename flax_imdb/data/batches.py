"""(seed, step) -> batch: which reviews, in which order, padded how far.

There is no iterator and so no iterator state: step 1,234 of a resumed run
reads what step 1,234 of the undisturbed run read.
"""

from collections.abc import Iterator
import dataclasses
import functools

import numpy as np

from flax_imdb.data.reviews import Reviews
from flax_imdb.data.tokenizer import PADDING_ID

# Reviews of similar length share a batch, chosen among this many batches: more
# would pad less (64: 3 % of the positions instead of 5 %) and mix less.
WINDOW = 16

Batch = dict[str, np.ndarray]


def padded_length(length: int, bucket_width: int, max_length: int) -> int:
  """The padded width of a batch whose longest review has `length` tokens.

  A multiple of `bucket_width`, at most `max_length`; 0 means always that.
  """
  if not bucket_width:
    return max_length
  return min(-(-length // bucket_width) * bucket_width, max_length)


def pad(reviews: Reviews, rows: np.ndarray, batch_size: int, bucket_width: int,
        max_length: int, part: slice = slice(None)) -> Batch:
  """Makes one batch of some reviews of a split.

  Args:
    reviews: the split.
    rows: int [m] indices of reviews, 1 <= m <= batch_size.
    batch_size: B; the rows past m repeat the first review with weight 0.
    bucket_width: see `padded_length`.
    max_length: reviews are cut to their first max_length tokens.
    part: the rows to return, as wide as the whole batch.

  Returns ids int32 [B, T], lengths int32 [B], labels float32 [B], weights
  float32 [B]; T is the bucket of the longest of these reviews.
  """
  weights = (np.arange(batch_size) < len(rows)).astype(np.float32)
  rows = np.concatenate(
      [rows, np.full(batch_size - len(rows), rows[0], rows.dtype)])
  starts = reviews.offsets[rows]
  lengths = np.minimum(reviews.offsets[rows + 1] - starts, max_length)
  width = padded_length(int(lengths.max()), bucket_width, max_length)
  rows, starts, lengths, weights = (
      x[part] for x in (rows, starts, lengths, weights))
  place = np.arange(width)
  inside = place < lengths[:, None]  # [B, T]
  ids = reviews.ids[np.where(inside, starts[:, None] + place, 0)]
  return {'ids': np.where(inside, ids, PADDING_ID).astype(np.int32),
          'lengths': lengths.astype(np.int32), 'weights': weights,
          'labels': reviews.labels[rows].astype(np.float32)}


@dataclasses.dataclass(frozen=True, eq=False)
class TrainBatches:
  """The batches of a whole training run, by their step.

  The attributes are the training split, the seed of the order, and those that
  `pad` takes. An epoch's last batch may be filled up with weight 0. Without a
  `bucket_width` reviews of any length share a batch.
  """
  reviews: Reviews
  seed: int
  batch_size: int
  bucket_width: int
  max_length: int
  part: slice = dataclasses.field(default_factory=lambda: slice(None))

  @property
  def steps_per_epoch(self) -> int:
    """The last short batch is counted."""
    return -(-len(self.reviews) // self.batch_size)

  def rows(self, step: int) -> np.ndarray:
    """The reviews of step 0, 1, 2, ... of the run, on all devices: int [m]."""
    epoch, i = divmod(step, self.steps_per_epoch)
    return _epoch(self, epoch)[i]

  def __call__(self, step: int) -> Batch:
    """The batch of step 0, 1, 2, ... of the run, as `pad` returns it."""
    return pad(self.reviews, self.rows(step), self.batch_size,
               self.bucket_width, self.max_length, self.part)


@functools.lru_cache(maxsize=1)
def _epoch(batches: TrainBatches, epoch: int) -> list[np.ndarray]:
  rng = np.random.default_rng([batches.seed, epoch])
  order = rng.permutation(len(batches.reviews))
  size = batches.batch_size
  if not batches.bucket_width:
    return [order[i:i + size] for i in range(0, len(order), size)]
  lengths = batches.reviews.lengths(batches.max_length)
  rows = []
  for start in range(0, len(order), size * WINDOW):
    window = order[start:start + size * WINDOW]
    window = window[np.argsort(lengths[window], kind='stable')]
    rows += [window[i:i + size] for i in range(0, len(window), size)]
  return [rows[i] for i in rng.permutation(len(rows))]


def eval_batches(
    reviews: Reviews, batch_size: int, bucket_width: int, max_length: int,
    part: slice = slice(None)) -> Iterator[tuple[np.ndarray, Batch]]:
  """Every review once, the shortest first; the arguments are those of `pad`.

  Yields (rows, batch): int [m], the reviews in the batch's first m rows, and
  what `pad` returns for them.
  """
  order = np.argsort(reviews.lengths(max_length), kind='stable')
  for start in range(0, len(order), batch_size):
    rows = order[start:start + batch_size]
    yield rows, pad(reviews, rows, batch_size, bucket_width, max_length, part)
