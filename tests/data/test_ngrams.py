"""Pairs and log-odds: as plain loops count them, and never a review's own."""

import collections
import dataclasses
import itertools
import math
import threading

import numpy as np
import pytest

from flax_imdb import environment
from flax_imdb.config import load_config
from flax_imdb.data import counting, linear, ngrams
from flax_imdb.data.reviews import Reviews, joined
from flax_imdb.errors import UserError


def _config(inputs='words+bigrams+log_odds', **data):
  config = load_config('configs/default.py')
  config.model.inputs = inputs
  config.data.update(bigrams=1000, log_odds_ngrams=1000, **data)
  return config


def _reviews(n=60, words=7, seed=0, labels=None):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 9, n)
  ids = rng.integers(4, 4 + words, lengths.sum()).astype(np.uint16)
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  ids[offsets[:-1]] = 1  # as each review begins
  if labels is None:
    labels = rng.integers(0, 2, n).astype(np.int8)
  return Reviews(ids, offsets, labels)


def _rows(reviews):
  return [tuple(reviews.ids[a:b].tolist()) for a, b in
          zip(reviews.offsets[:-1], reviews.offsets[1:], strict=True)]


def _grams(row, order):
  """The n-gram that ends at each token, None where there is none yet."""
  return [row[i + 1 - order:i + 1] if i + 1 >= order else None
          for i in range(len(row))]


def _plain_log_odds(reviews, order, others):
  """The feature of each token, counted on `others(row)` reviews by loops."""
  rows, found = _rows(reviews), []
  labels = reviews.labels.tolist()
  everywhere = collections.Counter(
      g for row in rows for g in {*_grams(row, order)} - {None})
  for number, row in enumerate(rows):
    counted = others(number)
    share = (sum(labels[i] for i in counted) + 1) / (len(counted) + 2)
    for gram in _grams(row, order):
      if gram is None or everywhere[gram] < 2:
        found.append(0.0)
        continue
      have = [labels[i] for i in counted if gram in _grams(rows[i], order)]
      if len(have) < 2:
        found.append(0.0)
        continue
      positive = sum(have)
      negative = len(have) - positive
      found.append(math.log((positive + 2 * share)
                            / (negative + 2 * (1 - share)))
                   - math.log(share / (1 - share)))
  return np.array(found)


def test_log_odds_of_unseen_reviews_are_of_all_training_reviews():
  reviews = _reviews()
  known, _ = counting.fit(_config(), reviews)
  got = known.annotate(reviews).features['log_odds']
  assert got.shape == (len(reviews.ids), 3) and got.dtype == np.float32
  for order in (1, 2, 3):
    np.testing.assert_allclose(got[:, order - 1], _plain_log_odds(
        reviews, order, lambda _: range(60)), atol=1e-6)
  assert (got != 0).any(axis=0).all()


def test_log_odds_to_train_with_are_of_the_other_folds():
  reviews = _reviews()
  _, annotated = counting.fit(_config(), reviews)
  fold = np.random.default_rng(0).integers(10, size=60)
  for order in (1, 2, 3):
    np.testing.assert_allclose(
        annotated.features['log_odds'][:, order - 1], _plain_log_odds(
            reviews, order, lambda row: np.flatnonzero(fold != fold[row])),
        atol=1e-6)


def test_a_reviews_own_label_changes_nothing_that_it_is_trained_with():
  reviews = _reviews()
  _, before = counting.fit(_config(), reviews)
  labels = reviews.labels.copy()
  labels[0] ^= 1
  fold = np.random.default_rng(0).integers(10, size=60)
  _, after = counting.fit(_config(), _reviews(labels=labels))
  changed = (before.features['log_odds'] != after.features['log_odds']).any(
      axis=1)
  for row in range(60):
    part = changed[reviews.offsets[row]:reviews.offsets[row + 1]]
    if fold[row] == fold[0]:
      assert not part.any()
  assert changed.any()


