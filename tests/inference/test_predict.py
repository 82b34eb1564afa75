"""Raw text is read as in training, and answered in its order."""

import json
import math
import shutil

import numpy as np
import pytest
from support.command import finished, run_here
from support.models import logits_of, one_by_one, tiny_model

from flax_imdb.checkpoint import run
from flax_imdb.data.reviews import Reviews
from flax_imdb.data.sources import LABELS
from flax_imdb.data.tokenizer import encode, fit_tokenizer
from flax_imdb.inference import predict

TEXTS = ['good film', 'bad film', 'a good bad film']


@pytest.mark.parametrize('logit', [-1e4, -30.0, -1.5, 0.0, 1e-3, 2.0, 1e4])
def test_probability_is_the_logistic_function(logit):
  p = predict.probability(logit)
  want = 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
  assert p == pytest.approx(want, rel=1e-12) and 0 <= p <= 1
  assert p + predict.probability(-logit) == pytest.approx(1)


def _predict(texts, *temperature):
  """Predictions of a model whose logit is the last token's id minus 5."""
  tokenizer = fit_tokenizer(TEXTS, 100)
  seen = []
  def logits(params, reviews):
    assert params == 'params'
    seen.append(reviews)
    return (reviews.ids[reviews.offsets[1:] - 1] - 5.0).astype(np.float32)
  predictions = predict.predict(
      logits, 'params', tokenizer, texts, LABELS, *temperature)
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


@pytest.mark.parametrize('temperature', [0.1, 3.0])
def test_a_temperature_changes_the_probability_and_no_label(temperature):
  texts = ['good', 'a bad', 'film']
  plain, *_ = _predict(texts)
  divided, reviews, _ = _predict(texts, temperature)
  for before, after, end in zip(
      plain, divided, reviews.offsets[1:], strict=True):
    z = float(reviews.ids[end - 1]) - 5
    assert after == before | {
        'probability': predict.probability(z / temperature)}
  assert plain != divided


def test_of_several_classes_each_has_a_probability_and_the_label_the_largest():
  tokenizer, names = fit_tokenizer(TEXTS, 100), ('a', 'b', 'c')
  rows = np.array([[1, 3, 2], [800, -800, 0], [0.5, 0.5, 0]], np.float32)
  found = predict.predict(
      lambda params, reviews: rows, None, tokenizer, TEXTS, names, 2.0)
  assert [p['label'] for p in found] == ['b', 'a', 'a']
  assert [p['text'] for p in found] == TEXTS
  for prediction, row in zip(found, rows / 2, strict=True):
    assert list(prediction['probabilities']) == list(names)
    p = np.exp(row - row.max(), dtype=np.float64)
    np.testing.assert_allclose(
        list(prediction['probabilities'].values()), p / p.sum(), rtol=1e-12)
    assert prediction['probability'] == max(
        prediction['probabilities'].values())
  assert predict.prediction_text(found[1]) == 'a 1.000  bad film'


def test_a_run_is_predicted_with_at_the_temperature_of_its_step(
    trained, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained[0], workdir)
  def predictions(*flags):
    printed = finished(run_here(
        '--mode=predict', f'--workdir={workdir}', '--json', *flags,
        stdin='\n'.join(TEXTS).encode()))
    return [json.loads(line) for line in printed.splitlines()]
  (workdir / 'calibration.json').unlink()
  plain = {step: predictions(f'--step={step}') for step in (7, 14)}
  run.write_calibration(str(workdir), 7, 0.5)
  assert predictions('--step=14') == plain[14]  # another's is not taken
  for before, after in zip(plain[7], predictions('--step=7'), strict=True):
    p, q = before.pop('probability'), after.pop('probability')
    assert math.log(q / (1 - q)) == pytest.approx(2 * math.log(p / (1 - p)))
    assert before == after


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
  got = predict.predict(
      logits_of(config, model), params, tokenizer, texts, LABELS)
  np.testing.assert_allclose(
      [p['probability'] for p in got],
      [predict.probability(float(z)) for z in want], atol=1e-6)


def test_prediction_text_is_one_line():
  prediction = {'label': 'positive', 'probability': 0.98765, 'text': 'Fine!'}
  assert predict.prediction_text(prediction) == 'positive 0.988  Fine!'
  assert predict.prediction_text({**prediction, 'note': 'no words'}) == (
      'positive 0.988  Fine!  (no words)')
