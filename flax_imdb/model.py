"""The classifier: Embed -> recurrent layers -> pooling -> Dense -> logit.

Shapes: B reviews, T tokens (padding included), E embedding_dim, H width.
"""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flax_imdb.recurrent import RecurrentLayer
from flax_imdb.tokenizer import START_ID
from flax_imdb.tokenizer import UNKNOWN_ID


class SentimentClassifier(nn.Module):
  """Token ids in, one logit a review out.

  Attributes: the fields of `config.model` in `configs/default.py`, and
    vocab_size, the number of token ids.
  """
  vocab_size: int
  embedding_dim: int
  cell: str
  width: int
  layers: int
  bidirectional: bool
  pooling: str
  hidden_dim: int
  word_dropout: float
  embedding_dropout: float
  pooled_dropout: float
  mask_padding: bool
  remat: bool
  dtype: str

  @nn.compact
  def __call__(self, ids_BT: jax.Array, lengths_B: jax.Array,
               dropout_keys_B: jax.Array | None = None) -> jax.Array:
    """Computes the logits.

    Args:
      ids_BT: int32 [B, T] token ids, padded at the end.
      lengths_B: int32 [B] tokens of each review, 1 to T.
      dropout_keys_B: one PRNG key a review, or None for no dropout. A row's
        masks depend on its own key alone, neither on B nor on T.

    Returns:
      float32 [B] logits; positive means a positive review.
    """
    if dropout_keys_B is not None and self.word_dropout:
      keep = _keep(dropout_keys_B, 0, self.word_dropout, ids_BT.shape[1:])
      ids_BT = jnp.where(keep | (ids_BT <= START_ID), ids_BT, UNKNOWN_ID)
    x_TBE = nn.Embed(
        self.vocab_size, self.embedding_dim, name='embed',
        embedding_init=nn.initializers.glorot_uniform())(ids_BT.T)
    if dropout_keys_B is not None and self.embedding_dropout:
      keep = _keep(dropout_keys_B, 1, self.embedding_dropout, x_TBE.shape[2:])
      x_TBE = jnp.where(keep, x_TBE / (1 - self.embedding_dropout), 0)

    x_TBE = self.perturb('x', x_TBE)

    directions = ('forward', 'backward') if self.bidirectional else ('forward',)
    for layer in range(self.layers):
      states = [
          RecurrentLayer(
              self.cell, self.width, jnp.dtype(self.dtype), self.mask_padding,
              reverse=direction == 'backward', remat=self.remat,
              name=f'{direction}_{layer}')(x_TBE, lengths_B)
          for direction in directions]
      x_TBE = jnp.concatenate([h_TBH for h_TBH, _ in states], axis=-1)
    pooled_BF = self._pool(states, lengths_B)
    if dropout_keys_B is not None and self.pooled_dropout:
      keep = _keep(dropout_keys_B, 2, self.pooled_dropout, pooled_BF.shape[1:])
      pooled_BF = jnp.where(keep, pooled_BF / (1 - self.pooled_dropout), 0)

    # In float32: bfloat16 would round logits to 8 bits, and save nothing here.
    dense = functools.partial(
        nn.Dense, kernel_init=nn.initializers.glorot_uniform())
    hidden = nn.relu(dense(self.hidden_dim, name='hidden')(pooled_BF))
    logits_B1 = dense(1, name='logit')(hidden)
    return logits_B1[:, 0]

  def _pool(self, states: list[tuple[jax.Array, jax.Array]],
            lengths_B: jax.Array) -> jax.Array:
    """Sums up what `RecurrentLayer` returned a direction, as [B, features]."""
    length = states[0][0].shape[0]
    if not self.mask_padding:
      lengths_B = jnp.full_like(lengths_B, length)
    inside_TB1 = (jnp.arange(length)[:, None] < lengths_B)[..., None]
    pooled = []
    for kind in self.pooling.split('+'):
      for h_TBH, last_BH in states:
        if kind == 'last':
          pooled.append(last_BH)
        elif kind == 'mean':
          total = jnp.sum(h_TBH, axis=0, where=inside_TB1)
          # XLA makes a division into this product, or does not, by what is
          # around it: an export would round otherwise than predict.
          pooled.append(total * (1 / lengths_B)[:, None])
        else:
          pooled.append(jnp.max(h_TBH, axis=0, where=inside_TB1, initial=-1))
    return jnp.concatenate(pooled, axis=-1)


def _keep(keys_B: jax.Array, kind: int, rate: float, shape: tuple[int, ...]):
  """Draws bool [B, *shape], False with probability `rate`."""
  def row(key):
    return jax.random.bernoulli(jax.random.fold_in(key, kind), 1 - rate, shape)
  return jax.vmap(row)(keys_B)


def build(config: ConfigDict) -> SentimentClassifier:
  """Makes the model that `config` describes; holds no arrays."""
  return SentimentClassifier(
      vocab_size=config.data.vocab_size, **config.model.to_dict())


def init(model: SentimentClassifier, key: jax.Array) -> dict[str, Any]:
  """Draws the initial parameters, a nested dict of float32 arrays."""
  ids_BT = jnp.ones((1, 2), jnp.int32)
  return model.init(key, ids_BT, jnp.ones((1,), jnp.int32))['params']