LINEAR = 'words+log_odds+linear'


def test_of_several_classes_each_has_its_own_log_odds():
  """Those of a class against all others, as if these were one."""
  labels = np.random.default_rng(4).integers(0, 3, 60).astype(np.int16)
  known, annotated = counting.fit(
      _config(), _reviews(labels=labels), class_count=3)
  assert known.log_odds.shape == (len(known.keys), 3)
  got = annotated.features['log_odds']
  assert got.shape == (len(annotated.ids), 9) and got.dtype == np.float32
  unseen = known.annotate(_reviews(labels=labels)).features['log_odds']
  share = (np.bincount(labels) + 1) / 63
  rows = _rows(annotated)
  for token, word in enumerate(annotated.ids):
    count = np.bincount(
        [k for k, row in zip(labels, rows, strict=True) if word in row],
        minlength=3)
    odds = (count + 2 * share) / (count.sum() - count + 2 * (1 - share))
    np.testing.assert_allclose(
        unseen[token, :3], np.log(odds) - np.log(share / (1 - share)),
        atol=1e-5)
  assert (got != unseen).any() and (got != 0).any(axis=0).all()


def test_of_several_classes_the_linear_model_has_a_logit_each(tmp_path):
  labels = np.random.default_rng(4).integers(0, 3, 60).astype(np.int16)
  config = _config(LINEAR)
  known, _ = counting.fit(config, _reviews(labels=labels), class_count=3)
  ngrams.save(known, tmp_path / 'ngrams.npz')
  loaded = ngrams.load(tmp_path / 'ngrams.npz', config, 3)
  new = _reviews(seed=1, words=9)
  got = loaded.annotate(new).linear
  assert got.dtype == np.float32 and got.shape == (60, 3)
  for k in range(3):
    alone = dataclasses.replace(known, weights=known.weights[:, k])
    np.testing.assert_array_equal(got[:, k], alone.annotate(new).linear)
  assert np.std(got, axis=0).min() > 0.01
  for count in (2, 4):
    with pytest.raises(UserError, match='for each n-gram and class'):
      ngrams.load(tmp_path / 'ngrams.npz', config, count)


def test_the_linear_model_counts_reviews_as_the_loss_does(monkeypatch):
  given = []
  fit = linear.fit
  monkeypatch.setattr(linear, 'fit', lambda *args: (
      given.append(args[3]), fit(*args))[1])
  reviews = _reviews()
  reviews.labels[:20] = 0
  config = _config(LINEAR)
  counting.fit(config, reviews)
  config.class_weights = 'balanced'
  counting.fit(config, reviews)
  weights = 60 / (2 * np.bincount(reviews.labels))
  assert given[0] is None and weights[1] > weights[0]
  np.testing.assert_allclose(given[1], weights[reviews.labels])


@pytest.mark.parametrize('where, most', [
    (counting, '_MOST_FEATURES'), (ngrams, '_MOST_COUNTS')])
def test_classes_that_would_fill_the_memory_are_refused(
    where, most, monkeypatch):
  labels = np.random.default_rng(4).integers(0, 3, 60).astype(np.int16)
  monkeypatch.setattr(where, most, 100)
  counting.fit(_config(), _reviews())  # of two it does not matter
  with pytest.raises(UserError, match='3 classes.* --config'):
    counting.fit(_config(), _reviews(labels=labels), class_count=3)


def test_the_linear_model_counts_each_ngram_of_a_review_once():
  reviews = _reviews()
  known, _ = counting.fit(_config(LINEAR), reviews)
  weights = dict(zip(known.keys.tolist(), known.weights.tolist(), strict=True))
  new = _reviews(seed=1, words=9)
  got = known.annotate(new).linear
  assert got.dtype == np.float32 and got.shape == (60,)
  for row, z in zip(_rows(new), got, strict=True):
    found = {g for order in (1, 2, 3) for g in _grams(row, order)} - {None}
    keys = [sum(x << 20 * i for i, x in enumerate(reversed(g)))
            | len(g) << 60 for g in found]
    np.testing.assert_allclose(
        z, sum(weights.get(key, 0) for key in keys), atol=1e-5)
  assert np.std(got) > 0.1


