"""(seed, step) -> batch: which reviews, in which order, padded how far.

There is no iterator and so no iterator state: step 1,234 of a resumed run
reads what step 1,234 of the undisturbed run read. `segments` has what is
different where a review is read in parts.
"""

from collections.abc import Iterator
import dataclasses
import functools

from ml_collections import ConfigDict
import numpy as np

from flax_imdb.data import classes, segments
from flax_imdb.data.reading import (
  ALONE,
  Batch,
  Reading,
  Share,
  gather,
  of_reviews,
)
from flax_imdb.data.reviews import Reviews

# Reviews of similar length share a batch, chosen among this many batches: more
# would pad less (64: 3 % of the positions instead of 5 %) and mix less.
WINDOW = 16

def padded_length(length: int, bucket_width: int, max_length: int) -> int:
  """The padded width of a batch whose longest review has `length` tokens.

  A multiple of `bucket_width`, at most `max_length`; 0 means always that.
  """
  if not bucket_width:
    return max_length
  return min(-(-length // bucket_width) * bucket_width, max_length)


def pad(reviews: Reviews, rows: np.ndarray, batch_size: int, reading: Reading,
        share: Share = ALONE) -> Batch:
  """Makes one batch of some reviews of a split, each read in one.

  Args:
    reviews: the split.
    rows: int [m] indices of reviews, 1 <= m <= batch_size.
    batch_size: B; the rows past m repeat the first review with weight 0.
    reading: how far they are read and padded.
    share: the rows to return, as wide as the whole batch.

  Returns ids int32 [B, T], lengths int32 [B], weights float32 [B], places int32
  [B], of the rows; T is the bucket of the longest of these reviews. And what
  `of_reviews` has of them, and `gather` makes of `reviews.features`.
  """
  weights = (np.arange(batch_size) < len(rows)).astype(np.float32)
  rows = np.concatenate(
      [rows, np.full(batch_size - len(rows), rows[0], rows.dtype)])
  starts, lengths = reading.spans(reviews, rows)
  width = padded_length(
      int(lengths.max()), reading.bucket_width, reading.max_length)
  part = share.rows(batch_size)
  return gather(reviews, starts, lengths, width, part) | of_reviews(
      reviews, rows[part]) | {
      'weights': weights[part],
      'places': np.arange(batch_size, dtype=np.int32)[part]}


@dataclasses.dataclass(frozen=True, eq=False)
class TrainBatches:
  """The batches of a whole training run, by their step.

  The attributes are the training split, the seed of the order, and those that
  `pad` takes. A pass reads each review once, in an order of its own, and its
  last batch may be filled up with weight 0; an epoch is a pass, or as many as
  have `min_steps_per_epoch`, or a part of one of `max_steps_per_epoch`. Without
  a `bucket_width` reviews of any length share a batch.
  """
  reviews: Reviews
  seed: int
  batch_size: int
  reading: Reading
  share: Share = ALONE
  min_steps_per_epoch: int = 0
  max_steps_per_epoch: int = 0  # 0 = no limit

  @property
  def _steps_per_pass(self) -> int:
    return -(-len(self.reviews) // self.batch_size)

  @property
  def passes_per_epoch(self) -> int:
    """How often an epoch reads each review: once, of a large split."""
    return max(1, -(-self.min_steps_per_epoch // self._steps_per_pass))

  @property
  def steps_per_epoch(self) -> int:
    """The last short batch of each pass is counted."""
    steps = self.passes_per_epoch * self._steps_per_pass
    return min(steps, self.max_steps_per_epoch or steps)

  def first_of_each_shape(self, steps: range) -> list[int]:
    """Those of these steps whose batch has a shape that is new among them."""
    reading = self.reading
    if reading.segment_length:
      return list(steps[:1])
    lengths = self.reviews.lengths(reading.max_length)
    first: dict[int, int] = {}  # by the width
    for step in steps:
      first.setdefault(padded_length(
          int(lengths[self.rows(step)].max()), reading.bucket_width,
          reading.max_length), step)
    return list(first.values())

  def rows(self, step: int) -> np.ndarray:
    """The reviews of step 0, 1, 2, ... of the run, on all devices: int [m]."""
    number, i = divmod(step, self._steps_per_pass)
    return _pass(self, number)[i]

  def tokens(self, step: int) -> int:
    """How many tokens a step reads, on all devices."""
    reading = self.reading
    lengths = np.minimum(reading.spans(self.reviews, self.rows(step))[1],
                         reading.max_length)
    if reading.segment_length:
      most = segments.most_train_segments(reading)
      lengths = np.minimum(lengths, most * reading.segment_length)
    return int(lengths.sum())

  def __call__(self, step: int) -> Batch:
    """The batch of step 0, 1, 2, ... of the run, as `pad` returns it.

    Or as `segments.pad`, where reviews are read in segments.
    """
    rows = self.rows(step)
    if not self.reading.segment_length:
      return pad(self.reviews, rows, self.batch_size, self.reading, self.share)
    # 1 for another stream than that of the order.
    return segments.pad(self.reviews, rows, self.batch_size,
                        _plan(self).segments_a_device, self.reading, self.share,
                        np.random.default_rng([self.seed, step, 1]))


@functools.lru_cache(maxsize=1)
def _plan(batches: TrainBatches) -> segments.Plan:
  return segments.plan(
      segments.train_counts(
          np.diff(batches.reviews.offsets), batches.reading),
      batches.batch_size, batches.share.devices)


@functools.lru_cache(maxsize=1)
def _pass(batches: TrainBatches, number: int) -> list[np.ndarray]:
  rng = np.random.default_rng([batches.seed, number])
  if batches.reading.segment_length:
    return _plan(batches).draw(rng)
  order = rng.permutation(len(batches.reviews))
  size = batches.batch_size
  if not batches.reading.bucket_width:
    return [order[i:i + size] for i in range(0, len(order), size)]
  lengths = batches.reviews.lengths(batches.reading.max_length)
  rows = []
  for start in range(0, len(order), size * WINDOW):
    window = order[start:start + size * WINDOW]
    window = window[np.argsort(lengths[window], kind='stable')]
    rows += [window[i:i + size] for i in range(0, len(window), size)]
  return [rows[i] for i in rng.permutation(len(rows))]


def eval_batches(
    reviews: Reviews, batch_size: int, reading: Reading,
    share: Share = ALONE) -> Iterator[tuple[np.ndarray, Batch]]:
  """Every review once; the arguments are those of `pad`.

  Yields (rows, batch): int [B], the review in each row of the whole batch, or
  -1, and what `pad` returns for them, or `segments.pad`. Whole reviews come the
  shortest first.
  """
  if reading.segment_length:
    yield from segments.eval_batches(reviews, batch_size, reading, share)
    return
  order = np.argsort(reviews.lengths(reading.max_length), kind='stable')
  for start in range(0, len(order), batch_size):
    rows = order[start:start + batch_size]
    batch = pad(reviews, rows, batch_size, reading, share)
    yield np.pad(rows, (0, batch_size - len(rows)), constant_values=-1), batch


def eval_sizes(reviews: Reviews, batch_size: int, reading: Reading,
               share: Share = ALONE) -> set[tuple[int, int]]:
  """The shapes of `ids` for one device, in what `eval_batches` yields."""
  rows = batch_size // share.devices
  if reading.segment_length:
    return {(segments.eval_size(rows, reading), reading.segment_length)}
  lengths = np.sort(reviews.lengths(reading.max_length))
  longest = [*lengths[batch_size - 1:-1:batch_size], *lengths[-1:]]
  return {(rows, padded_length(
      int(length), reading.bucket_width, reading.max_length))
          for length in longest}


def shapes(config: ConfigDict, rows: int, devices: int,
           ids: tuple[int, int] | None = None, class_count: int = 2,
           training: bool = False) -> dict[str, tuple[tuple[int, ...], str]]:
  """Shape and dtype of each array of a batch for one of so many devices.

  With `rows` reviews a device and this shape of `ids`. By default they are as
  wide as can be; in segments as many of these as evaluation has, or as
  `segments.train_size` gives a step of `training`.
  """
  reading, inputs = Reading.of(config.data), config.model.inputs.split('+')
  size, width = rows, reading.max_length
  columns = classes.columns(class_count)
  each = (rows,) if columns == 1 else (rows, columns)
  found: dict[str, tuple[tuple[int, ...], str]] = {
      name: ((rows,), dtype) for name, dtype in (
      ('labels', 'float32'), ('weights', 'float32'), ('places', 'int32'))}
  if reading.segment_length:
    size, most = (
        (segments.train_size(rows, reading),
         segments.most_train_segments(reading)) if training else
        (segments.eval_size(rows, reading), segments.most_segments(reading)))
    width = reading.segment_length
    found['segments'] = (rows, most), 'int32'
  size, width = ids or (size, width)
  if 'bigrams' in inputs:
    found['bigrams'] = (size, width), 'int32'
    found['bigram_rows'] = (devices * size * width,), 'int32'
  if 'linear' in inputs:
    found['linear'] = each, 'float32'
  if 'log_odds' in inputs:
    found['log_odds'] = (
        size, width, config.data.log_odds_order * columns), 'float32'
  if config.self_training_rounds:
    found['labels'] = each, 'float32'
  return found | {
      'ids': ((size, width), 'int32'), 'lengths': ((size,), 'int32')}
