"""Frozen parameters and reviews in, logits and scores out."""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
import scipy

from flax_imdb.checkpoint import run
from flax_imdb.cluster import devices, processes
from flax_imdb.data.batches import eval_batches
from flax_imdb.data.reading import Batch, Reading, Share
from flax_imdb.data.reviews import Reviews, load_splits, reviews_sha256
from flax_imdb.inference import confusion
from flax_imdb.model import classifier
from flax_imdb.terminal import CompileClock, ShowProgress, show_nothing

Logits = Callable[[Any, Reviews], np.ndarray]


def inputs(batch: Batch) -> Batch:
  """As `classifier.inputs`, of a batch of `pad`: rows of the whole table."""
  found = classifier.inputs(batch)
  if 'bigrams' in found:
    found['bigrams'] = batch['bigram_rows'][batch['bigrams']]
  return found


def make_forward(model: classifier.SentimentClassifier,
                 others: Sequence[jax.Device] | None = None) -> Callable:
  """Makes forward(params, batch) -> float32 [devices, rows] or [.., C] logits.

  The batch is one of `classifier.inputs`, after `devices.shard`; `others` are
  devices as in `devices.data_parallel`.
  """
  model = classifier.to_predict(model, (others or jax.local_devices())[0])
  return devices.data_parallel_forward(
      functools.partial(classifier.predict, model), others)


def forward_of(restored: run.Run) -> Callable:
  """`make_forward` of a run's model in the form that this device has."""
  return make_forward(classifier.for_device(
      restored.config, restored.model, jax.local_devices()[0]))


def batch_size(config: ConfigDict) -> int:
  """Reviews at once, over all devices, which share them evenly."""
  return devices.fill_up(config.eval_batch_size or config.global_batch_size)


def make_logits(
    config: ConfigDict, forward: Callable,
    annotate: Callable[[Reviews], Reviews],
    progress: ShowProgress = show_nothing) -> Logits:
  """Makes logits(params, reviews) -> float32 [n], in the reviews' order.

  Of C > 2 classes [n, C]. `forward` is what `make_forward` returned. `params`
  are replicated; reviews need no features, `annotate`, that of `Ngrams`, gives
  them. Each review goes through the model once; its logits do not depend on the
  number of devices, nor, as long as padding is masked, on its batch. Each
  process works on its own rows, and all get all logits. `progress` is told of
  each batch.
  """
  reading = Reading.of(config.data)
  size, share = batch_size(config), Share(*devices.share())
  own_rows = len(range(size)[share.rows(size)])

  def logits(params: Any, reviews: Reviews) -> np.ndarray:
    places: list[np.ndarray] = []
    computed: list[Any] = []
    done = 0
    if not reviews.features and reviews.linear is None:
      reviews = annotate(reviews)
    for rows, batch in eval_batches(reviews, size, reading, share):
      processes.report_alive('evaluate')
      progress('evaluating', done, len(reviews))
      computed.append(forward(params, devices.shard(inputs(batch))))
      if places:  # waits for the batch before: the devices work on this one
        computed[-2] = np.asarray(computed[-2])
      places.append(rows)
      done += int((rows >= 0).sum())
    progress('evaluating', done, len(reviews))
    everywhere = devices.gather_rows(  # [batches, rows, C], C = 1 of [n]
        np.array([np.reshape(x, (own_rows, -1)) for x in computed]))
    result = np.empty((len(reviews), everywhere.shape[-1]), np.float32)
    for rows, values in zip(places, everywhere, strict=True):
      result[rows[rows >= 0]] = values[rows >= 0]
    return result[:, 0] if result.shape[1] == 1 else result

  return logits


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """Scores float logits against int labels [n].

  The logits are [n] of two classes, and [n, C] of C > 2. Returns loss: mean
  cross entropy in nats, added up in float64; accuracy: share of reviews that
  are `predicted` right; macro_f1, see `confusion`; n.
  """
  matrix = confusion_matrix(logits, labels)
  with np.errstate(invalid='ignore'):  # of infinite logits the mean is NaN
    losses = cross_entropies(logits.astype(np.float64), labels)
  return {'loss': float(losses.mean()),
          'accuracy': float(np.trace(matrix) / len(logits)),
          'macro_f1': confusion.macro_f1(matrix), 'n': len(logits)}


def share_error(p: float, n: float) -> float:
  """The standard error of an accuracy p of n reviews: sqrt(p (1 - p) / n)."""
  return math.sqrt(p * (1 - p) / n)


def cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """float64 [n] nats, of logits and labels as `score` takes them."""
  if logits.ndim == 1:
    return np.logaddexp(0, logits) - logits * labels
  return scipy.special.logsumexp(logits, axis=1) - np.take_along_axis(
      logits, labels[:, None].astype(int), axis=1)[:, 0]


def predicted(logits: np.ndarray) -> np.ndarray:
  """The class, int [n], that each row of logits, [n] or [n, C], speaks for.

  It has the largest one, and is the first of equal ones; of two classes it is
  the second where the logit is above 0.
  """
  return (logits > 0).astype(int) if logits.ndim == 1 else logits.argmax(axis=1)


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """See `confusion`; logits and labels are as of `score`."""
  return confusion.matrix(
      predicted(logits), labels, 2 if logits.ndim == 1 else logits.shape[1])


def score_text(
    split: str, result: dict[str, float], what: str = 'reviews') -> str:
  """One line about what `score` returned, which is of so many of `what`."""
  return (f'{split}: loss {result["loss"]:.4f}  accuracy '
          f'{result["accuracy"]:.4f}  on {result["n"]:,} {what}')


def evaluate_run(workdir: str, which: str | None, split: str,
                 introduce: Callable[[ConfigDict], None],
                 announce: Callable[[str], None],
                 progress: ShowProgress = show_nothing) -> None:
  """Tells the scores of a run directory on a split, one of `SPLITS`.

  `introduce` is told the run's config before anything takes time, `announce`
  the rest, and `progress` of what takes long. `which` and errors as of
  `run.restore`, and of `load_splits`.
  """
  processes.report_alive('restore')
  restored = run.restore(workdir, which)
  introduce(restored.config)
  processes.report_alive('load')
  reviews = load_splits(
      restored.config, restored.tokenizer, announce, [split],
      len(restored.labels), progress)[split]
  processes.check_same('checkpoint', lambda: classifier.params_sha256(
      devices.to_host(restored.params)))
  processes.check_same(
      'tokenizer or data',
      lambda: f'{restored.tokenizer.to_str()} {reviews_sha256(reviews)}')
  compiled = CompileClock(
      lambda: processes.report_alive('compile'), progress)
  logits = make_logits(
      restored.config, compiled.wrap(forward_of(restored)),
      restored.ngrams.annotate, progress)(restored.params, reviews)
  announce(f'step {restored.step}{compiled.take()}')
  announce(score_text(split, score(logits, reviews.labels)))
  if len(restored.labels) > 2:
    announce(confusion.table(
        confusion_matrix(logits, reviews.labels), restored.labels))
