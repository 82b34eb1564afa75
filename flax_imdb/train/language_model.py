"""Pretraining: each word is predicted from those before, and from those after.

It needs no labels, and what it learns a run with labels may begin with, see
`run.initial_params` (Dai & Le 2015). The directions learn apart, each by a loss
of its own (Peters et al. 2018): together they would see the word.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from flax_imdb.cluster import devices, processes
from flax_imdb.data.batches import eval_batches
from flax_imdb.data.reading import Reading, Share
from flax_imdb.data.reviews import Reviews
from flax_imdb.data.tokenizer import START_ID
from flax_imdb.inference import evaluate
from flax_imdb.model import classifier, word_head
from flax_imdb.model.classifier import Params
from flax_imdb.terminal import ShowProgress, show_nothing

_LOWEST = -1e30  # of a logit that is left out; -inf would have no gradient


def loss_and_gradient(
    config: ConfigDict, model: classifier.SentimentClassifier, params: Params,
    batch: dict[str, jax.Array], keys_B: jax.Array, step: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, Params]:
  """Sums over the words that a batch of `batches.TrainBatches` predicts.

  Returns what `_sums` does, and the gradient of the loss. `keys_B` are PRNG
  keys for dropout; the negatives depend on config.seed and int32 [] `step`.
  """
  # Past the places of reviews, by which the keys for dropout are made.
  key = jax.random.fold_in(
      classifier.step_key(config.seed, step), config.global_batch_size)
  negatives = word_head.draw(key, model.vocab_size)
  def loss(params: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    total, correct, count = _sums(model, params, batch, negatives, keys_B)
    return total, (correct, count)
  (total, (correct, count)), gradient = jax.value_and_grad(
      loss, has_aux=True)(params)
  return total, correct, count, gradient


def _sums(model: classifier.SentimentClassifier, params: Params,
          batch: dict[str, jax.Array], negatives: jax.Array,
          keys_B: jax.Array | None = None,
          ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Loss in nats, how many words are found, how many there are; float32 [].

  Over the words of the batch and the directions. The loss is the cross entropy
  of a softmax over all words, but for its sum over these: it is that of the
  true word and an estimate of the rest by the negatives, each divided by how
  often it is drawn (Bengio & Senecal 2003, importance sampling; shared by a
  batch as in Jean et al. 2015). The estimate has no bias, and its logarithm is
  a little too low. A word is found if its logit is above all of the negatives:
  so more are than would be among all words.
  """
  logits: Any = model.apply(
      {'params': params}, **classifier.inputs(batch), negatives=negatives,
      dropout_keys_B=keys_B)
  own_DTS, others_DTSN = logits
  targets_DTS = word_head.targets(
      batch['ids'], batch['lengths'], model.directions)
  weights_S = batch['weights']
  if 'segments' in batch:
    weights_S = weights_S[
        classifier.owners(batch['segments'], len(batch['lengths']))[0]]
  weights_DTS = jnp.where(targets_DTS > START_ID, weights_S, 0)
  others_DTSN = jnp.where(
      targets_DTS[..., None] == negatives, _LOWEST, others_DTSN)
  expected = word_head.log_share(
      negatives, model.vocab_size) + math.log(len(negatives))
  log_sum_DTS = jnp.logaddexp(
      own_DTS, jax.nn.logsumexp(others_DTSN - expected, axis=-1))
  found_DTS = own_DTS > others_DTSN.max(axis=-1)
  return (jnp.vdot(log_sum_DTS - own_DTS, weights_DTS),
          jnp.vdot(found_DTS, weights_DTS), weights_DTS.sum())


def make_forward(model: classifier.SentimentClassifier,
                 others: Sequence[jax.Device] | None = None) -> Callable:
  """Makes forward(params, batch) -> float32 [devices, 3], of `_sums` each.

  The batch is one of `pad` after `devices.shard`, and the negatives are always
  the same; `others` are devices as in `devices.data_parallel`. Without jit [3].
  """
  def forward(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
    negatives = word_head.draw(jax.random.key(0), model.vocab_size)
    return jnp.stack(_sums(model, params, batch, negatives))
  return devices.data_parallel_forward(forward, others)


def make_sums(
    config: ConfigDict, forward: Callable,
    progress: ShowProgress = show_nothing,
    ) -> Callable[[Any, Reviews], np.ndarray]:
  """Makes sums(params, reviews) -> float64 [3], of `_sums` over all reviews.

  `forward` is what `make_forward` returned, `params` are replicated. Each
  process works on its own rows, and all get the same. `progress` is told of
  each batch.
  """
  reading = Reading.of(config.data)
  batch_size = evaluate.batch_size(config)

  def sums(params: Any, reviews: Reviews) -> np.ndarray:
    computed: list[Any] = []
    done = 0
    for rows, batch in eval_batches(
        reviews, batch_size, reading, Share(*devices.share())):
      processes.report_alive('evaluate')
      progress('evaluating', done, len(reviews))
      done += int((rows >= 0).sum())
      computed.append(forward(params, devices.shard(batch)))
      if len(computed) > 1:  # as in `evaluate.make_logits`
        computed[-2] = np.asarray(computed[-2])
    progress('evaluating', done, len(reviews))
    own = np.sum([np.reshape(x, (-1, 3)) for x in computed], axis=(0, 1),
                 dtype=np.float64)
    return devices.gather_rows(own[:, None]).sum(axis=1)

  return sums


def score(sums: np.ndarray) -> dict[str, float]:
  """Mean loss in nats, accuracy, and n of which they are; see `_sums`."""
  loss, correct, count = sums.tolist()
  return {'loss': loss / count, 'accuracy': correct / count, 'n': round(count)}
