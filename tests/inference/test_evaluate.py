"""Every review counts once, and raw text is read as in training."""

import functools
import math

import numpy as np
import pytest
from support.models import logits_of, one_by_one, tiny_model

from flax_imdb.cluster import devices
from flax_imdb.data.ngrams import NONE
from flax_imdb.data.reviews import Reviews
from flax_imdb.inference import evaluate
from flax_imdb.model import classifier, counted_loop


def _reviews(n):
  """Reviews of 1 to 17 tokens in no order; some are cut at max_length."""
  rng = np.random.default_rng(0)
  lengths = rng.permutation(np.arange(n) % 17 + 1)
  ids = rng.integers(4, 100, lengths.sum()).astype(np.uint16)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  return Reviews(ids, offsets, rng.integers(0, 2, n).astype(np.int8))


@pytest.fixture(scope='module')
def alone():
  """(reviews, the logits of each alone)."""
  config, model, params = tiny_model()
  reviews = _reviews(23)
  logits = one_by_one(model, params, reviews, config.data.max_length)
  assert np.ptp(logits) > 0.01 and len(set(logits)) > 20
  return reviews, logits


@pytest.mark.parametrize('bucket_width', [0, 1, 5])
def test_every_review_counts_once_and_in_order(alone, bucket_width):
  reviews, want = alone
  config, model, params = tiny_model(**{'data.bucket_width': bucket_width})
  assert config.global_batch_size == 8
  logits = logits_of(config, model)
  for n in (1, 7, 8, 9, 23):
    got = logits(params, reviews[:n])
    assert got.shape == (n,) and got.dtype == np.float32
    np.testing.assert_allclose(got, want[:n], atol=1e-6)
  np.testing.assert_allclose(logits(params, reviews[5:9]), want[5:9], atol=1e-6)


def test_of_each_batch_it_is_told_how_many_reviews_are_done(alone):
  reviews, _ = alone
  config, model, params = tiny_model()
  told = []
  evaluate.make_logits(
      config, evaluate.make_forward(model), NONE.annotate,
      lambda *words: told.append(words))(params, reviews)
  assert told == [('evaluating', n, 23) for n in (0, 8, 16, 23)]


@pytest.mark.parametrize('batch_size', [2, 7, 64])  # on two devices
def test_the_batch_size_changes_no_logit(alone, batch_size):
  reviews, want = alone
  config, model, params = tiny_model(global_batch_size=batch_size)
  got = logits_of(config, model)(params, reviews)
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize('own, rows', [(0, 8), (2, 2), (7, 8), (64, 64)])
def test_evaluation_has_a_batch_size_of_its_own(alone, own, rows):
  reviews, want = alone
  config, model, params = tiny_model(eval_batch_size=own)
  forward, seen = evaluate.make_forward(model), set()
  def noting(params, batch):
    seen.add(batch['lengths'].size)
    return forward(params, batch)
  logits = evaluate.make_logits(config, noting, NONE.annotate)
  np.testing.assert_allclose(logits(params, reviews), want, atol=1e-6)
  assert seen == {rows}  # on two devices


@pytest.mark.parametrize('mask_padding', [True, False])
@pytest.mark.parametrize('layers', [1, 2])
def test_the_loop_predicts_the_bits_of_the_scan(
    layers, mask_padding, monkeypatch):
  loops = []
  def noting(*args, **kwargs):
    loops.append(args)
    return summaries(*args, **kwargs)
  summaries = counted_loop.summaries
  monkeypatch.setattr(counted_loop, 'summaries', noting)
  config, model, params = tiny_model(**{
      'model.layers': layers, 'model.mask_padding': mask_padding,
      'data.bucket_width': 0, 'model.pooling': 'max+mean+last'})
  assert model.recurrence == 'scan'
  got = logits_of(config, model)(params, _reviews(23))
  assert bool(loops) == (layers == 1 and mask_padding)
  scan = devices.data_parallel_forward(
      functools.partial(classifier.predict, model))
  want = evaluate.make_logits(config, scan, NONE.annotate)(params, _reviews(23))
  np.testing.assert_array_equal(got, want)


