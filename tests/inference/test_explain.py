"""Parts of a logit: as loops in float64 find them, and nothing is missing."""

import itertools
import json
import math

import jax
import numpy as np
import pytest
from support.command import finished, run_here
from support.models import default_with, drawn_params

from flax_imdb.checkpoint import run
from flax_imdb.cluster import devices
from flax_imdb.data import counting
from flax_imdb.data.ngrams import NONE
from flax_imdb.data.reviews import Reviews
from flax_imdb.inference import evaluate, explain
from flax_imdb.model import classifier

TINY = {
    'global_batch_size': 8, 'data.vocab_size': 30, 'data.bigrams': 60,
    'data.log_odds_ngrams': 200, 'data.max_length': 12,
    'data.segment_length': 5, 'data.read': 'spread', 'model.embedding_dim': 3,
    'model.width': 3}


def _reviews(lengths, seed=0):
  rng = np.random.default_rng(seed)
  ids = rng.integers(2, 14, sum(lengths)).astype(np.uint16)
  offsets = np.cumsum([0, *lengths]).astype(np.int64)
  ids[offsets[:-1]] = 1
  return Reviews(ids, offsets, rng.integers(0, 2, len(lengths)).astype(np.int8))


def _model(**fields):
  """(config, model, host parameters, n-grams) that read all there is."""
  config = default_with(TINY | fields)
  model = classifier.build_model(config)
  params = drawn_params(model, seed=3)
  # As large as trained ones, so that no part is next to nothing.
  params['embed']['embedding'] *= 3
  if model.bigram_rows:
    params['bigrams']['embedding'] *= 3
  known, _ = counting.fit(config, _reviews([9] * 40, seed=5))
  if config.model.inputs == 'words':
    known = NONE
  return config, model, params, known


def _explained(config, model, params, known, reviews):
  """What is said of each review, and its logit."""
  params = devices.replicate(params)
  logits = evaluate.make_logits(
      config, evaluate.make_forward(model), known.annotate)(params, reviews)
  one = explain.make_explain(config, model, known)
  return [one(params, reviews[i:i + 1], z) for i, z in enumerate(logits)
          ], logits


