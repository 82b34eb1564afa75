"""Which tokens of reviews are read, as arrays for the devices of a process."""

import dataclasses

from ml_collections import ConfigDict
import numpy as np

from flax_imdb.data.reviews import Reviews

Batch = dict[str, np.ndarray]  # by the name of what it holds


@dataclasses.dataclass(frozen=True)
class Reading:
  """Which tokens of a review are read, and how; see configs/default.py."""
  max_length: int
  bucket_width: int = 0
  segment_length: int = 0
  train_segments: int = 0
  read: str = 'first'

  @classmethod
  def of(cls, data: ConfigDict) -> 'Reading':
    """As config.data says."""
    return cls(**{x.name: data[x.name] for x in dataclasses.fields(cls)})

  def spans(self, reviews: Reviews, rows: np.ndarray) -> tuple[
      np.ndarray, np.ndarray]:
    """Where in `reviews.ids` the reading of each row begins, and its tokens.

    Spread segments are of the whole review, and cover what they can of it.
    """
    starts, stops = reviews.offsets[rows], reviews.offsets[rows + 1]
    if self.read == 'spread':
      return starts, stops - starts
    lengths = np.minimum(stops - starts, self.max_length)
    return (stops - lengths if self.read == 'last' else starts), lengths


@dataclasses.dataclass(frozen=True)
class Share:
  """What of each batch is for the devices of one process."""
  devices: int = 1  # of all processes; each has as many rows of a batch
  own: slice = dataclasses.field(  # of the devices; before Python 3.12 a slice
      default_factory=lambda: slice(None))  # can't be hashed, nor be a default

  def rows(self, batch_size: int) -> slice:
    """The rows of a batch for these devices."""
    first, last, _ = self.own.indices(self.devices)
    return slice(first * batch_size // self.devices,
                 last * batch_size // self.devices)


ALONE = Share()  # all rows for one device


def gather(reviews: Reviews, starts: np.ndarray, lengths: np.ndarray,
           width: int, part: slice) -> Batch:
  """Reads spans of tokens, int [R] each, at most `width` T long.

  Returns of those in `part` ids int32 [R, T], padded, and lengths int32 [R].
  Where the reviews have such features also log_odds float32 [R, T, features],
  and bigrams int32 [R, T], which are places in bigram_rows int32 [all R * T],
  the rows of the embedding that the whole batch reads, ascending, filled up
  with some that no embedding has: a step reads and changes those rows alone.
  """
  found = {}
  if 'bigrams' in reviews.features:
    read = _padded(reviews.features['bigrams'], starts, lengths, width)
    # As np.unique, which sorts: it would take two to ten times as long.
    is_read = np.zeros(read.max() + 1, bool)
    is_read[read] = True
    rows = np.flatnonzero(is_read)
    places = np.empty(len(is_read), np.int32)
    places[rows] = np.arange(len(rows), dtype=np.int32)
    filled = np.arange(1 << 30, (1 << 30) + read.size, dtype=np.int32)
    filled[:len(rows)] = rows
    found = {'bigram_rows': filled, 'bigrams': places[read[part]]}
  starts, lengths = starts[part], lengths[part]
  if 'log_odds' in reviews.features:
    found['log_odds'] = _padded(
        reviews.features['log_odds'], starts, lengths, width)
  return found | {
      'ids': _padded(reviews.ids, starts, lengths, width).astype(np.int32),
      'lengths': lengths.astype(np.int32)}


def _padded(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray,
            width: int) -> np.ndarray:
  """[tokens of all reviews, ...] -> [R, T, ...] spans of them, then zeros.

  Of ids these are `PADDING_ID`. Row by row: indices of all places would take
  three to ten times as long.
  """
  found = np.zeros((len(starts), width, *tokens.shape[1:]), tokens.dtype)
  for row, start, length in zip(
      found, starts.tolist(), lengths.tolist(), strict=True):
    row[:length] = tokens[start:start + length]
  return found


def of_reviews(reviews: Reviews, rows: np.ndarray) -> Batch:
  """What a batch has of each review: labels, and linear if any.

  float32 [R]; [R, K] where the reviews have so many.
  """
  found = {'labels': reviews.labels[rows].astype(np.float32)}
  return found if reviews.linear is None else found | {
      'linear': reviews.linear[rows]}