def _soft(reviews, seed=3):
  """The same with a pseudo-label instead of each fourth label."""
  labels = reviews.labels.astype(np.float32)
  labels[::4] = np.random.default_rng(seed).random(len(labels[::4]))
  return dataclasses.replace(reviews, labels=labels)


def test_a_pseudo_label_counts_for_each_class_what_it_says():
  reviews = _soft(_reviews())
  known, annotated = counting.fit(_config(), reviews)
  got = known.annotate(reviews).features['log_odds']
  fold = np.random.default_rng(0).integers(10, size=60)
  for order in (1, 2, 3):
    np.testing.assert_allclose(got[:, order - 1], _plain_log_odds(
        reviews, order, lambda _: range(60)), atol=1e-6)
    np.testing.assert_allclose(
        annotated.features['log_odds'][:, order - 1], _plain_log_odds(
            reviews, order, lambda row: np.flatnonzero(fold != fold[row])),
        atol=1e-6)


@pytest.mark.parametrize('dtype', [np.int8, np.float32])
def test_a_review_without_label_counts_for_no_class(dtype):
  reviews = _reviews()
  labels = np.append(reviews.labels, np.full(60, -1)).astype(dtype)
  both = dataclasses.replace(
      joined(reviews, _reviews(seed=1, words=9)), labels=labels)
  known, annotated = counting.fit(_config(), both)
  alone, _ = counting.fit(_config(), reviews)
  new = _reviews(seed=2, words=9)
  np.testing.assert_allclose(
      known.annotate(new).features['log_odds'],
      alone.annotate(new).features['log_odds'], atol=1e-6)
  # Words of theirs have pairs to embed, and are read in training.
  assert len(known.pairs) > len(alone.pairs)
  assert annotated.features['log_odds'][len(reviews.ids):].any()


def test_pairs_are_numbered_and_rare_ones_are_0():
  reviews = _reviews()
  known, annotated = counting.fit(_config(), reviews)
  counts = collections.Counter(
      g for row in _rows(reviews) for g in _grams(row, 2) if g)
  ids = {}
  place = 0
  for row in _rows(reviews):
    for gram in _grams(row, 2):
      got = annotated.features['bigrams'][place]
      place += 1
      if gram is None or counts[gram] < 2:
        assert got == 0
      else:
        assert ids.setdefault(gram, got) == got > 0
  assert sorted(ids.values()) == list(range(1, 1 + len(known.pairs)))
  np.testing.assert_array_equal(
      known.annotate(reviews).features['bigrams'],
      annotated.features['bigrams'])


def test_the_most_frequent_are_kept():
  config = _config()
  config.data.bigrams, config.data.log_odds_ngrams = 6, 3
  known, _ = counting.fit(config, _reviews())
  assert len(known.pairs) == 5 and len(known.keys) == 9
  counts = collections.Counter(
      g for row in _rows(_reviews()) for g in _grams(row, 2) if g)
  least = sorted(counts.values())[-5]
  for key in known.pairs.tolist():
    pair = (key >> 20) & 0xfffff, key & 0xfffff
    assert counts[pair] >= least


def test_no_ngram_goes_over_the_start_of_a_review():
  reviews = Reviews(np.array([1, 5, 1, 6, 1, 5, 1, 6], np.uint16),
                    np.array([0, 2, 4, 6, 8]), np.array([0, 1, 0, 1], np.int8))
  known, _ = counting.fit(_config(), reviews)
  assert len(known.pairs) == 2  # of the start and 5, and 6
  assert len(known.keys) == 3 + 2


