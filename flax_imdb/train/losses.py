"""What a step minimises, and its gradient.

Cross entropy, and that with the worst small change of the input.
"""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from flax_imdb.model import classifier
from flax_imdb.model.classifier import ADVERSARIAL, Params


def loss_and_gradient(
    config: ConfigDict, model: classifier.SentimentClassifier, params: Params,
    batch: dict[str, jax.Array],
    keys_B: jax.Array) -> tuple[jax.Array, jax.Array, Params]:
  """Sums over the reviews of a batch, each times its weight.

  The batch is one of `batches.TrainBatches`; `keys_B` are PRNG keys for
  dropout. Returns the loss in nats, float32 []; the reviews on the right side,
  float32 []; and the gradient of that loss and, config.adversarial_weight
  times, of the same with `_worst` added to the embedded input.
  """
  targets_B = optax.smooth_labels(
      jnp.stack([1 - batch['labels'], batch['labels']], axis=-1),
      config.label_smoothing)[:, 1]
  inputs = classifier.inputs(batch)

  def summed_loss(params: Params, change: dict[str, Any]):
    logits_B: Any = model.apply(
        {'params': params} | change, **inputs, dropout_keys_B=keys_B)
    losses = optax.sigmoid_binary_cross_entropy(logits_B, targets_B)
    correct = (logits_B > 0) == (batch['labels'] > 0)
    return jnp.vdot(losses, batch['weights']), jnp.vdot(
        correct, batch['weights'])

  if not config.adversarial_norm:
    (loss, correct), gradient = jax.value_and_grad(
        summed_loss, has_aux=True)(params, {})
    return loss, correct, gradient
  rows, length = batch['ids'].shape
  none = jnp.zeros((length, rows, model.embedding_dim))
  (loss, correct), (gradient, change) = jax.value_and_grad(
      summed_loss, argnums=(0, 1), has_aux=True)(
          params, {ADVERSARIAL: {'x': none}})
  change = jax.tree.map(lambda x: config.adversarial_norm * _worst(
      x, batch.get('segments')), change)
  further, _ = jax.grad(summed_loss, has_aux=True)(params, change)
  return loss, correct, jax.tree.map(
      lambda g, h: g + config.adversarial_weight * h, gradient, further)


def _worst(gradient_TSE: jax.Array, segments_BK: jax.Array | None) -> jax.Array:
  """The change of norm 1 of each review that raises its loss the most.

  To first order, that is along its gradient, of all its segments together; 0
  where that is 0. Source: Miyato, Dai & Goodfellow 2017, equation 2 (without
  their normalised embeddings).
  """
  square_S = jnp.sum(jnp.square(gradient_TSE), axis=(0, 2))
  if segments_BK is not None:
    square_B = square_S.at[segments_BK].get(
        mode='fill', fill_value=0).sum(axis=1)
    square_S = square_B[classifier.owners(segments_BK, len(square_S))[0]]
  return gradient_TSE * jax.lax.rsqrt(square_S + 1e-24)[:, None]
