"""Frozen parameters and reviews in, numbers out."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import math
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
from tokenizers import Tokenizer

from flax_imdb import batches
from flax_imdb import model as model_lib
from flax_imdb import parallel
from flax_imdb import processes
from flax_imdb import tokenizer as tokenizer_lib

LABELS = ('negative', 'positive')
_PART_CHARACTERS = 1 << 22  # some 2,000 reviews

Logits = Callable[[Any, batches.Reviews], np.ndarray]


def make_forward(model: model_lib.SentimentClassifier,
                 devices: Sequence[jax.Device] | None = None) -> Callable:
  """Makes forward(params, batch) -> float32 [devices, rows] logits.

  The batch holds ids and lengths, after `parallel.shard`; `devices` as in
  `parallel.data_parallel`.
  """
  def apply(params, batch):
    return model.apply({'params': params}, batch['ids'], batch['lengths'])
  return parallel.forward(apply, devices)


def make_logits(config: ConfigDict, model: model_lib.SentimentClassifier,
                clock: parallel.CompileClock) -> Logits:
  """Makes logits(params, reviews) -> float32 [n], in the reviews' order.

  `params` are replicated parameters. Each review goes through the model once;
  what fills up the last batch is thrown away. A review's logit does not depend
  on the number of devices, nor, as long as padding is masked, on its batch.
  Each process works on its own rows, and all get the logits of all.
  """
  forward = clock.wrap(make_forward(model))

  def logits(params: Any, reviews: batches.Reviews) -> np.ndarray:
    places: list[np.ndarray] = []
    fetched: list[np.ndarray] = []
    running: jax.Array | None = None
    def fetch():
      if running is not None:
        fetched.append(np.asarray(running).reshape(-1))
    for rows, batch in batches.eval_batches(
        reviews, config.global_batch_size, config.data.bucket_width,
        config.data.max_length, parallel.own_rows(config.global_batch_size)):
      batch = {k: batch[k] for k in ('ids', 'lengths')}
      values = forward(params, parallel.shard(batch))
      fetch()  # the batch before: the devices already work on this one
      running = values
      places.append(rows)
      processes.turn()
    fetch()
    result = np.empty(len(reviews), np.float32)
    for rows, all_values in zip(
        places, parallel.gather_rows(np.array(fetched)), strict=True):
      result[rows] = all_values[:len(rows)]
    return result

  return logits


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """Mean loss and accuracy over all reviews.

  Args:
    logits: float [n].
    labels: int [n], 0 or 1.

  Returns:
    loss: binary cross entropy in nats, added up in float64; accuracy: share of
    reviews on the right side of 0; n.
  """
  z = logits.astype(np.float64)
  with np.errstate(invalid='ignore'):  # of infinite logits the mean is NaN
    losses = np.logaddexp(0, z) - z * labels
  return {'loss': float(losses.mean()),
          'accuracy': float(((z > 0) == (labels > 0)).mean()), 'n': len(z)}


def text(split: str, result: dict[str, float]) -> str:
  """One line about what `score` returned."""
  return (f'{split}: loss {result["loss"]:.4f}  accuracy '
          f'{result["accuracy"]:.4f}  on {result["n"]:,} reviews')


def parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
  """Divides texts so that the encoding of each part takes 0.3 GB at most."""
  start = size = 0
  for stop, words in enumerate(texts, 1):
    size += len(words) + 1000  # an empty one takes memory, too
    if size > _PART_CHARACTERS or stop == len(texts):
      yield texts[start:stop]
      start, size = stop, 0


def predict(logits: Logits, params: Any, tokenizer: Tokenizer,
            texts: Sequence[str]) -> list[dict[str, Any]]:
  """Classifies raw texts.

  Returns:
    For each text its label, the probability that it is positive, the text, and
    a note where the answer rests on nothing: a text that is empty or holds
    only words unknown to the tokenizer.
  """
  ids = tokenizer_lib.encode(tokenizer, texts)
  reviews = batches.Reviews(
      ids=np.concatenate(ids),
      offsets=np.cumsum([0] + [len(row) for row in ids], dtype=np.int64),
      labels=np.zeros(len(ids), np.int8))
  predictions = []
  for words, row, z in zip(
      texts, ids, logits(params, reviews), strict=True):
    prediction = {'label': LABELS[int(z > 0)],
                  'probability': probability(float(z)), 'text': words}
    if len(row) == 1:
      prediction['note'] = 'no words'
    elif (row[1:] == tokenizer_lib.UNKNOWN_ID).all():
      prediction['note'] = 'only unknown words'
    predictions.append(prediction)
  return predictions


def probability(logit: float) -> float:
  """The probability of a positive review: the logistic function."""
  # exp of a negative number only: it can't overflow.
  odds = math.exp(-abs(logit))
  return 1 / (1 + odds) if logit > 0 else odds / (1 + odds)


def prediction_text(prediction: dict[str, Any]) -> str:
  """One line about what `predict` returned for a text."""
  note = f'  ({prediction["note"]})' if 'note' in prediction else ''
  return (f'{prediction["label"]} {prediction["probability"]:.3f}  '
          f'{prediction["text"]}{note}')
