"""Every review counts once, and raw text is read as in training."""

import math

import jax
import numpy as np
import pytest

from flax_imdb import config as config_lib
from flax_imdb import evaluate
from flax_imdb import model as model_lib
from flax_imdb import parallel
from flax_imdb import tokenizer as tokenizer_lib
from flax_imdb.batches import Reviews

TEXTS = ['good film', 'bad film', 'a good bad film']


def _model(**fields):
  """(config, model, replicated parameters) of a tiny untrained model."""
  config = config_lib.load('configs/debug.py')
  config.debug = False
  config.data.max_length, config.data.bucket_width = 12, 5
  config.update_from_flattened_dict(fields)
  config_lib.check(config)
  model = model_lib.build(config)
  params = model_lib.init(model, jax.random.key(1))
  # Embeddings as large as trained ones, so that logits differ visibly.
  params['embed']['embedding'] *= 20
  return config, model, parallel.replicate(params)


def _logits(config, model):
  return evaluate.make_logits(config, model, parallel.CompileClock())


def _reviews(n):
  """Reviews of 1 to 17 tokens in no order; some are cut at max_length."""
  rng = np.random.default_rng(0)
  lengths = rng.permutation(np.arange(n) % 17 + 1)
  ids = rng.integers(4, 100, lengths.sum()).astype(np.uint16)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  return Reviews(ids, offsets, rng.integers(0, 2, n).astype(np.int8))


def _one_by_one(model, params, reviews, max_length):
  """The logits, each review alone in a batch and on one device."""
  params, logits = parallel.to_host(params), []
  apply = jax.jit(model.apply)
  for i in range(len(reviews)):
    ids = reviews.ids[reviews.offsets[i]:reviews.offsets[i + 1]][:max_length]
    row = np.zeros((1, max_length), np.int32)
    row[0, :len(ids)] = ids
    logits += list(apply({'params': params}, row, np.array([len(ids)])))
  return np.array(logits)


@pytest.fixture(scope='module')
def alone():
  """(reviews, the logits of each alone)."""
  config, model, params = _model()
  reviews = _reviews(23)
  logits = _one_by_one(model, params, reviews, config.data.max_length)
  assert np.ptp(logits) > 0.01 and len(set(logits)) > 20
  return reviews, logits


@pytest.mark.parametrize('bucket_width', [0, 1, 5])
def test_every_review_counts_once_and_in_order(alone, bucket_width):
  reviews, want = alone
  config, model, params = _model(**{'data.bucket_width': bucket_width})
  assert config.global_batch_size == 8
  logits = _logits(config, model)
  for n in (1, 7, 8, 9, 23):
    got = logits(params, reviews[:n])
    assert got.shape == (n,) and got.dtype == np.float32
    np.testing.assert_allclose(got, want[:n], atol=1e-6)
  np.testing.assert_allclose(logits(params, reviews[5:9]), want[5:9], atol=1e-6)


@pytest.mark.parametrize('batch_size', [2, 6, 64])
def test_the_batch_size_changes_no_logit(alone, batch_size):
  reviews, want = alone
  config, model, params = _model(global_batch_size=batch_size)
  got = _logits(config, model)(params, reviews)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_model_that_reads_padding_gets_always_the_same(alone):
  reviews, _ = alone
  config, model, params = _model(**{
      'model.mask_padding': False, 'data.bucket_width': 0})
  logits = _logits(config, model)
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
  assert result == {'loss': pytest.approx(loss, rel=1e-12),
                    'accuracy': correct / 50, 'n': 50}
  assert all(type(v) in (int, float) for v in result.values())  # JSON takes it


def test_score_of_extreme_logits_is_finite_and_exact():
  logits = np.array([1e4, -1e4, 1e4, -1e4], np.float32)
  labels = np.array([1, 0, 0, 1], np.int8)
  assert evaluate.score(logits, labels) == {
      'loss': 5000.0, 'accuracy': 0.5, 'n': 4}
  assert evaluate.score(logits[:2], labels[:2]) == {
      'loss': 0.0, 'accuracy': 1.0, 'n': 2}