def _starts(config, n):
  """Where the segments of n tokens begin, as the config's comments say."""
  data = config.data
  if not data.segment_length:
    return [(0, min(n, data.max_length))]
  if data.read == 'first':
    n = min(n, data.max_length)
  count = -(-min(n, data.max_length) // data.segment_length)
  size = min(n, data.segment_length)
  return [(k * (n - size) // max(1, count - 1), size) for k in range(count)]


def _plain(config, model, params, known, review, steps):
  """(scores, baseline) by loops over the line, in float64.

  Every place where a token is read has a row of its own in an embedding of
  places: `perturb`, pairs and batches are not needed.
  """
  n = len(review.ids)
  annotated = known.annotate(review)
  starts = _starts(config, n)
  length = max(size for _, size in starts)
  cells = [(s, t, start + t) for s, (start, size) in enumerate(starts)
           for t in range(size)]
  orders = config.data.log_odds_order
  scores, baseline = np.zeros(n), 0.0

  def share(order, end, amount):
    words = [i for i in range(end + 1 - order, end + 1) if i > 0]
    for i in words:
      scores[i] += amount / len(words)

  with jax.enable_x64(True):
    plain = model.clone(
        vocab_size=len(starts) * length, bigram_rows=0, dtype='float64')
    for number in range(model.members):
      own = jax.tree.map(lambda x, i=number: np.asarray(
          x if model.members == 1 else x[i], np.float64), params)
      words = own['embed']['embedding']
      pairs = own.pop('bigrams')['embedding'] if model.bigram_rows else None
      def input_at(fraction, words=words, pairs=pairs):
        """The rows of all places, their log-odds, and what moves."""
        rows = np.zeros((len(starts) * length, model.embedding_dim))
        odds = np.zeros((len(starts), length, model.log_odds_features))
        moves = {}
        for s, t, i in cells:
          near = words[0] + (pairs[0] if pairs is not None else 0)
          far = [words[review.ids[i]] - words[0]]
          if pairs is not None:
            far.append(pairs[annotated.features['bigrams'][i]] - pairs[0])
          along = 1 if i == 0 else fraction
          rows[s * length + t] = near + along * sum(far)
          if model.log_odds_features:
            odds[s, t] = along * annotated.features['log_odds'][i]
          moves[s, t, i] = far
        return rows, odds, moves

      def logit(rows, odds, own=own):
        ids = np.arange(len(starts) * length).reshape(len(starts), length)
        inputs = {'ids': ids.astype(np.int32), 'lengths': np.array(
            [size for _, size in starts], np.int32)}
        if config.data.segment_length:
          inputs['segments'] = np.arange(len(starts), dtype=np.int32)[None]
        if model.log_odds_features:
          inputs['log_odds'] = odds
        if model.linear_weight:
          inputs['linear'] = np.zeros(1)
        inputs = jax.tree.map(jax.numpy.asarray, inputs)
        return plain.apply(
            {'params': own | {'embed': {'embedding': rows}}}, **inputs)[0]

      slope = jax.jit(jax.grad(logit, argnums=(0, 1)))
      for step in range(steps):
        rows, odds, moves = input_at((step + 0.5) / steps)
        by_row, by_odds = map(np.asarray, slope(rows, odds))
        for (s, t, i), far in moves.items():
          if i == 0:
            continue
          for order, line in enumerate(far, 1):
            share(order, i, by_row[s * length + t] @ line
                  / steps / model.members)
          if model.log_odds_features:
            for order in range(1, orders + 1):
              share(order, i, by_odds[s, t, order - 1]
                    * annotated.features['log_odds'][i, order - 1]
                    / steps / model.members)
      rows, odds, _ = input_at(0.0)
      baseline += float(logit(rows, odds)) / model.members
  if model.linear_weight:
    factor = model.linear_weight / (1 + model.linear_weight)
    row = review.ids.tolist()
    weights = dict(zip(known.keys.tolist(), known.weights.tolist(),
                       strict=True))
    for order in range(1, orders + 1):
      grams = [tuple(row[i + 1 - order:i + 1]) for i in range(order - 1, n)]
      for end, gram in enumerate(grams, order - 1):
        key = sum(x << 20 * j for j, x in enumerate(reversed(gram)))
        amount = factor * weights.get(key | order << 60, 0) / grams.count(gram)
        if end == 0:
          baseline += amount
        share(order, end, amount)
  return scores[1:], baseline


@pytest.mark.parametrize('fields', [
    {},  # three segments of up to twelve tokens, that overlap
    {'data.read': 'first', 'model.members': 2},
    {'model.inputs': 'words+log_odds', 'data.log_odds_order': 2},
    {'model.inputs': 'words', 'data.segment_length': 0, 'data.read': 'first',
     'model.cell': 'simple_rnn', 'model.hidden_dim': 4},
    {'model.linear_weight': 2.5, 'model.layers': 2}], ids=str)
def test_scores_are_those_of_loops_in_float64(fields):
  config, model, params, known = _model(**fields)
  reviews = _reviews([8, 13, 2, 1, 21])
  found, logits = _explained(config, model, params, known, reviews)
  steps = devices.fill_up(explain._STEPS)
  for i, (one, logit) in enumerate(zip(found, logits, strict=True)):
    scores, baseline = _plain(
        config, model, params, known, reviews[i:i + 1], steps)
    np.testing.assert_allclose(one.scores, scores, rtol=1e-4, atol=2e-6)
    assert one.baseline == pytest.approx(baseline, abs=2e-6)
    assert one.gap == pytest.approx(
        scores.sum() + baseline - logit, abs=1e-5)


def test_nothing_is_missing_and_more_steps_miss_less(monkeypatch):
  config, model, params, known = _model()
  reviews = _reviews([8, 13, 9, 1, 21], seed=7)
  gaps = {}
  for steps in 2, 8, 64:
    monkeypatch.setattr(explain, '_STEPS', steps)
    found, logits = _explained(config, model, params, known, reviews)
    gaps[steps] = max(abs(one.gap) for one in found)
    for one, logit in zip(found, logits, strict=True):
      assert one.scores.sum() + one.baseline - logit == pytest.approx(
          one.gap, abs=1e-9)
  print('largest gap by steps:', gaps)
  assert max(abs(one.scores).max() for one in found if len(one.scores)) > 0.05
  assert gaps[64] < 1e-3 < gaps[2] and gaps[64] < gaps[8] < gaps[2]


@pytest.mark.parametrize('linear', [False, True])
def test_a_word_that_is_not_read_has_exactly_nothing(linear):
  config, model, params, known = _model(
      **{'data.read': 'first', 'data.max_length': 6, 'model.inputs':
         'words+bigrams+log_odds' + '+linear' * linear})
  review = _reviews([11], seed=2)
  review.ids[7:] = 2 + np.arange(4) + 20  # in no n-gram that is known
  (one,), _ = _explained(config, model, params, known, review)
  assert (one.scores[6:] == 0).all() and (one.scores[:5] != 0).all()
  assert len(one.scores) == 10


def test_a_review_without_words_is_its_own_baseline():
  config, model, params, known = _model()
  (one,), (logit,) = _explained(config, model, params, known, _reviews([1]))
  assert one.scores.shape == (0,)
  assert one.baseline == pytest.approx(float(logit), abs=1e-6)


def test_scores_of_a_model_made_by_hand():
  """One feature, no memory: the line's integral is a difference of tanh."""
  config, model, params, _ = _model(**{
      'model.inputs': 'words', 'model.cell': 'simple_rnn',
      'model.bidirectional': 'false', 'model.pooling': 'mean',
      'model.embedding_dim': 1, 'model.width': 1, 'data.read': 'first'})
  size = np.linspace(-1.5, 1.5, 30)[:, None].astype(np.float32)
  params['embed']['embedding'] = size
  cell = params['forward_0']['steps']['cell']
  for name, x in cell.items():
    cell[name] = np.zeros_like(x)
  kernel, = [name for name in cell if cell[name].shape == (1, 1)
             and 'recurrent' not in name]
  cell[kernel] = np.ones((1, 1), np.float32)
  params['logit'] = {'kernel': np.full((1, 1), 3, np.float32),
                     'bias': np.full(1, 0.5, np.float32)}
  review = Reviews(np.array([1, 9, 25, 9]), np.array([0, 4]), np.zeros(1))
  (one,), (logit,) = _explained(config, model, params, NONE, review)
  tanh = np.tanh(size[:, 0].astype(np.float64))
  np.testing.assert_allclose(
      one.scores, 3 / 4 * (tanh[[9, 25, 9]] - tanh[0]), rtol=1e-4)
  assert one.baseline == pytest.approx(
      0.5 + 3 / 4 * (tanh[1] + 3 * tanh[0]), rel=1e-5)
  assert logit == pytest.approx(
      0.5 + 3 / 4 * tanh[[1, 9, 25, 9]].sum(), rel=1e-5)


def test_a_review_has_the_same_scores_beside_others():
  config, model, params, known = _model()
  reviews = _reviews([8, 13, 21], seed=4)
  together, _ = _explained(config, model, params, known, reviews)
  alone, _ = _explained(config, model, params, known, reviews[1:2])
  np.testing.assert_array_equal(together[1].scores, alone[0].scores)


@pytest.mark.parametrize('which', ['trained', 'trained_on_every_input'])
def test_predict_explains_each_line(which, request):
  workdir, _ = request.getfixturevalue(which)
  texts = ["I can't say I was bored.", '', 'caf&eacute; <b>good</b> GOOD ' * 30,
           'e\u0301te\u0301 映画 \U0001f600 \0 <script>alert(1)</script>',
           'I &lt3; it']
  argv = ['--mode=predict', f'--workdir={workdir}', '--json']
  stdin = '\n'.join(texts).encode()
  plain, explained = ([json.loads(line) for line in finished(run_here(
      *argv, *more, stdin=stdin)).splitlines()] for more in ([], ['--explain']))
  temperature = run.restore(str(workdir), None).temperature
  for text, before, after in zip(texts, plain, explained, strict=True):
    words = after.pop('words')
    baseline, gap = after.pop('baseline'), after.pop('gap')
    assert after == before  # the answer is the same
    odds = before['probability'] / (1 - before['probability'])
    assert sum(x for *_, x in words) + baseline - gap == pytest.approx(
        temperature * math.log(odds), abs=1e-5)
    assert abs(gap) < 0.01
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(words))
    for begin, end, score in words:
      assert text[begin:end].strip() == text[begin:end] != ''
      assert isinstance(score, float)
  def shown(i):
    return [texts[i][a:b] for a, b, _ in words_of[i]]
  words_of = [json.loads(line)['words'] for line in finished(run_here(
      *argv, '--explain', stdin=stdin)).splitlines()]
  assert words_of[1] == []
  assert [x for x in shown(0) if x.isalpha()] == ['I', 'say', 'I', 'was',
                                                  'bored']
  assert shown(2)[:3] == ['caf&eacute;', 'good', 'GOOD']
  assert shown(3)[0] == 'e\u0301te\u0301'
  assert shown(4) == ['I', '&lt3;', 'it']  # of which 3; are two words
  # The fixtures' longest review is shorter than this one.
  most = run.restore(str(workdir), None).config.data.max_length
  if which == 'trained':
    assert not any(score for *_, score in words_of[2][most:])
    assert len(words_of[2]) == 90 > most


def test_of_more_classes_that_of_the_largest_logit_is_explained(monkeypatch):
  """The class axis is there in what is explained, before any model has one."""
  config, model, params, _ = _model(**{'model.inputs': 'words'})
  reviews = _reviews([8, 13], seed=9)
  apply = type(model).apply
  def three(self, *args, **kwargs):
    z = apply(self, *args, **kwargs)
    return jax.numpy.stack([-z, 2 * z, z], axis=-1)
  (plain, _), _ = _explained(config, model, params, NONE, reviews)
  monkeypatch.setattr(type(model), 'apply', three)
  one = explain.make_explain(config, model, NONE)
  params = devices.replicate(params)
  for column, factor in enumerate([-1, 2, 1]):
    logits = np.zeros(3, np.float32)
    logits[column] = 5
    found = one(params, reviews[:1], logits)
    np.testing.assert_allclose(found.scores, factor * plain.scores, rtol=1e-5)
    assert found.baseline == pytest.approx(factor * plain.baseline, rel=1e-5)
    assert found.gap == pytest.approx(
        found.scores.sum() + found.baseline - 5, abs=1e-6)


@pytest.mark.slow
def test_without_jit_it_is_the_same():
  case, reviews = _model(), _reviews([9])
  (want,), _ = _explained(*case, reviews)
  with jax.disable_jit():
    (got,), _ = _explained(*case, reviews)
  np.testing.assert_allclose(got.scores, want.scores, rtol=1e-4, atol=1e-6)
  assert got.baseline == pytest.approx(want.baseline, rel=1e-5)
