"""Which words decided: the part that each word of a review has in its logit.

Integrated gradients: the input goes in a straight line from a baseline to the
review, and a feature's part is how far it went, times the mean gradient on the
way. All parts and the baseline's logit add up to the review's. Source:
Sundararajan, Taly & Yan 2017.

The baseline is a review of the same length that is all padding: no word, no
pair, log-odds of 0. Only its start is there, as in any review.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from flax_imdb.cluster import devices
from flax_imdb.data import batches, segments
from flax_imdb.data.ngrams import Ngrams
from flax_imdb.data.reading import ALONE, Batch, Reading
from flax_imdb.data.reviews import Reviews
from flax_imdb.data.tokenizer import PADDING_ID, START_ID
from flax_imdb.inference import evaluate
from flax_imdb.model import classifier
from flax_imdb.model.classifier import ADVERSARIAL, TABLE, Params

# Points of the line at which the gradient is taken, at the least.
_STEPS = 64
_ORDERS = 3  # words of the longest n-gram that is read at a token


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
  """Parts of a logit; of two classes positive ones speak for the second."""
  scores: np.ndarray  # float64 [words], of the tokens after the start
  baseline: float  # the logit of the baseline
  gap: float  # scores and baseline together, less the logit: 0 if exact


Explain = Callable[[Params, Reviews, np.ndarray], Explanation]


def make_explain(config: ConfigDict, model: classifier.SentimentClassifier,
                 ngrams: Ngrams) -> Explain:
  """Makes explain(params, review, logit) -> `Explanation`.

  `params` are replicated; the review is one, and needs no features; its logit
  float32 [], or [C] of C > 2 classes, is what `evaluate.make_logits` said, and
  of several it is that of the largest that is explained.

  What is read at a token of an n-gram, an embedding or a log-odds, belongs in
  equal parts to the n-gram's words, as do the weights of the linear model.
  """
  reading = Reading.of(config.data)
  count, _ = devices.share()
  steps = devices.fill_up(_STEPS)
  fractions = ((np.arange(steps) + 0.5) / steps).astype(np.float32)  # midpoints
  # No more at once than training keeps states of.
  forward = devices.data_parallel_forward(functools.partial(
      _integrate, model, config.data.log_odds_order,
      max(1, config.global_batch_size // count)))
  linear = model.linear_weight / (1 + model.linear_weight)

  def explain(params: Params, review: Reviews,
              logit: np.ndarray) -> Explanation:
    logits = np.atleast_1d(logit)
    column = int(logits.argmax())
    review = ngrams.annotate(review)
    batch = evaluate.inputs(_batch(review, reading))
    everywhere = batch | {'column': np.int32(column)}
    sums, baselines = forward(params, {
        name: np.broadcast_to(x, (count, *np.shape(x)))
        for name, x in everywhere.items()} | {
            'fractions': fractions.reshape(count, -1)})
    # Without jit there is no axis of devices.
    parts_OST = np.reshape(np.asarray(sums, np.float64), (
        -1, _ORDERS, *batch['ids'].shape)).sum(axis=0) / steps
    # Where each token is read, as if its id were its place.
    places = _batch(Reviews(
        np.arange(len(review.ids)), review.offsets, review.labels), reading)
    inside_ST = np.arange(places['ids'].shape[1]) < places['lengths'][:, None]
    parts = np.stack([np.bincount(
        places['ids'][inside_ST], part_ST[inside_ST], minlength=len(review.ids))
                      for part_ST in parts_OST])
    baseline = float(np.ravel(baselines)[0])
    if model.linear_weight:
      added = linear * ngrams.linear_parts(review)[..., column]
      parts[:len(added)] += added
      baseline += float(added[:, 0].sum())
    scores = _shared(parts)
    return Explanation(scores, baseline, float(
        scores.sum() + baseline - logits[column]))

  return explain


def _batch(review: Reviews, reading: Reading) -> Batch:
  """One review alone, in places for segments that are a power of two."""
  if not reading.segment_length:
    return batches.pad(review, np.arange(1), 1, reading)
  number = int(segments.counts(np.diff(review.offsets), reading)[0])
  size = min(1 << (number - 1).bit_length(), segments.most_segments(reading))
  return segments.pad(review, np.arange(1), 1, size, reading, ALONE)


def _integrate(
    model: classifier.SentimentClassifier, order: int, at_once: int,
    params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Sums of gradients along the line, times its length: float32 [O, S, T].

  The batch is the inputs of one review, `fractions` float32 [N] of the line, of
  which `at_once` are computed side by side, and `column` int32 [], the class. O
  are the words of what is read at the token, and log-odds are of up to `order`.
  Also returns float32 [], the logit at the line's beginning. Both are without
  the linear model's part, and the mean of the members, as in prediction.
  """
  inputs = classifier.inputs(batch)
  if 'linear' in inputs:
    inputs['linear'] = jnp.zeros_like(inputs['linear'])
  moves_ST1 = (inputs['ids'] != START_ID)[..., None]

  def of_member(params: Params) -> tuple[jax.Array, jax.Array]:
    table = params['embed']['embedding']
    lines_STE = [table[inputs['ids']] - table[PADDING_ID]]
    if model.bigram_rows:
      table = params[TABLE]['embedding']
      lines_STE.append(table[inputs['bigrams']] - table[0])
    lines_STE = [jnp.where(moves_ST1, line, 0) for line in lines_STE]

    def logit(change_STE: jax.Array, log_odds: dict[str, jax.Array]):
      found = model.apply(
          {'params': params,
           ADVERSARIAL: {'x': jnp.swapaxes(change_STE, 0, 1)}},
          **inputs | log_odds)
      return jnp.atleast_1d(found[0])[batch['column']]

    def at(fraction: jax.Array):
      change_STE = (fraction - 1) * sum(lines_STE)
      return change_STE, {
          name: jnp.where(moves_ST1, fraction, 1) * inputs[name]
          for name in ('log_odds',) if name in inputs}

    def parts_OST(fraction: jax.Array) -> jax.Array:
      slope_STE, slopes = jax.grad(logit, argnums=(0, 1))(*at(fraction))
      parts = [jnp.sum(slope_STE * line, axis=-1) for line in lines_STE]
      parts += [jnp.zeros_like(parts[0])] * (_ORDERS - len(parts))
      if 'log_odds' in slopes:
        moved = jnp.where(moves_ST1, slopes['log_odds'] * inputs['log_odds'], 0)
        of_order = jnp.split(moved, order, axis=-1)
        for i, features in enumerate(of_order):
          parts[i] += jnp.sum(features, axis=-1)
      return jnp.stack(parts)

    sums = jax.lax.map(parts_OST, batch['fractions'], batch_size=min(
        at_once, len(batch['fractions']))).sum(axis=0)
    return sums, logit(*at(jnp.float32(0)))

  sums, baseline = classifier.each_member(model, of_member)(params)
  if model.members > 1:
    return sums.mean(axis=0), baseline.mean(axis=0)
  return sums, baseline


def _shared(parts: np.ndarray) -> np.ndarray:
  """float64 [O, tokens] of n-grams that end there -> [tokens - 1] of words.

  Each word of an n-gram has as much. The start, which is none, has nothing.
  """
  scores = np.zeros(parts.shape[1])
  place = np.arange(len(scores))
  for order, row in enumerate(parts, 1):
    each = row / np.clip(place, 1, order)
    for back in range(order):
      scores[:max(0, len(scores) - back)] += each[back:]
  return scores[1:]
