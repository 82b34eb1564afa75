"""(seed, step) -> batch is a pure function that loses and repeats nothing."""

import numpy as np
import pytest

from flax_imdb.data.batches import (
  WINDOW,
  TrainBatches,
  eval_batches,
  pad,
  padded_length,
)
from flax_imdb.data.reading import Reading
from flax_imdb.data.reviews import Reviews


def _reviews(n, seed=0):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 90, n)
  ids = rng.integers(4, 1000, lengths.sum()).astype(np.uint16)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  # The first id of a review is its number, so that a batch tells its rows.
  ids[offsets[:-1]] = np.arange(n)
  return Reviews(ids, offsets, rng.integers(0, 2, n).astype(np.int8))


def _rows(batch):
  return batch['ids'][batch['weights'] > 0, 0]


@pytest.mark.parametrize('n', [1, 15, 16, 17, 100])
@pytest.mark.parametrize('bucket_width', [0, 32])
def test_an_epoch_holds_every_review_once(n, bucket_width):
  batches = TrainBatches(
      _reviews(n), 0, 16, Reading(64, bucket_width))
  for epoch in range(2):
    steps = range(epoch * batches.steps_per_epoch,
                  (epoch + 1) * batches.steps_per_epoch)
    rows = np.concatenate([_rows(batches(step)) for step in steps])
    assert sorted(rows) == list(range(n))


@pytest.mark.parametrize('reading', [
    Reading(64), Reading(64, 32), Reading(64, 0, 8)])
def test_an_epoch_of_few_reviews_is_whole_passes_in_orders_of_their_own(
    reading):
  reviews = _reviews(50)
  batches = TrainBatches(reviews, 0, 16, reading, min_steps_per_epoch=9)
  once = TrainBatches(reviews, 0, 16, reading)
  assert (once.steps_per_epoch, once.passes_per_epoch) == (4, 1)
  assert (batches.steps_per_epoch, batches.passes_per_epoch) == (12, 3)
  passes = [np.concatenate([batches.rows(step) for step in range(i, i + 4)])
            for i in range(0, 24, 4)]  # of two epochs
  for rows in passes:
    assert sorted(rows) == list(range(50))
  assert len({tuple(rows) for rows in passes}) == 6


@pytest.mark.parametrize('most, steps', [(0, 7), (3, 3), (7, 7), (9, 7)])
def test_an_epoch_of_many_reviews_is_a_part_of_a_pass(most, steps):
  reviews = _reviews(100)
  whole = TrainBatches(reviews, 0, 16, Reading(64, 32))
  batches = TrainBatches(
      reviews, 0, 16, Reading(64, 32), max_steps_per_epoch=most)
  assert batches.steps_per_epoch == steps
  for step in range(14):  # the next epoch goes on where this one ended
    np.testing.assert_array_equal(batches.rows(step), whole.rows(step))


@pytest.mark.parametrize('least', [0, 1, 6, 7])
def test_an_epoch_of_enough_steps_is_one_pass_as_ever(least):
  reviews = _reviews(100)
  before = TrainBatches(reviews, 0, 16, Reading(64, 32))
  batches = TrainBatches(
      reviews, 0, 16, Reading(64, 32), min_steps_per_epoch=least)
  assert batches.steps_per_epoch == before.steps_per_epoch == 7
  for step in range(14):
    np.testing.assert_array_equal(batches.rows(step), before.rows(step))


@pytest.mark.parametrize('least', [0, 12])
def test_a_batch_depends_on_seed_and_step_alone(least):
  reviews = _reviews(100)
  first = TrainBatches(
      reviews, 3, 16, Reading(64, 32), min_steps_per_epoch=least)
  forward = [first(step) for step in range(14)]
  second = TrainBatches(
      reviews, 3, 16, Reading(64, 32), min_steps_per_epoch=least)
  for step in reversed(range(14)):  # any order, as after a resume
    for name, value in second(step).items():
      np.testing.assert_array_equal(value, forward[step][name])
  other = TrainBatches(reviews, 4, 16, Reading(64, 32))
  assert any((_rows(other(s)) != _rows(forward[s])).any() for s in range(3))
  assert any((_rows(forward[s]) != _rows(forward[s + 7])).any()
             for s in range(3))  # epochs differ