def test_score_adds_up_in_float64():
  # In float32 0.5 is lost beside 2**25.
  logits = np.array([-2.0**25] + [0.0] * 1000, np.float32)
  labels = np.array([1] + [0] * 1000, np.int8)
  got = evaluate.score(logits, labels)
  assert got['loss'] * 1001 == pytest.approx(
      2**25 + 1000 * math.log(2), rel=1e-9)
  assert got['accuracy'] == 1000 / 1001  # 0 counts as negative


def test_text_of_a_score():
  line = evaluate.text('test', {'loss': 0.51239, 'accuracy': 0.75, 'n': 25000})
  assert line == 'test: loss 0.5124  accuracy 0.7500  on 25,000 reviews'


@pytest.mark.parametrize('logit', [-1e4, -30.0, -1.5, 0.0, 1e-3, 2.0, 1e4])
def test_probability_is_the_logistic_function(logit):
  p = evaluate.probability(logit)
  want = 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
  assert p == pytest.approx(want, rel=1e-12) and 0 <= p <= 1
  assert p + evaluate.probability(-logit) == pytest.approx(1)


def _predict(texts):
  """Predictions of a model whose logit is the last token's id minus 5."""
  tokenizer = tokenizer_lib.fit(TEXTS, 100)
  seen = []
  def logits(params, reviews):
    assert params == 'params'
    seen.append(reviews)
    return (reviews.ids[reviews.offsets[1:] - 1] - 5.0).astype(np.float32)
  predictions = evaluate.predict(logits, 'params', tokenizer, texts)
  return predictions, seen[0], tokenizer


def test_predict_gives_label_probability_and_text_in_order():
  texts = ['A good FILM', 'a bad', 'good', 'bad good']
  predictions, reviews, tokenizer = _predict(texts)
  want = tokenizer_lib.encode(tokenizer, texts)
  np.testing.assert_array_equal(reviews.ids, np.concatenate(want))
  np.testing.assert_array_equal(np.diff(reviews.offsets), [4, 3, 2, 3])
  for prediction, text, ids in zip(predictions, texts, want, strict=True):
    z = float(ids[-1]) - 5
    assert prediction == {
        'label': 'positive' if z > 0 else 'negative',
        'probability': evaluate.probability(z), 'text': text}
  assert {p['label'] for p in predictions} == {'positive', 'negative'}


@pytest.mark.parametrize(('text', 'note'), [
    ('', 'no words'), (' \t', 'no words'), ('... <br />!', 'no words'),
    ('unheard', 'only unknown words'), ('un heard of', 'only unknown words'),
    ('unheard good', None), ('film', None)])
def test_predict_notes_an_answer_that_rests_on_nothing(text, note):
  (_, prediction), *_ = _predict(['good', text])
  assert prediction.get('note') == note
  assert ('note' in prediction) == (note is not None)


def test_predict_equals_the_model_on_the_encoded_texts():
  config, model, params = _model()
  tokenizer = tokenizer_lib.fit(TEXTS, config.data.vocab_size)
  texts = [*TEXTS, '', 'film ' * 40]
  ids = tokenizer_lib.encode(tokenizer, texts)
  reviews = Reviews(np.concatenate(ids), np.cumsum([0, *map(len, ids)]),
                    np.zeros(5, np.int8))
  want = _one_by_one(model, params, reviews, config.data.max_length)
  got = evaluate.predict(_logits(config, model), params, tokenizer, texts)
  np.testing.assert_allclose(
      [p['probability'] for p in got],
      [evaluate.probability(float(z)) for z in want], atol=1e-6)


def test_prediction_text_is_one_line():
  prediction = {'label': 'positive', 'probability': 0.98765, 'text': 'Fine!'}
  assert evaluate.prediction_text(prediction) == 'positive 0.988  Fine!'
  assert evaluate.prediction_text({**prediction, 'note': 'no words'}) == (
      'positive 0.988  Fine!  (no words)')
