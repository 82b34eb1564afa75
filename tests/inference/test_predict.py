"""Raw text is read as in training, and answered in its order."""

import math

import numpy as np
import pytest
from support.models import logits_of, one_by_one, tiny_model

from flax_imdb.data.reviews import Reviews
from flax_imdb.data.tokenizer import encode, fit_tokenizer
from flax_imdb.inference import predict

TEXTS = ['good film', 'bad film', 'a good bad film']


@pytest.mark.parametrize('logit', [-1e4, -30.0, -1.5, 0.0, 1e-3, 2.0, 1e4])
def test_probability_is_the_logistic_function(logit):
  p = predict.probability(logit)
  want = 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
  assert p == pytest.approx(want, rel=1e-12) and 0 <= p <= 1
  assert p + predict.probability(-logit) == pytest.approx(1)


def _predict(texts):
  """Predictions of a model whose logit is the last token's id minus 5."""
  tokenizer = fit_tokenizer(TEXTS, 100)
  seen = []
  def logits(params, reviews):
    assert params == 'params'
    seen.append(reviews)
    return (reviews.ids[reviews.offsets[1:] - 1] - 5.0).astype(np.float32)
  predictions = predict.predict(logits, 'params', tokenizer, texts)
  return predictions, seen[0], tokenizer


def test_predict_gives_label_probability_and_text_in_order():
  texts = ['A good FILM', 'a bad', 'good', 'bad good']
  predictions, reviews, tokenizer = _predict(texts)
  want = encode(tokenizer, texts)
  np.testing.assert_array_equal(reviews.ids, np.concatenate(want))
  np.testing.assert_array_equal(np.diff(reviews.offsets), [4, 3, 2, 3])
  for prediction, text, ids in zip(predictions, texts, want, strict=True):
    z = float(ids[-1]) - 5
    assert prediction == {
        'label': 'positive' if z > 0 else 'negative',
        'probability': predict.probability(z), 'text': text}
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
  config, model, params = tiny_model()
  tokenizer = fit_tokenizer(TEXTS, config.data.vocab_size)
  texts = [*TEXTS, '', 'film ' * 40]
  ids = encode(tokenizer, texts)
  reviews = Reviews(np.concatenate(ids), np.cumsum([0, *map(len, ids)]),
                    np.zeros(5, np.int8))
  want = one_by_one(model, params, reviews, config.data.max_length)
  got = predict.predict(logits_of(config, model), params, tokenizer, texts)
  np.testing.assert_allclose(
      [p['probability'] for p in got],
      [predict.probability(float(z)) for z in want], atol=1e-6)


def test_prediction_text_is_one_line():
  prediction = {'label': 'positive', 'probability': 0.98765, 'text': 'Fine!'}
  assert predict.prediction_text(prediction) == 'positive 0.988  Fine!'
  assert predict.prediction_text({**prediction, 'note': 'no words'}) == (
      'positive 0.988  Fine!  (no words)')
