"""The classifier: padding, pooling, dropout and its size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import drawn_params

from flax_imdb.config import load_config
from flax_imdb.data.tokenizer import START_ID, UNKNOWN_ID
from flax_imdb.model import classifier
from flax_imdb.model.recurrent import Summary

LENGTHS = np.array([40, 3, 1, 17], np.int32)
WIDE = 500  # wherever there is padding: a width more is a program more
# The last one holds all of the others.
POOLINGS = ['last', 'mean', 'max', 'max+mean', 'last+mean+max']
SLOW = [pytest.param(pooling, marks=pytest.mark.slow)
        for pooling in POOLINGS[:-1]]


def _build(**fields):
  """(model, its parameters, model.apply of them and the rest, compiled)."""
  config = load_config('configs/debug.py')
  config.model.update(
      word_dropout=0.0, embedding_dropout=0.0, pooled_dropout=0.0)
  for field, value in fields.items():
    config.model[field] = value
  model = classifier.build_model(config)
  apply = jax.jit(model.apply)
  def logits(params, ids, lengths, keys=None):
    return np.asarray(apply(
        {'params': params}, ids, lengths, dropout_keys_B=keys))
  return model, drawn_params(model), logits


def _ids(width, seed=0):
  """int32 [4, width] ids, 0 where the review is over."""
  ids = np.random.default_rng(seed).integers(4, 100, (4, 40))
  padded = np.zeros((4, width), np.int32)
  for row, length in enumerate(LENGTHS):
    padded[row, :length] = ids[row, :length]
  return padded


def test_notebook_has_328865_parameters():
  config = load_config('configs/notebook.py')
  shapes = classifier.param_shapes(classifier.build_model(config))
  assert classifier.parameter_count(shapes) == 328_865


# A model that reads both ways holds the layer that reads forward.
@pytest.mark.parametrize('bidirectional', [
    pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize('cell', [
    'lstm', pytest.param('simple_rnn', marks=pytest.mark.slow)])
@pytest.mark.parametrize('pooling', [*SLOW, POOLINGS[-1]])
def test_padding_changes_no_logit(pooling, cell, bidirectional):
  _, params, logits = _build(
      pooling=pooling, cell=cell, bidirectional=bidirectional, layers=2)
  short = logits(params, _ids(40), LENGTHS)
  long = logits(params, _ids(WIDE), LENGTHS)
  np.testing.assert_allclose(short, long, atol=1e-6)
  garbage = np.where(_ids(WIDE) == 0, 77, _ids(WIDE))
  other = logits(params, garbage, LENGTHS)
  np.testing.assert_array_equal(long, other)


def test_the_backward_layer_reads_from_the_last_word():
  model, params, logits = _build(pooling='last', bidirectional=True)
  width = model.width  # silences the forward layer's features
  params['hidden']['kernel'] = params['hidden']['kernel'].at[:width].set(0)
  params['embed']['embedding'] *= 20
  ids = _ids(40)
  ids[1, 2] = 50  # the last of 3 words
  other = np.where(ids == 50, 51, ids)
  a, b = (logits(params, x, LENGTHS) for x in (ids, other))
  assert abs(a[1] - b[1]) > 1e-5


def test_padding_has_no_gradient():
  model, params, _ = _build()
  @jax.jit
  @jax.grad
  def gradient(params, ids):
    return jnp.sum(model.apply({'params': params}, ids, LENGTHS))
  got = np.asarray(gradient(params, _ids(60))['embed']['embedding'])
  assert (got[0] == 0).all()
  assert (got[_ids(60)[0, :40]] != 0).any()


def test_unmasked_model_reads_padding():
  _, params, logits = _build(mask_padding=False, pooling='last')
  params['forward_0']['steps']['cell']['bias'] += 1  # forgets slowly
  short = logits(params, _ids(40), LENGTHS)
  long = logits(params, _ids(50), LENGTHS)
  assert (short != long).all() and np.abs(short - long).max() > 1e-2


def test_unmasked_model_reads_no_lengths():
  _, params, logits = _build(mask_padding=False, pooling='max+mean')
  given = logits(params, _ids(40), LENGTHS)
  full = logits(params, _ids(40), np.full(4, 40, np.int32))
  np.testing.assert_array_equal(given, full)


@pytest.mark.parametrize('pooling', POOLINGS)
def test_pooling_equals_numpy(pooling):
  model, *_ = _build(pooling=pooling)
  rng = np.random.default_rng(0)
  states = np.tanh(rng.normal(size=(2, 40, 4, 3))).astype(np.float32)
  want = []
  for kind in pooling.split('+'):
    for i, h in enumerate(states):
      rows = [h[:length, b] for b, length in enumerate(LENGTHS)]
      want.append(np.stack({
          'last': [h[0 if i else -1, b] for b in range(4)],
          'mean': [row.mean(0) for row in rows],
          'max': [row.max(0) for row in rows]}[kind]))
  got = model._pool([
      (Summary.of_states(h, LENGTHS), h[0 if i else -1])
      for i, h in enumerate(jnp.asarray(states))], jnp.asarray(LENGTHS))
  np.testing.assert_allclose(got, np.concatenate(want, axis=-1), atol=1e-6)


@pytest.mark.parametrize('fields', [
    {}, {'cell': 'simple_rnn', 'layers': 2},
    {'mask_padding': False, 'dtype': 'bfloat16'}], ids=str)
def test_what_is_predicted_is_pooled_without_the_states(fields):
  model, params, logits = _build(pooling='last+mean+max', **fields)
  params['logit']['kernel'] *= 20
  want = logits(params, _ids(64), LENGTHS)
  inputs = {'ids': _ids(64), 'lengths': LENGTHS}
  got, looped = (jax.jit(functools.partial(
      classifier.predict, model.clone(recurrence=form)))(params, inputs)
                 for form in ('scan', 'loop'))
  np.testing.assert_allclose(got, want, atol=2e-6)
  np.testing.assert_array_equal(looped, got)
  assert np.ptp(want) > 1e-2


@pytest.mark.parametrize('form', ['scan', 'loop'])
def test_the_memory_to_predict_does_not_grow_with_the_states(form):
  model, params, _ = _build(
      pooling='max+mean', width=16, embedding_dim=4, bidirectional=True)
  model = model.clone(recurrence=form)
  def per_token(predict):
    """Bytes that a token more of a review takes, of scratch memory."""
    short, long = (jax.jit(functools.partial(predict, model)).lower(
        params, {'ids': _ids(width), 'lengths': LENGTHS}).compile(
            ).memory_analysis().temp_size_in_bytes for width in (100, WIDE))
    return (long - short) / (WIDE - 100) / len(LENGTHS)
  def keeping(model, params, inputs):
    return model.apply({'params': params}, **inputs)
  states = 4 * 2 * 16  # bytes
  assert per_token(keeping) > states
  assert per_token(classifier.predict) < states / 2  # 4 features are embedded


@functools.cache
def _keys(rows):
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(
      jnp.arange(rows))


@pytest.mark.parametrize('kind', ['word', 'embedding', 'pooled'])
def test_dropout_of_a_row_depends_on_its_key_alone(kind):
  rates = {f'{k}_dropout': 0.5 * (k == kind)
           for k in ('word', 'embedding', 'pooled')}
  _, params, logits = _build(hidden_dim=32, **rates)
  base = logits(params, _ids(40), LENGTHS, _keys(4))
  wider = logits(params, _ids(64), LENGTHS, _keys(4))
  np.testing.assert_allclose(base, wider, atol=1e-6)
  fewer = logits(params, _ids(40)[:2], LENGTHS[:2], _keys(4)[:2])
  np.testing.assert_allclose(base[:2], fewer, atol=1e-6)
  others = logits(params, _ids(40), LENGTHS, _keys(8)[4:])
  assert (np.abs(base - others)[LENGTHS > 1] > 1e-6).any()
  frozen = logits(params, _ids(40), LENGTHS)
  assert (np.abs(base - frozen) > 1e-6).any()


def test_word_dropout_spares_start_and_padding_and_keeps_its_rate():
  draw = jax.jit(classifier._keep, static_argnums=(1, 2, 3))
  keep = draw(_keys(64), 0, 0.3, (500,))
  assert 0.69 < float(keep.mean()) < 0.71
  assert len({row.tobytes() for row in np.asarray(keep)}) == 64
  other_kind = draw(_keys(64), 1, 0.3, (500,))
  assert 0.5 < float((keep == other_kind).mean()) < 0.66  # 0.58 by chance
  _, params, logits = _build(word_dropout=0.99999)
  # Of one word, padding or not, the first.
  start, ones = np.where(np.arange(40) == 0, START_ID, _ids(40)), np.ones(
      4, np.int32)
  np.testing.assert_array_equal(
      logits(params, start, ones, _keys(4)), logits(params, start, ones))
  unknown = np.where(_ids(40) > START_ID, UNKNOWN_ID, _ids(40))
  np.testing.assert_allclose(
      logits(params, _ids(40), LENGTHS, _keys(4)),
      logits(params, unknown, LENGTHS), atol=1e-6)


def test_embedding_dropout_scales_the_features_that_it_keeps():
  _, params, logits = _build(embedding_dropout=0.75, embedding_dim=16)
  got = logits(params, _ids(40), LENGTHS, _keys(4))
  keep = np.asarray(classifier._keep(_keys(4), 1, 0.75, (16,)))
  table = params['embed']['embedding']
  for row in range(4):
    params['embed'] = {'embedding': table * keep[row] / 0.25}
    want = logits(params, _ids(40), LENGTHS)[row]
    np.testing.assert_allclose(got[row], want, atol=1e-6)


def test_bfloat16_is_close_and_keeps_float32_parameters():
  _, params, logits = _build(width=16)
  low, _, low_logits = _build(width=16, dtype='bfloat16')
  assert {x.dtype for x in jax.tree.leaves(
      classifier.param_shapes(low))} == {jnp.dtype('f4')}
  a = logits(params, _ids(40), LENGTHS)
  b = low_logits(params, _ids(40), LENGTHS)
  assert b.dtype == jnp.float32
  np.testing.assert_allclose(a, b, atol=0.02)
  assert (a != b).any()
  # Logits keep all their digits.
  assert (b != b.astype(jnp.bfloat16).astype(np.float32)).any()
