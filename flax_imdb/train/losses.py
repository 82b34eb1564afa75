"""What a step minimises, and its gradient.

Of reviews with a label the cross entropy, also with the worst small change of
the input. Of those without how undecided the prediction is, and of all how far
a small change moves it.

B are reviews, C classes. Logits are [B] of two classes, and [B, C] of more.
"""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax

from flax_imdb.model import classifier
from flax_imdb.model.classifier import ADVERSARIAL, Params

# As in the code of Miyato, Dai & Goodfellow 2017 and of Sachan et al. 2019.
XI = 0.1
_NOISE = 5  # a kind of draw; those of dropout, in `classifier`, come before


def loss_and_gradient(
    config: ConfigDict, model: classifier.SentimentClassifier, params: Params,
    batch: dict[str, jax.Array], keys_B: jax.Array,
    class_weights: np.ndarray | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, Params]:
  """Sums over the reviews of a batch, each times its weight.

  The batch is one of `batches.TrainBatches`, where a label below 0 stands for
  none; `keys_B` are PRNG keys for dropout, which is the same in all passes.
  `class_weights` are those of `classes.weights`.

  Returns of the reviews with a label the loss, `_cross_entropy`, in nats, how
  many are on the right side, and how many they are, float32 [] each; in these
  each counts 1. And the gradient of that loss, in which each counts what its
  class does, plus, each times its weight of the config,

  - the loss with a change added to the embedded input of each review, along its
    gradient;
  - `_divergence` by a change along its gradient in turn, taken at a random
    change of norm `XI`, for at none it is 0;
  - `_entropy`.

  The changes have the norms of the config, and their gradient counts as a
  constant. Source: Miyato, Dai & Goodfellow 2017, section 3 (without their
  normalised embeddings), with one power iteration.
  """
  inputs = classifier.inputs(batch)

  def logits(params: Params, change: dict[str, Any]) -> Any:
    return model.apply(
        {'params': params} | change, **inputs, dropout_keys_B=keys_B)

  labelled_B = counted_B = _labelled(batch)
  targets_BC = _targets(batch, model.class_count)
  if class_weights is not None:
    counted_B *= targets_BC @ class_weights.astype(np.float32)

  def plain(params: Params, change: dict[str, Any]):
    found = logits(params, change)
    losses_B = _cross_entropy(config, targets_BC, found)
    loss = total = jnp.vdot(losses_B, labelled_B)
    if class_weights is not None:
      total = jnp.vdot(losses_B, counted_B)
    if config.entropy_weight:
      total += config.entropy_weight * _entropy(batch, found)
    return total, (loss, found)

  def adversarial(params: Params, change: dict[str, Any]):
    return jnp.vdot(_cross_entropy(
        config, targets_BC, logits(params, change)), counted_B)

  def virtual(params: Params, change: dict[str, Any]):
    return _divergence(batch, predicted, logits(params, change))

  change = {ADVERSARIAL: {'x': jnp.zeros(
      (*batch['ids'].T.shape, model.embedding_dim))}}
  (_, (loss, predicted)), (gradient, slope) = jax.value_and_grad(
      plain, argnums=(0, 1), has_aux=True)(
          params, change if config.adversarial_norm else {})
  if config.adversarial_norm:
    # Of reviews with a label, which `_entropy` leaves alone.
    change = _along(slope, config.adversarial_norm, batch)
    gradient = _plus(gradient, config.adversarial_weight,
                     jax.grad(adversarial)(params, change))
  if config.virtual_adversarial_norm:
    noise = {ADVERSARIAL: {'x': _noise(batch, keys_B, model.embedding_dim)}}
    slope = jax.grad(virtual, argnums=1)(params, _along(noise, XI, batch))
    change = _along(slope, config.virtual_adversarial_norm, batch)
    gradient = _plus(gradient, config.virtual_adversarial_weight,
                     jax.grad(virtual)(params, change))
  if model.class_count == 2:
    correct_B = (predicted > 0) == (batch['labels'] > 0.5)
  else:
    correct_B = predicted.argmax(axis=-1) == targets_BC.argmax(axis=-1)
  return loss, jnp.vdot(correct_B, labelled_B), labelled_B.sum(), gradient


