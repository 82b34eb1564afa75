"""The gradient by lag: against finite differences, and the whole mode."""

import csv
import json
import struct

import jax
import numpy as np
import pytest
from support.command import TINY, finished, run_here
from support.models import drawn_params

from flax_imdb.analysis import gradients
from flax_imdb.config import load_config
from flax_imdb.data.ngrams import NONE
from flax_imdb.data.reviews import Reviews
from flax_imdb.errors import UserError
from flax_imdb.model import classifier
from flax_imdb.model.recurrent import CELLS


def _model(**model):
  config = load_config('configs/notebook.py')
  config.data.update(vocab_size=50)
  config.model.update(embedding_dim=3, width=4, hidden_dim=5, **model)
  built = classifier.build_model(config)
  return built, drawn_params(built)


def test_of_several_classes_it_is_that_of_the_predicted_one():
  two, _ = _model()
  model = two.clone(class_count=3)
  params = drawn_params(model)
  ids = np.random.default_rng(0).integers(4, 50, (6, 9)).astype(np.int32)
  batch = {'ids': ids, 'lengths': np.full(6, 9, np.int32)}
  params['embed']['embedding'] *= 20
  predicted = np.argmax(model.apply({'params': params}, **batch), axis=1)
  assert len({*predicted.tolist()}) > 1
  got = gradients.gradient_norms(model, params, batch)
  for k in {*predicted.tolist()}:
    alone = params | {'logit': {
        'kernel': params['logit']['kernel'][:, k:k + 1],
        'bias': params['logit']['bias'][k:k + 1]}}
    want = gradients.gradient_norms(two, alone, batch)
    for place, norms in got.items():
      np.testing.assert_allclose(norms[:, predicted == k],
                                 want[place][:, predicted == k], rtol=1e-4)


@pytest.mark.parametrize('cell', ['lstm', 'simple_rnn'])
def test_norms_equal_the_product_of_jacobians(cell):
  """Walks back by hand, with the Jacobian of one step after the other."""
  model, params = _model(cell=cell)
  ids = np.random.default_rng(0).integers(4, 50, (2, 9)).astype(np.int32)
  got = gradients.gradient_norms(
      model, params, {'ids': ids, 'lengths': np.full(2, 9, np.int32)})
  assert set(got) == ({'h', 'c', 'x'} if cell == 'lstm' else {'h', 'x'})
  module = CELLS[cell](4)
  weights = {'params': params['forward_0']['steps']['cell']}
  for review, row in enumerate(ids):
    x = params['embed']['embedding'][row]
    carries = [module.start(1)]
    for t in range(9):
      carries.append(module.apply(weights, carries[-1], x[t][None]))
    def head(carry):
      hidden = jax.nn.relu(
          carry[-1] @ params['hidden']['kernel'] + params['hidden']['bias'])
      return (hidden @ params['logit']['kernel'])[0, 0]
    gradient = jax.grad(head)(carries[-1])
    for lag in range(9):
      norms = [np.linalg.norm(g) for g in gradient]
      np.testing.assert_allclose(got['h'][lag, review], norms[-1], rtol=1e-4)
      if cell == 'lstm':
        np.testing.assert_allclose(got['c'][lag, review], norms[0], rtol=1e-4)
      _, back = jax.vjp(lambda carry, x: module.apply(weights, carry, x),
                        carries[8 - lag], x[8 - lag][None])
      gradient, of_input = back(gradient)
      np.testing.assert_allclose(
          got['x'][lag, review], np.linalg.norm(of_input), rtol=1e-4)


@pytest.mark.slow
def test_report_compares_two_runs(tmp_path):
  """A figure, and a CSV whose medians are those of the norms."""
  argv = [x for x in TINY if 'bucket' not in x and 'quick' not in x]
  for cell in ('lstm', 'simple_rnn'):
    finished(run_here(
        *argv, '--config=configs/notebook.py', '--config.num_epochs=1',
        '--config.data.name=grammar_reviews', '--config.data.vocab_size=100',
        f'--config.model.cell={cell}', f'--workdir={tmp_path}/{cell}'))
  output = finished(run_here(
      '--mode=report', f'--workdir={tmp_path}/lstm', f'{tmp_path}/simple_rnn'))
  assert output.count('gradients at 40 lags of 30 reviews') == 2
  assert output.count('logistic regression on the tf-idf of words: acc') == 2
  folder = tmp_path / 'lstm' / 'report'
  image = (folder / 'gradient.png').read_bytes()
  assert image[:8] == b'\x89PNG\r\n\x1a\n'
  assert struct.unpack('>2I', image[16:24]) == (1440, 540)
  rows = list(csv.DictReader(
      (folder / 'gradient.csv').read_text().splitlines()))
  series = {(r['run'], r['training'], r['gradient with respect to'])
            for r in rows}
  assert series == {
      (run, when, place) for run, places in (
          ('lstm', ('hidden state', 'cell state', 'embedded input')),
          ('simple_rnn', ('hidden state', 'embedded input')))
      for when in ('before', 'after') for place in places}
  assert len(rows) == 40 * len(series)
  for row in rows:
    low, median, high = (
        float(row[k]) for k in ('lower quartile', 'median', 'upper quartile'))
    assert 0 <= low <= median <= high
  assert json.loads((tmp_path / 'lstm' / 'summary.json').read_text())['step']


def test_long_reviews_are_cut_and_short_ones_left_out(monkeypatch):
  monkeypatch.setattr(gradients, 'LENGTH', 6)
  config = load_config('configs/notebook.py')
  lengths = np.array([5, 6, 9, 1, 7])
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  reviews = Reviews(np.arange(offsets[-1]) + 4, offsets, np.zeros(5, np.int8))
  ids = gradients.long_reviews(config, NONE, reviews)['ids']
  np.testing.assert_array_equal(
      ids, [reviews.ids[offsets[row]:offsets[row] + 6] for row in (1, 2, 4)])
  with pytest.raises(UserError, match='no validation review has 6 tokens'):
    gradients.long_reviews(config, NONE, reviews[:1])