def test_a_review_alone_is_annotated_as_among_many():
  known, _ = counting.fit(
      _config('words+bigrams+log_odds+linear'), _reviews(200))
  unseen = _reviews(300, words=9, seed=1)
  assert len(unseen.ids) > len(known.keys)  # looked up another way than one is
  whole = known.annotate(unseen)
  for i, (a, b) in enumerate(itertools.pairwise(unseen.offsets)):
    alone = known.annotate(Reviews(
        unseen.ids[a:b], np.array([0, b - a]), unseen.labels[i:i + 1]))
    assert b - a < min(len(known.pairs), len(known.keys))
    for name, feature in alone.features.items():
      np.testing.assert_array_equal(feature, whole.features[name][a:b])
      assert feature.dtype == whole.features[name].dtype
    np.testing.assert_array_equal(alone.linear, whole.linear[i:i + 1])


def test_lengths_of_many_tokens_are_counted_side_by_side(monkeypatch):
  config, texts = _config('words+bigrams+log_odds+linear'), _reviews(seed=1)
  want, want_train = counting.fit(config, _reviews())
  want_other = want.annotate(texts)
  monkeypatch.setattr(ngrams, '_MANY_TOKENS', 1)
  got, got_train = counting.fit(config, _reviews())
  other = got.annotate(texts)
  np.testing.assert_array_equal(got.weights, want.weights)
  np.testing.assert_array_equal(other.linear, want_other.linear)
  for name in 'bigrams', 'log_odds':
    np.testing.assert_array_equal(
        got_train.features[name], want_train.features[name])
    np.testing.assert_array_equal(
        other.features[name], want_other.features[name])


def test_of_each_length_waits_for_no_other(monkeypatch):
  monkeypatch.setattr(environment, 'available_cores', lambda: 3)
  together = threading.Barrier(3)
  def of_length(length):
    together.wait(timeout=60)  # raises if they come one after another
    return 10 * length
  many = ngrams._MANY_TOKENS
  assert ngrams.of_each_length(of_length, 3, many) == [10, 20, 30]
  order = []
  assert ngrams.of_each_length(order.append, 3, many - 1) == [None] * 3
  assert order == [1, 2, 3]


def test_what_is_saved_answers_as_what_was_learned(tmp_path):
  config, reviews = _config(), _reviews()
  known, _ = counting.fit(config, reviews)
  ngrams.save(known, tmp_path / 'ngrams.npz')
  loaded = ngrams.load(tmp_path / 'ngrams.npz', config)
  new = _reviews(seed=1, words=9)
  a, b = (x.annotate(new).features for x in (known, loaded))
  for name in ('bigrams', 'log_odds'):
    np.testing.assert_array_equal(a[name], b[name])


def test_a_linear_model_that_is_saved_answers_as_what_was_learned(tmp_path):
  config = _config(LINEAR)
  known, _ = counting.fit(config, _reviews())
  ngrams.save(known, tmp_path / 'ngrams.npz')
  loaded = ngrams.load(tmp_path / 'ngrams.npz', config)
  new = _reviews(seed=1, words=9)
  np.testing.assert_array_equal(
      known.annotate(new).linear, loaded.annotate(new).linear)
  _damaged(tmp_path / 'ngrams.npz', weights=known.weights[:-1])
  with pytest.raises(UserError, match='weights are not a number for each'):
    ngrams.load(tmp_path / 'ngrams.npz', config)


@pytest.mark.parametrize('inputs', ['words+bigrams', 'words+log_odds'])
@pytest.mark.parametrize('class_count', [2, 3])
def test_only_what_the_model_reads_is_learned(inputs, class_count, tmp_path):
  config = _config(inputs)
  known, annotated = counting.fit(config, _reviews(), class_count=class_count)
  (name,) = annotated.features
  assert inputs == f'words+{name}'
  ngrams.save(known, tmp_path / 'ngrams.npz')
  loaded = ngrams.load(tmp_path / 'ngrams.npz', config, class_count)
  assert list(loaded.annotate(_reviews()).features) == [name]