def _plus(gradient: Params, weight: float, further: Params) -> Params:
  return jax.tree.map(lambda g, h: g + weight * h, gradient, further)


def _labelled(batch: dict[str, jax.Array]) -> jax.Array:
  """The weights [B] of reviews with a label, 0 for those without."""
  labels = batch['labels']
  unknown_B = (labels if labels.ndim == 1 else labels.min(axis=-1)) < 0
  return jnp.where(unknown_B, 0, batch['weights'])


def _targets(batch: dict[str, jax.Array], class_count: int) -> jax.Array:
  """float32 [B, C], the probability of each class; any where there is none."""
  labels = batch['labels']
  if class_count == 2:
    return jnp.stack([1 - labels, labels], axis=-1)
  return labels if labels.ndim == 2 else jax.nn.one_hot(
      labels.astype(int), class_count)


def _cross_entropy(config: ConfigDict, targets_BC: jax.Array,
                   logits: jax.Array) -> jax.Array:
  """[B] nats, of the labels once smoothed; means nothing without a label."""
  targets_BC = optax.smooth_labels(targets_BC, config.label_smoothing)
  return _between(logits, targets_BC[:, 1] if logits.ndim == 1 else targets_BC)


def _between(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """[B] the cross entropy of what logits predict, given targets like them."""
  if logits.ndim == 1:
    return optax.sigmoid_binary_cross_entropy(logits, targets)
  return optax.softmax_cross_entropy(logits, targets)


def _probabilities(logits: jax.Array) -> jax.Array:
  """What logits predict, as `_between` takes it."""
  return jax.nn.sigmoid(logits) if logits.ndim == 1 else jax.nn.softmax(logits)


def _entropy(batch: dict[str, jax.Array], logits: jax.Array) -> jax.Array:
  """That of what is predicted, over the reviews without a label; nats [].

  Source: Grandvalet & Bengio 2005, for whom a review with a label has none.
  The code of Sachan et al. 2019 takes that of both.
  """
  entropy_B = _between(logits, _probabilities(logits))
  return jnp.vdot(entropy_B, batch['weights'] - _labelled(batch))


def _divergence(batch: dict[str, jax.Array], logits: jax.Array,
                changed: jax.Array) -> jax.Array:
  """KL(p || q) over all reviews; nats []. The first is held constant.

  p and q are what is predicted by the logits before and after a change.
  """
  logits = jax.lax.stop_gradient(logits)
  p = _probabilities(logits)
  divergence_B = _between(changed, p) - _between(logits, p)
  return jnp.vdot(divergence_B, batch['weights'])


def _noise(batch: dict[str, jax.Array], keys_B: jax.Array,
           features: int) -> jax.Array:
  """Normal numbers [T, S, features], 0 on padding.

  Of each segment by its own key: neither T nor the number of devices matters.
  """
  rows, length = batch['ids'].shape
  keys_S, _ = classifier.segment_keys(keys_B, batch.get('segments'), rows)
  def draw(key):
    return jax.random.normal(
        jax.random.fold_in(key, _NOISE), (length, features))
  inside_TS = jnp.arange(length)[:, None] < batch['lengths']
  return jnp.where(inside_TS[..., None],
                   jax.vmap(draw, out_axes=1)(keys_S), 0)


def _along(change: dict[str, Any], norm: float,
           batch: dict[str, jax.Array]) -> dict[str, Any]:
  """The same directions, at that norm in each review; where it is 0 it stays.

  The norm is of all its segments together.
  """
  segments_BK = batch.get('segments')
  def scaled(x_TSE):
    square_S = jnp.sum(jnp.square(x_TSE), axis=(0, 2))
    if segments_BK is not None:
      square_B = square_S.at[segments_BK].get(
          mode='fill', fill_value=0).sum(axis=1)
      square_S = square_B[classifier.owners(segments_BK, len(square_S))[0]]
    return norm * (x_TSE * jax.lax.rsqrt(square_S + 1e-24)[:, None])
  return jax.tree.map(scaled, change)
