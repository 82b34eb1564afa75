"""Segments, pairs and log-odds: what a review's logit depends on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import drawn_params

from flax_imdb.config import load_config
from flax_imdb.data.batches import TrainBatches
from flax_imdb.data.reading import Reading, Share
from flax_imdb.data.reviews import Reviews
from flax_imdb.fields import check_fields
from flax_imdb.inference import evaluate
from flax_imdb.model import classifier

S, T, PAIRS = 8, 6, 20
LENGTHS = np.array([6, 3, 6, 6, 1, 6, 2, 0], np.int32)
SEGMENTS = np.array([[0, 1], [2, S], [3, 4], [5, 6]], np.int32)
DROPOUT = {'word_dropout': 0.3, 'bigram_dropout': 0.4, 'log_odds_dropout': 0.3,
           'embedding_dropout': 0.3, 'pooled_dropout': 0.3}


def _build(inputs='words', pooling='max+mean', **dropout):
  """(model, its parameters with large embeddings)."""
  config = load_config('configs/default.py')
  config.data.update(vocab_size=50, bigrams=PAIRS, max_length=2 * T,
                     segment_length=T, log_odds_order=2)
  config.model.update(inputs=inputs, pooling=pooling, embedding_dim=4, width=5,
                      **dict.fromkeys(DROPOUT, 0.0) | dropout)
  check_fields(config)
  model = classifier.build_model(config)
  params = drawn_params(model)
  for name in {'embed', 'bigrams'} & set(params):
    params[name]['embedding'] *= 4
  return model, params


def _inputs(seed=0):
  rng = np.random.default_rng(seed)
  inside = np.arange(T) < LENGTHS[:, None]
  return {'ids': np.where(inside, rng.integers(4, 50, (S, T)), 0).astype('i4'),
          'lengths': LENGTHS, 'segments': SEGMENTS,
          'bigrams': np.where(
              inside, rng.integers(0, PAIRS, (S, T)), 0).astype('i4'),
          'log_odds': np.where(inside[..., None], rng.normal(
              size=(S, T, 2)), 0).astype('f4')}


@functools.cache
def _apply(model):
  return jax.jit(model.apply)


def _logits(model, params, inputs, keys=None):
  return np.asarray(_apply(model)(
      {'params': params}, **inputs, dropout_keys_B=keys))


@pytest.mark.parametrize('pooling', ['max+mean', 'last'])
def test_a_review_of_one_segment_is_read_as_a_whole_one(pooling):
  model, params = _build(pooling=pooling)
  inputs = _inputs()
  got = _logits(model, params, inputs)
  whole = _logits(model, params, {
      'ids': inputs['ids'][2:3], 'lengths': LENGTHS[2:3]})
  np.testing.assert_allclose(got[1], whole[0], atol=1e-6)
  assert np.ptp(got) > 1e-2


def test_segments_are_pooled_as_numpy_does():
  model, params = _build(pooling='last+mean+max')
  inputs = _inputs()
  # What each segment alone is pooled to, by way of 1 as the only weight.
  features = params['logit']['kernel'].shape[0]
  alone = {name: inputs[name][:7] for name in ('ids', 'lengths')}
  pooled = np.stack([_logits(model, params | {'logit': {
      'kernel': jnp.eye(features)[:, i:i + 1], 'bias': jnp.zeros(1)}}, alone)
                     for i in range(features)], axis=-1)  # [segments, features]
  third = features // 3
  want = []
  for row in SEGMENTS:
    own = row[row < S]
    tokens = LENGTHS[own]
    want.append(np.concatenate([
        pooled[own[-1], :third],
        tokens @ pooled[own, third:2 * third] / tokens.sum(),
        pooled[own, 2 * third:].max(axis=0)]))
  want = np.array(want) @ params['logit']['kernel'][:, 0]
  np.testing.assert_allclose(
      _logits(model, params, inputs), want + params['logit']['bias'], atol=1e-5)


def test_where_a_segment_stands_changes_no_bit():
  model, params = _build('words+bigrams+log_odds')
  inputs = _inputs()
  order = np.random.default_rng(1).permutation(S)
  moved = {k: v[order] for k, v in inputs.items() if k != 'segments'}
  place = np.append(np.argsort(order), S).astype('i4')
  moved['segments'] = place[SEGMENTS]
  np.testing.assert_array_equal(_logits(model, params, moved),
                                _logits(model, params, inputs))


def test_a_row_without_a_review_is_finite_and_has_no_gradient():
  model, params = _build('words+bigrams+log_odds')
  inputs = {k: jnp.asarray(v) for k, v in _inputs().items()}
  inputs['segments'] = jnp.full((4, 2), S, jnp.int32)
  logits = _logits(model, params, inputs)
  assert np.isfinite(logits).all()
  gradient = jax.jit(jax.grad(
      lambda p: model.apply({'params': p}, **inputs).sum()))(params)
  assert (np.asarray(gradient['embed']['embedding']) == 0).all()


def test_predictions_are_the_mean_of_the_lstm_and_the_linear_model():
  inputs, linear = _inputs(), np.array([0.5, -2.0, 0.0, 3.0], np.float32)
  model, params = _build('words+log_odds+linear', linear_weight=0.5)
  alone, _ = _build('words+log_odds', linear_weight=0.5)
  np.testing.assert_allclose(
      _logits(model, params, inputs | {'linear': linear}),
      (_logits(alone, params, inputs) + 0.5 * linear) / 1.5, atol=1e-6)
  # Not where it learns, and batches to learn from do not have it.
  keys = jax.random.split(jax.random.key(0), 4)
  np.testing.assert_array_equal(_logits(model, params, inputs, keys),
                                _logits(alone, params, inputs, keys))


@pytest.mark.parametrize('name', ['bigrams', 'log_odds'])
def test_an_input_reaches_the_reviews_that_have_it_alone(name):
  model, params = _build('words+bigrams+log_odds')
  inputs = _inputs()
  changed = {k: v.copy() for k, v in inputs.items()}
  changed[name][3, 2] = (changed[name][3, 2] + 1) % PAIRS
  a, b = (_logits(model, params, x) for x in (inputs, changed))
  np.testing.assert_array_equal(a[[0, 1, 3]], b[[0, 1, 3]])
  assert abs(a[2] - b[2]) > 1e-4


def test_without_pairs_and_log_odds_it_is_the_model_of_words():
  model, params = _build('words+bigrams+log_odds')
  words, _ = _build('words')
  inputs = _inputs()
  params['bigrams']['embedding'] *= 0
  inputs['log_odds'] *= 0
  fewer = {k: v for k, v in params.items() if k != 'bigrams'}
  for direction in ('forward_0', 'backward_0'):
    cell = params[direction]['steps']['cell']
    fewer[direction] = {'steps': {'cell': cell | {
        'kernel': cell['kernel'][:4]}}}
  np.testing.assert_allclose(
      _logits(model, params, inputs),
      _logits(words, fewer, {k: inputs[k] for k in (
          'ids', 'lengths', 'segments')}), atol=1e-6)


@pytest.mark.parametrize('kind', DROPOUT)
def test_each_dropout_changes_what_it_is_of(kind):
  model, params = _build('words+bigrams+log_odds', **{kind: DROPOUT[kind]})
  inputs = _inputs()
  keys = classifier.dropout_keys(model, 0, 0, jnp.arange(4))
  plain, one, again, other = (_logits(model, params, inputs, k) for k in (
      None, keys, keys, classifier.dropout_keys(model, 0, 1, jnp.arange(4))))
  assert (plain != one).any() and (one != other).any()
  np.testing.assert_array_equal(one, again)


def test_pairs_keep_their_mean_under_dropout():
  model, params = _build('words+bigrams', bigram_dropout=0.4)
  # A model of the pairs alone, whose state is nearly linear in them.
  params = jax.tree.map(lambda x: x * 0.02, params)
  params['embed']['embedding'] *= 0
  inputs = _inputs()
  del inputs['log_odds']
  params['logit']['kernel'] *= 1e6
  keys = (classifier.dropout_keys(model, 0, jnp.int32(step), jnp.arange(4))
          for step in range(300))
  drawn = np.mean([_logits(model, params, inputs, k) for k in keys], axis=0)
  none = _logits(model, params | {'bigrams': {
      'embedding': jnp.zeros((PAIRS, 4))}}, inputs)
  plain = _logits(model, params, inputs)
  assert np.abs(plain - none).max() > 0
  np.testing.assert_allclose(
      drawn - none, plain - none, atol=0.3 * np.abs(plain - none).max())


def test_a_reviews_masks_do_not_depend_on_how_many_devices_there_are():
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 12, 16)
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  reviews = Reviews(rng.integers(4, 50, offsets[-1]).astype(np.uint16), offsets,
                    np.zeros(16, np.int8))
  reviews.features['bigrams'] = rng.integers(
      0, PAIRS, offsets[-1]).astype(np.int32)
  reviews.features['log_odds'] = rng.normal(
      size=(offsets[-1], 2)).astype(np.float32)
  model, params = _build('words+bigrams+log_odds', **DROPOUT)
  by_place = []
  for devices in (1, 2, 4):
    batch = TrainBatches(reviews, 0, 8, Reading(12, 0, T), Share(devices))(1)
    found = {}
    inputs = evaluate.inputs(batch)
    for i in range(devices):
      part = {k: v.reshape(devices, -1, *v.shape[1:])[i]
              for k, v in inputs.items()}
      places = batch['places'].reshape(devices, -1)[i]
      logits = _logits(model, params, part, classifier.dropout_keys(
          model, 0, 3, places))
      weights = batch['weights'].reshape(devices, -1)[i]
      found |= {int(p): z for p, z, w in zip(
          places, logits, weights, strict=True) if w}
    by_place.append([found[i] for i in range(8)])
  np.testing.assert_allclose(by_place[1], by_place[0], atol=1e-6)
  np.testing.assert_allclose(by_place[2], by_place[0], atol=1e-6)
