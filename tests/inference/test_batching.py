"""What waits is answered together, as if each text were alone."""

import contextlib

import jax
import numpy as np
import pytest

from flax_imdb.checkpoint import run
from flax_imdb.inference import batching, evaluate, explain, predict

# Of all lengths that the fixtures' models tell apart, and some that none is.
TEXTS = ['', 'good', 'bad film', 'not good <b>at</b> all ' * 4,
         'I was bored. ' * 9, 'Не хорошо \U0001f600 \0', 'not bad ' * 200]


@pytest.fixture(scope='module', params=['trained', 'trained_on_every_input'])
def found(request):
  return run.restore(str(request.getfixturevalue(request.param)[0]), None)


@pytest.fixture(scope='module')
def warm(found):
  """(batcher, the sizes of its batches), compiled."""
  sizes = []
  batcher = batching.Batcher(found, sizes.append)
  batcher.warm()
  return batcher, sizes


@pytest.fixture
def batcher(warm):
  batcher, sizes = warm
  sizes.clear()
  yield warm
  assert not batcher.waiting()


def _alone(found, texts, explained=False):
  """What --mode=predict has for them."""
  return list(predict.predict(
      evaluate.make_logits(found.config, evaluate.forward_of(found),
                           found.ngrams.annotate),
      found.params, found.tokenizer, texts, found.labels, found.temperature,
      explain.make_explain(found.config, found.model, found.ngrams)
      if explained else None))


def _assert_equal(answers, predictions):
  """Equal but for the last digits of float32."""
  for answer, prediction in zip(answers, predictions, strict=True):
    answer, prediction = dict(answer), dict(prediction)
    for name in ('probability', 'baseline', 'gap'):
      if name in prediction:
        assert answer.pop(name) == pytest.approx(
            prediction.pop(name), abs=3e-6)
    if 'words' in prediction:
      words, wanted = answer.pop('words'), prediction.pop('words')
      assert [x[:2] for x in words] == [x[:2] for x in wanted]
      np.testing.assert_allclose([x[2] for x in words], [x[2] for x in wanted],
                                 atol=3e-6)
    assert answer == prediction


@contextlib.contextmanager
def _traces():
  """Counts what jax compiles, or loads compiled, meanwhile."""
  events = []
  def listen(event, seconds, **more):
    events.extend([event] * event.endswith('jaxpr_trace_duration'))
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield events
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_text_alone_is_computed_alone(found, monkeypatch):
  forward, rows = evaluate.forward_of(found), []
  def noting(params, batch):
    count, each, *_ = batch.get('segments', batch['ids']).shape
    rows.append(count * each)
    return forward(params, batch)
  monkeypatch.setattr(evaluate, 'forward_of', lambda found: noting)
  batcher = batching.Batcher(found, lambda size: None)
  future, = batcher.ask(['good'])
  batcher.work(1)
  assert future.result() and rows == [jax.local_device_count()]


def test_what_came_together_is_one_batch_and_equals_predict(found, batcher):
  batcher, sizes = batcher
  futures = [future for text in TEXTS for future in batcher.ask([text])]
  assert batcher.waiting() == len(TEXTS)
  batcher.work(0)
  assert sizes == [len(TEXTS)]
  _assert_equal([future.result(0) for future in futures],
                _alone(found, TEXTS))


def test_a_batch_has_a_maximum_and_explanations_do_not_keep_it_waiting(batcher):
  batcher, sizes = batcher
  explained = batcher.ask(['good', 'bad'], explained=True)
  first, second = batcher.ask(['good'] * 20), batcher.ask(['bad'] * 21)
  batcher.work(0)
  assert sizes == [32, 1]
  assert [x.done() for x in [*first, *second]] == [True] * 32 + [False] * 9
  assert [x.done() for x in explained] == [True, False]
  batcher.work(0)
  assert sizes == [32, 1, 9, 1] and explained[1].result(0)['words']


def test_an_explanation_equals_that_of_predict(found, batcher):
  batcher, _ = batcher
  futures = batcher.ask(TEXTS, explained=True)
  while batcher.waiting():
    batcher.work(0)
  _assert_equal([future.result(0) for future in futures],
                _alone(found, TEXTS, explained=True))


def test_once_it_is_warm_nothing_is_compiled(batcher):
  batcher, _ = batcher
  with _traces() as traces:
    jax.jit(lambda x: x + 1)(1)
    assert traces  # it would be seen
    traces.clear()
    for number in 1, 3, 8, 9, 32:
      for words in 0, 9, 19, 21, 39, 59, 61, 1000:
        batcher.ask(['good ' * words] * number)
        batcher.work(0)
    batcher.ask([text * 2 for text in TEXTS], explained=True)
    while batcher.waiting():
      batcher.work(0)
    assert not traces


def test_no_more_wait_than_may(batcher):
  batcher, _ = batcher
  for explained, most in ((False, batching.MOST_WAITING),
                          (True, batching.MOST_EXPLAINED_WAITING)):
    texts = batcher.ask(['good'] * (most - 1), explained)
    with pytest.raises(batching.Full):
      batcher.ask(['good', 'bad'], explained)  # neither is taken
    texts += batcher.ask(['good'], explained)
    with pytest.raises(batching.Full):
      batcher.ask(['bad'], explained)
    for text in texts[:-1]:
      text.cancel()
  assert batcher.waiting() == (
      batching.MOST_WAITING + batching.MOST_EXPLAINED_WAITING)
  while batcher.waiting():
    batcher.work(0)


def test_what_nobody_waits_for_is_not_computed(batcher):
  batcher, sizes = batcher
  cancelled, left = batcher.ask(['good', 'bad'])
  assert cancelled.cancel()
  batcher.work(0)
  assert sizes == [1] and left.result(0)['text'] == 'bad'


def test_a_failure_is_told_to_those_who_asked(batcher, monkeypatch):
  batcher, _ = batcher
  def fail(*args):
    raise ValueError('of the model')
  with monkeypatch.context() as patched:
    patched.setattr(predict, 'predict', fail)
    futures = batcher.ask(['good', 'bad'])
    batcher.work(0)
  for future in futures:
    with pytest.raises(ValueError, match='of the model'):
      future.result(0)
  (future,) = batcher.ask(['good'])
  batcher.work(0)
  assert future.result(0)['text'] == 'good'