def test_more_words_than_can_be_counted_are_refused(monkeypatch):
  monkeypatch.setattr(counting, '_MOST_TOKENS', 100)
  config, reviews = _config(), _reviews(60)
  assert len(reviews.ids) > 100
  with pytest.raises(UserError, match='give --config.model.inputs=words'):
    counting.fit(config, reviews)
  config.model.inputs = 'words'
  counting.fit(config, reviews)


def test_a_model_of_words_needs_no_file(tmp_path):
  config = _config('words')
  assert ngrams.load(tmp_path / 'ngrams.npz', config) is ngrams.NONE
  assert ngrams.NONE.annotate(_reviews()).features == {}


def test_pairs_of_a_run_before_are_kept():
  known, _ = counting.fit(_config(), _reviews())
  other = _reviews(seed=5)
  again, annotated = counting.fit(_config(), other, known.pairs)
  np.testing.assert_array_equal(again.pairs, known.pairs)
  np.testing.assert_array_equal(
      annotated.features['bigrams'], known.annotate(other).features['bigrams'])


def _damaged(path, **arrays):
  with np.load(path) as f:
    arrays = dict(f) | arrays
  np.savez(path, **arrays)


@pytest.mark.parametrize(('change', 'line'), [
    (lambda path: path.unlink(), 'cannot read'),
    (lambda path: path.write_bytes(path.read_bytes()[:-200]), 'is damaged'),
    (lambda path: _damaged(path, pairs=np.array([5, 5])), 'ascending'),
    (lambda path: _damaged(path, keys=np.arange(4001)), 'ascending'),
    (lambda path: _damaged(path, pairs=np.arange(9.0)), 'ascending'),
    (lambda path: _damaged(path, log_odds=np.zeros((3, 1), 'f4')),
     'a number for each n-gram'),
    (lambda path: _damaged(path, keys=np.arange(1),
                           log_odds=np.full((1, 1), np.nan, 'f4')),
     'a number for each n-gram')],
    ids=['missing', 'truncated', 'twice', 'many', 'floats', 'short', 'nan'])
def test_a_file_that_is_not_whole_is_refused(change, line, tmp_path):
  path, config = tmp_path / 'ngrams.npz', _config()
  ngrams.save(counting.fit(config, _reviews())[0], path)
  change(path)
  with pytest.raises(UserError, match=line):
    ngrams.load(path, config)


def test_the_parts_of_the_linear_model_are_shared_by_all_places():
  config = _config('words+bigrams+log_odds+linear')
  known, _ = counting.fit(config, _reviews(seed=1))
  reviews = _reviews(n=20, words=3, seed=2)  # in which n-grams come again
  parts = known.linear_parts(reviews)
  assert parts.shape == (3, len(reviews.ids), 1)
  weights = dict(zip(known.keys.tolist(), known.weights.tolist(), strict=True))
  again = 0
  for start, row in zip(reviews.offsets, _rows(reviews), strict=False):
    for order in range(1, 4):
      grams = _grams(row, order)
      for i, gram in enumerate(grams):
        key = gram and sum(x << 20 * j for j, x in enumerate(reversed(gram))
                           ) | order << 60
        want = weights.get(key, 0) / grams.count(gram)
        assert parts[order - 1, start + i, 0] == pytest.approx(want, abs=1e-12)
        again += grams.count(gram) > 1 and want != 0
  assert again > 20
  np.testing.assert_allclose(
      np.add.reduceat(parts.sum(axis=(0, 2)), reviews.offsets[:-1]),
      known.annotate(reviews).linear, rtol=1e-5, atol=1e-6)


def test_a_linear_model_that_knows_no_ngram_has_no_parts():
  none = dataclasses.replace(
      ngrams.NONE, order=2, inputs='words+log_odds+linear')
  reviews = _reviews(n=3)
  assert not none.linear_parts(reviews).any()
  assert none.linear_parts(reviews).shape == (2, len(reviews.ids), 1)