def test_a_model_that_reads_padding_gets_always_the_same(alone):
  reviews, _ = alone
  config, model, params = tiny_model(**{
      'model.mask_padding': False, 'data.bucket_width': 0})
  logits = logits_of(config, model)
  together = logits(params, reviews)
  np.testing.assert_allclose(
      [logits(params, reviews[i:i + 1])[0] for i in (0, 8, 22)],
      together[[0, 8, 22]], atol=1e-6)


def test_score_equals_a_loop():
  rng = np.random.default_rng(0)
  logits = (4 * rng.normal(size=50)).astype(np.float32)
  labels = rng.integers(0, 2, 50).astype(np.int8)
  loss = correct = 0.0
  for z, label in zip(logits.tolist(), labels.tolist(), strict=True):
    p = 1 / (1 + math.exp(-z))
    loss -= math.log(p if label else 1 - p) / 50
    correct += (p > 0.5) == bool(label)
  result = evaluate.score(logits, labels)
  f1 = result.pop('macro_f1')
  assert result == {'loss': pytest.approx(loss, rel=1e-12),
                    'accuracy': correct / 50, 'n': 50}
  assert type(f1) is float and 0.3 < f1 < 0.4  # see test_confusion.py
  assert all(type(v) in (int, float) for v in result.values())  # JSON takes it


def test_score_of_extreme_logits_is_finite_and_exact():
  logits = np.array([1e4, -1e4, 1e4, -1e4], np.float32)
  labels = np.array([1, 0, 0, 1], np.int8)
  assert evaluate.score(logits, labels) == {
      'loss': 5000.0, 'accuracy': 0.5, 'macro_f1': 0.5, 'n': 4}
  assert evaluate.score(logits[:2], labels[:2]) == {
      'loss': 0.0, 'accuracy': 1.0, 'macro_f1': 1.0, 'n': 2}


def test_score_of_several_classes_is_that_of_the_softmax():
  rng = np.random.default_rng(0)
  logits = (4 * rng.normal(size=(50, 3))).astype(np.float32)
  labels = rng.integers(0, 3, 50).astype(np.int16)
  loss = correct = 0.0
  for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
    p = [math.exp(z) / sum(map(math.exp, row)) for z in row]
    loss -= math.log(p[label]) / 50
    correct += max(p) == p[label]
  result = evaluate.score(logits, labels)
  assert result['loss'] == pytest.approx(loss, rel=1e-12)
  assert (result['accuracy'], result['n']) == (correct / 50, 50)
  extreme = np.array([[1e4, -1e4, 0], [1e4, -1e4, 0]], np.float32)
  assert evaluate.score(extreme, np.array([0, 1], np.int16))['loss'] == 1e4


def test_of_several_classes_every_review_has_its_logits(alone):
  reviews, _ = alone
  config, model, params = tiny_model(class_count=3)
  want = one_by_one(model, params, reviews, config.data.max_length)
  assert want.shape == (23, 3) and np.ptp(want, axis=1).min() > 1e-3
  got = logits_of(config, model)(params, reviews)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_score_adds_up_in_float64():
  # In float32 0.5 is lost beside 2**25.
  logits = np.array([-2.0**25] + [0.0] * 1000, np.float32)
  labels = np.array([1] + [0] * 1000, np.int8)
  got = evaluate.score(logits, labels)
  assert got['loss'] * 1001 == pytest.approx(
      2**25 + 1000 * math.log(2), rel=1e-9)
  assert got['accuracy'] == 1000 / 1001  # 0 counts as negative


def test_text_of_a_score():
  line = evaluate.score_text(
      'test', {'loss': 0.51239, 'accuracy': 0.75, 'n': 25000})
  assert line == 'test: loss 0.5124  accuracy 0.7500  on 25,000 reviews'
