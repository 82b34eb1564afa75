"""What a step minimises, and its gradient.

Of reviews with a label their cross entropy, also with the worst small change of
the input. Of those without how undecided the prediction is, and of all how far
a small change moves it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from flax_imdb.model import classifier
from flax_imdb.model.classifier import ADVERSARIAL, Params

# The norm of the change at which `loss_and_gradient` looks where the prediction
# moves the most; as in the code of Miyato, Dai & Goodfellow, and of Sachan.
XI = 0.1
_NOISE = 5  # a kind of draw; those of dropout, in `classifier`, come before


def loss_and_gradient(
    config: ConfigDict, model: classifier.SentimentClassifier, params: Params,
    batch: dict[str, jax.Array], keys_B: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, Params]:
  """Sums over the reviews of a batch, each times its weight.

  The batch is one of `batches.TrainBatches`; a label below 0 stands for none.
  `keys_B` are PRNG keys for dropout, the same in all passes. Of the reviews
  with a label it returns the cross entropy in nats, how many are on the right
  side, and how many they are; float32 [] each. And the gradient of
  `_cross_entropy`, and by the weights and norms of the config of

  - the same with a change added to the embedded input of each review, along the
    gradient of its loss (Miyato, Dai & Goodfellow 2017, equation 2);
  - `_divergence` for a change along its own gradient at one of norm `XI` in a
    random direction (the same, equations 3 and 4: one power iteration);
  - `_entropy`.

  The changes, and the prediction that the second is moved away from, are held
  constant. Embeddings are not normalised, as they are there.
  """
  inputs = classifier.inputs(batch)

  def logits(params: Params, change: dict[str, Any]) -> Any:
    return model.apply(
        {'params': params} | change, **inputs, dropout_keys_B=keys_B)

  def unchanged(params: Params, change: dict[str, Any]):
    logits_B = logits(params, change)
    loss = total = _cross_entropy(config, batch, logits_B)
    if config.entropy_weight:
      total = loss + config.entropy_weight * _entropy(batch, logits_B)
    return total, (loss, logits_B)

  def changed(params: Params, change: dict[str, Any]):
    return _cross_entropy(config, batch, logits(params, change))

  def moved(params: Params, change: dict[str, Any]):
    return _divergence(batch, logits_B, logits(params, change))

  def add(weight: float, term: Any, norm: float, slope: dict[str, Any]):
    change = jax.tree.map(lambda x: norm * _unit(x, batch), slope)
    return jax.tree.map(lambda g, h: g + weight * h, gradient,
                        jax.grad(term)(params, change))

  noise_TSE = jnp.zeros((*batch['ids'].T.shape, model.embedding_dim))
  change = {ADVERSARIAL: {'x': noise_TSE}} if config.adversarial_norm else {}
  # The entropy is of other reviews, so `slope` is that of the cross entropy.
  (_, (loss, logits_B)), (gradient, slope) = jax.value_and_grad(
      unchanged, argnums=(0, 1), has_aux=True)(params, change)
  if config.adversarial_norm:
    gradient = add(config.adversarial_weight, changed,
                   config.adversarial_norm, slope)
  if config.virtual_adversarial_norm:
    start = XI * _unit(_noise(batch, keys_B, model.embedding_dim), batch)
    slope = jax.grad(moved, argnums=1)(params, {ADVERSARIAL: {'x': start}})
    gradient = add(config.virtual_adversarial_weight, moved,
                   config.virtual_adversarial_norm, slope)
  labelled_B = _labelled(batch)
  correct = (logits_B > 0) == (batch['labels'] > 0.5)
  return loss, jnp.vdot(correct, labelled_B), labelled_B.sum(), gradient


def _labelled(batch: dict[str, jax.Array]) -> jax.Array:
  """The weights [B] of reviews with a label, 0 for those without."""
  return jnp.where(batch['labels'] < 0, 0, batch['weights'])


def _cross_entropy(config: ConfigDict, batch: dict[str, jax.Array],
                   logits_B: jax.Array) -> jax.Array:
  """That of the labels, smoothed, over the reviews that have one; nats []."""
  targets_B = optax.smooth_labels(
      jnp.stack([1 - batch['labels'], batch['labels']], axis=-1),
      config.label_smoothing)[:, 1]
  losses_B = optax.sigmoid_binary_cross_entropy(logits_B, targets_B)
  return jnp.vdot(losses_B, _labelled(batch))


def _entropy(batch: dict[str, jax.Array], logits_B: jax.Array) -> jax.Array:
  """That of what is predicted, over the reviews without a label; nats [].

  Source: Grandvalet & Bengio 2005, equation 5: of a review with a label the
  class is known. Sachan et al. 2019 take the mean over those, too.
  """
  entropy_B = optax.sigmoid_binary_cross_entropy(
      logits_B, jax.nn.sigmoid(logits_B))
  return jnp.vdot(entropy_B, batch['weights'] - _labelled(batch))


def _divergence(batch: dict[str, jax.Array], logits_B: jax.Array,
                changed_B: jax.Array) -> jax.Array:
  """KL(p || q) over all reviews; nats []. The first is held constant.

  p and q are what is predicted by the logits before and after a change.
  """
  logits_B = jax.lax.stop_gradient(logits_B)
  p_B = jax.nn.sigmoid(logits_B)
  divergence_B = (optax.sigmoid_binary_cross_entropy(changed_B, p_B)
                  - optax.sigmoid_binary_cross_entropy(logits_B, p_B))
  return jnp.vdot(divergence_B, batch['weights'])


def _noise(batch: dict[str, jax.Array], keys_B: jax.Array,
           features: int) -> jax.Array:
  """Normal numbers [T, S, features], 0 on padding.

  Of each segment by its own key, so that neither T nor the number of devices
  matters.
  """
  rows, length = batch['ids'].shape
  keys_S, _ = classifier.segment_keys(keys_B, batch.get('segments'), rows)
  def draw(key):
    return jax.random.normal(
        jax.random.fold_in(key, _NOISE), (length, features))
  inside_TS = jnp.arange(length)[:, None] < batch['lengths']
  return jnp.where(inside_TS[..., None],
                   jax.vmap(draw, out_axes=1)(keys_S), 0)


def _unit(x_TSE: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
  """A change of each review, all its segments together, at norm 1.

  One of norm 0 stays so.
  """
  segments_BK = batch.get('segments')
  square_S = jnp.sum(jnp.square(x_TSE), axis=(0, 2))
  if segments_BK is not None:
    square_B = square_S.at[segments_BK].get(
        mode='fill', fill_value=0).sum(axis=1)
    square_S = square_B[classifier.owners(segments_BK, len(square_S))[0]]
  return x_TSE * jax.lax.rsqrt(square_S + 1e-24)[:, None]