@pytest.mark.parametrize('bucket_width', [0, 32])
def test_each_epoch_groups_the_reviews_anew(bucket_width):
  batches = TrainBatches(
      _reviews(640), 0, 4, Reading(64, bucket_width))
  first, second = (
      {frozenset(_rows(batches(step))) for step in range(start, start + 160)}
      for start in (0, 160))
  assert len(first & second) < 16


def test_batches_come_in_no_order_of_length():
  batches = TrainBatches(_reviews(16 * WINDOW), 0, 16, Reading(90, 8))
  widths = [batches(step)['ids'].shape[1] for step in range(WINDOW)]
  assert len(set(widths)) > 5
  assert widths not in (sorted(widths), sorted(widths, reverse=True))


def test_pad_equals_a_loop_over_the_reviews():
  reviews = _reviews(30)
  reviews.ids[0] = 77  # not 0, which stands in the padding
  rows = np.array([5, 29, 0])
  batch = pad(reviews, rows, 4, Reading(50, 16))
  longest = max(batch['lengths'])
  assert batch['ids'].shape == (4, min(-(-longest // 16) * 16, 50))
  for place, row in enumerate(rows):
    words = reviews.ids[reviews.offsets[row]:reviews.offsets[row + 1]][:50]
    np.testing.assert_array_equal(batch['ids'][place, :len(words)], words)
    assert (batch['ids'][place, len(words):] == 0).all()
    assert batch['lengths'][place] == len(words)
    assert batch['labels'][place] == reviews.labels[row]
  np.testing.assert_array_equal(batch['weights'], [1, 1, 1, 0])
  assert {k: v.dtype.name for k, v in batch.items()} == {
      'ids': 'int32', 'lengths': 'int32', 'labels': 'float32',
      'weights': 'float32', 'places': 'int32'}


@pytest.mark.parametrize(('length', 'width', 'want'), [
    (1, 64, 64), (64, 64, 64), (65, 64, 128), (449, 64, 500), (500, 64, 500),
    (3, 0, 500), (500, 0, 500)])
def test_buckets(length, width, want):
  assert padded_length(length, width, 500) == want


def test_buckets_save_padding():
  reviews = _reviews(2000)
  def positions(bucket_width):
    batches = TrainBatches(reviews, 0, 16, Reading(90, bucket_width))
    return sum(batches(s)['ids'].size for s in range(batches.steps_per_epoch))
  tokens = reviews.lengths(90).sum()
  assert positions(0) > 1.9 * tokens
  assert positions(8) < 1.2 * tokens


@pytest.mark.parametrize('n', [1, 8, 9, 23])
def test_eval_batches_hold_every_review_once(n):
  reviews = _reviews(n)
  seen = []
  for rows, batch in eval_batches(reviews, 8, Reading(64, 32)):
    real = rows[rows >= 0]
    np.testing.assert_array_equal(_rows(batch), real)
    assert batch['weights'].sum() == len(real)
    seen += list(real)
  assert sorted(seen) == list(range(n))


def test_eval_batches_come_shortest_first():
  longest = [batch['lengths'].max() for _, batch in
             eval_batches(_reviews(100), 8, Reading(64, 32))]
  assert longest == sorted(longest) and len(set(longest)) > 5


def test_a_slice_of_reviews_is_the_same_reviews():
  reviews = _reviews(20)
  part = reviews[5:9]
  assert len(part) == 4
  a = pad(part, np.arange(4), 4, Reading(90, 8))
  b = pad(reviews, np.arange(5, 9), 4, Reading(90, 8))
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])
