"""Segments cover a review as the config says, and batches have one shape."""

import numpy as np
import pytest
from support.models import default_with

from flax_imdb.data import segments
from flax_imdb.data.batches import TrainBatches, eval_batches, shapes
from flax_imdb.data.reading import Reading, Share
from flax_imdb.data.reviews import Reviews

READING = Reading(max_length=40, segment_length=8)
SOME = Reading(max_length=40, segment_length=8, train_segments=2)


def _reviews(n=150, longest=60, seed=0):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, longest, n)
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  # Each token tells its review and its place in it.
  of = np.repeat(np.arange(n), lengths)
  place = np.arange(offsets[-1]) - offsets[of]
  return Reviews((of * 100 + place + 5).astype(np.uint32), offsets,
                 rng.integers(0, 2, n).astype(np.int8))


def _read(batch, devices):
  """{review: [(first place, tokens) of each segment]} and the labels."""
  found, labels = {}, {}
  rows, size = len(batch['labels']) // devices, len(batch['ids']) // devices
  for i in np.flatnonzero(batch['weights']):
    own = slice(i // rows * size, (i // rows + 1) * size)
    ids, lengths = batch['ids'][own], batch['lengths'][own]
    spans = []
    for place in batch['segments'][i]:
      if place < size:
        tokens = ids[place, :lengths[place]].astype(int) - 5
        assert (ids[place, lengths[place]:] == 0).all()
        assert len({*(tokens // 100)}) == 1
        spans.append((tokens[0] % 100, len(tokens)))
        np.testing.assert_array_equal(
            tokens % 100, spans[-1][0] + np.arange(len(tokens)))
    found[int(tokens[0]) // 100] = spans
    labels[int(tokens[0]) // 100] = batch['labels'][i]
  return found, labels


# Of four devices each has three or four of a batch's 15 reviews.
@pytest.mark.parametrize(('reading', 'full'), [(READING, 0.9), (SOME, 0.85)])
@pytest.mark.parametrize('devices', [1, 2, 4])
def test_an_epoch_reads_every_review_once_in_batches_of_one_shape(
    devices, reading, full):
  reviews = _reviews()
  batches = TrainBatches(reviews, 0, 16, reading, Share(devices))
  shapes, used, compositions = set(), [], []
  for epoch in range(2):
    found = {}
    for i in range(batches.steps_per_epoch):
      step = epoch * batches.steps_per_epoch + i
      batch = batches(step)
      shapes.add(tuple((k, v.shape) for k, v in sorted(batch.items())))
      read, labels = _read(batch, devices)
      assert not set(read) & set(found)
      assert set(read) == set(batches.rows(step).tolist())
      found |= read
      used.append((batch['lengths'] > 0).mean())
      for row, label in labels.items():
        assert label == reviews.labels[row]
    assert sorted(found) == list(range(len(reviews)))
    compositions.append({frozenset(batches.rows(
        epoch * batches.steps_per_epoch + i).tolist())
                         for i in range(batches.steps_per_epoch)})
  assert len(shapes) == 1
  assert np.mean(used) > full  # hardly a place stays empty
  assert not compositions[0] & compositions[1]


@pytest.mark.parametrize('read', ['first', 'last', 'spread'])
def test_segments_are_spread_evenly_over_what_is_read(read):
  reviews = _reviews()
  reading = Reading(max_length=40, segment_length=8, read=read)
  batches = TrainBatches(reviews, 0, 150, reading, Share())
  found, _ = _read(batches(0), 1)
  for row, spans in found.items():
    n = int(np.diff(reviews.offsets)[row])
    whole = n if read == 'spread' else min(n, 40)
    first = n - whole if read == 'last' else 0
    assert len(spans) == -(-min(n, 40) // 8)
    assert spans[0] == (first, min(whole, 8))
    assert spans[-1][0] + spans[-1][1] == first + whole
    gaps = np.diff([start for start, _ in spans])
    assert len(spans) < 2 or gaps.max() - gaps.min() <= 1
    if whole <= 40:  # nothing is left out
      assert len(spans) < 2 or gaps.max() <= 8


@pytest.mark.parametrize('n', [1, 2, 5])
@pytest.mark.parametrize('read', ['first', 'last', 'spread'])
def test_training_reads_some_segments_anew_each_time_and_each_as_often(read, n):
  reviews = _reviews(n=30)
  all_of = Reading(max_length=40, segment_length=8, read=read)
  some_of = Reading(40, segment_length=8, read=read, train_segments=n)
  every, _ = _read(TrainBatches(reviews, 0, 30, all_of)(0), 1)
  batches = TrainBatches(reviews, 0, 30, some_of)
  passes = 600
  found = [_read(batches(step), 1)[0] for step in range(passes)]
  for row, spans in every.items():
    read_n = min(n, len(spans))
    times = dict.fromkeys(spans, 0)
    for one in found:
      assert len(one[row]) == read_n and one[row] == sorted(set(one[row]))
      for span in one[row]:
        times[span] += 1  # KeyError for a span that evaluation does not read
    # Six standard deviations of a binomial distribution.
    share = read_n / len(spans)
    limit = 6 * np.sqrt(passes * share * (1 - share))
    assert max(abs(x - passes * share) for x in times.values()) <= limit
  # And evaluation reads all.
  (_, batch), = eval_batches(reviews, 200, some_of)
  assert _read(batch, 1)[0] == every


def test_which_segments_a_step_reads_depends_on_seed_and_step_alone():
  reviews = _reviews()
  def read(step, seed=0, devices=1):
    batches = TrainBatches(reviews, seed, 150, SOME, Share(devices))
    return _read(batches(step), devices)[0]
  assert read(3) == read(3) == read(3, devices=2) == read(3, devices=3)
  assert read(3) != read(4) and read(3) != read(3, seed=1)


def test_a_step_counts_the_tokens_that_it_reads():
  reviews = _reviews()
  for reading in (SOME, READING):
    batches = TrainBatches(reviews, 0, 16, reading, Share(2))
    lengths = np.minimum(np.diff(reviews.offsets)[batches.rows(1)], 40)
    assert batches.tokens(1) == np.minimum(
        lengths, 16 if reading is SOME else 40).sum()
  # Without segments there is nothing to draw.
  whole = Reading(40, 8, train_segments=1)
  assert TrainBatches(reviews, 0, 16, whole).tokens(1) == TrainBatches(
      reviews, 0, 16, Reading(40, 8)).tokens(1)


@pytest.mark.parametrize('reading', [READING, SOME])
@pytest.mark.parametrize('devices', [1, 2, 4])
def test_what_shares_a_batch_and_its_places_do_not_depend_on_devices(
    devices, reading):
  reviews = _reviews()
  one = TrainBatches(reviews, 0, 16, reading, Share())
  some = TrainBatches(reviews, 0, 16, reading, Share(devices))
  for step in range(4):
    np.testing.assert_array_equal(one.rows(step), some.rows(step))
    batch = some(step)
    rows = some.rows(step)
    read, _ = _read(batch, devices)
    for i in np.flatnonzero(batch['weights']):
      size = len(batch['ids']) // devices
      first = batch['ids'][i // (16 // devices) * size
                           + batch['segments'][i, 0], 0]
      assert (int(first) - 5) // 100 == rows[batch['places'][i]]
    assert set(read) == set(rows.tolist())


def test_a_process_gets_the_part_of_its_own_devices():
  reviews = _reviews()
  reviews.features['bigrams'] = np.arange(len(reviews.ids), dtype=np.int32) % 91
  whole = TrainBatches(reviews, 0, 16, READING, Share(4))(3)
  for first in (0, 2):
    part = TrainBatches(
        reviews, 0, 16, READING, Share(4, slice(first, first + 2)))(3)
    for name, x in part.items():
      if name == 'bigram_rows':  # of the whole batch
        np.testing.assert_array_equal(x, whole[name])
      else:
        n = len(whole[name]) // 4
        np.testing.assert_array_equal(
            x, whole[name][first * n:(first + 2) * n])


def test_a_step_of_one_segment_each_has_the_shapes_that_are_compiled_ahead():
  config = default_with({
      'model.inputs': 'words', 'data.max_length': 40, 'data.segment_length': 8})
  batch = TrainBatches(_reviews(160), 0, 16, Reading.of(config.data),
                       Share(2))(0)
  def found(**of):
    return {name: ((2 * shape[0], *shape[1:]), dtype)
            for name, (shape, dtype) in shapes(config, 8, 2, **of).items()}
  assert found(training=True) == {
      name: (x.shape, str(x.dtype)) for name, x in batch.items()}
  assert found()['ids'][0][0] > len(batch['ids'])  # evaluation reads all
  config.data.train_segments = 0  # how many there are the reviews say
  assert found(training=True) == found()


@pytest.mark.parametrize('devices', [1, 2])
def test_evaluation_reads_every_review_once(devices):
  reviews = _reviews()
  seen, shapes = [], set()
  for rows, batch in eval_batches(reviews, 16, READING, Share(devices)):
    shapes.add(batch['ids'].shape)
    read, _ = _read(batch, devices)
    assert sorted(read) == sorted(rows[rows >= 0].tolist())
    np.testing.assert_array_equal(rows >= 0, batch['weights'] > 0)
    seen += list(read)
  assert sorted(seen) == list(range(len(reviews)))
  assert shapes == {(devices * segments.eval_size(16 // devices, READING), 8)}


def test_one_long_review_finds_room():
  reviews = _reviews(n=1, longest=2)
  long = Reviews(np.arange(500, dtype=np.uint16), np.array([0, 500]),
                 np.zeros(1, np.int8))
  for split in (reviews, long):
    ((rows, batch),) = eval_batches(split, 1, READING)
    assert rows.tolist() == [0] and batch['weights'].tolist() == [1]


@pytest.mark.parametrize('devices', [1, 2, 3, 8])
@pytest.mark.parametrize('n', [1, 5, 16, 17, 90])
def test_the_places_of_all_batches_are_those_of_the_fullest(n, devices):
  counts = np.random.default_rng(n).integers(1, 11, n)
  plan = segments.plan(counts, 16, devices)
  falling = -np.sort(-counts)
  fullest = 0
  for batch in range(plan.batch_of.max() + 1):
    own = falling[plan.batch_of == batch]
    dealt = segments.deal(own, devices)
    fullest = max(fullest, *(own[dealt == i].sum() for i in range(devices)))
  assert plan.segments_a_device == fullest


def test_heaps_are_level():
  rng = np.random.default_rng(0)
  for n in (1, 3, 16):
    falling = -np.sort(-rng.integers(1, 11, 500))
    heap = segments.deal(falling, n)
    sums, sizes = np.bincount(heap, falling), np.bincount(heap)
    assert sums.max() - sums.min() <= 10
    assert sizes.max() - sizes.min() <= 1


def test_features_follow_their_tokens():
  reviews = _reviews()
  reviews.features['log_odds'] = np.stack(
      [reviews.ids, 2 * reviews.ids], axis=-1).astype(np.float32)
  reviews.features['bigrams'] = (reviews.ids % 1000).astype(np.int32)
  batch = TrainBatches(reviews, 0, 16, READING, Share(2))(1)
  np.testing.assert_array_equal(
      batch['log_odds'],
      batch['ids'][..., None] * np.array([1, 2], np.float32))
  np.testing.assert_array_equal(
      batch['bigram_rows'][batch['bigrams']], batch['ids'] % 1000)
  real = batch['bigram_rows'][batch['bigram_rows'] < 1 << 30]
  np.testing.assert_array_equal(real, np.unique(batch['ids'] % 1000))
  assert (np.diff(batch['bigram_rows'].astype(int)) > 0).all()
