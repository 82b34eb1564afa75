"""The classifier: Embed -> recurrent layers -> pooling -> Dense -> logit.

Shapes: B reviews, T tokens (padding included), E embedding_dim, H width.
"""

import functools
import hashlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from flax_imdb.data.tokenizer import START_ID, UNKNOWN_ID
from flax_imdb.errors import UserError
from flax_imdb.model.recurrent import RecurrentLayer

# Numbers in float32, so 1 GiB and 8 GiB, for a config.json may be a stranger's;
# configs/default.py has 1 million parameters, and 6 million states in a batch.
MOST_PARAMETERS = 1 << 28
_MOST_STATES = 1 << 31

Params = dict[str, Any]


class SentimentClassifier(nn.Module):
  """Token ids in, one logit a review out; see configs/default.py, `model`."""
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

  @property
  def directions(self) -> tuple[str, ...]:
    """The names of the directions in which each layer reads."""
    return ('forward', 'backward') if self.bidirectional else ('forward',)

  @nn.compact
  def __call__(self, ids_BT: jax.Array, lengths_B: jax.Array,
               dropout_keys_B: jax.Array | None = None) -> jax.Array:
    """Computes float32 [B] logits; positive means a positive review.

    Takes int32 [B, T] ids, padded at the end, int32 [B] tokens of each review,
    1 to T, and a PRNG key a review, or None for no dropout: a row's masks
    depend on its own key alone, neither on B nor on T.
    """
    if dropout_keys_B is not None and self.word_dropout:
      keep = _keep(dropout_keys_B, 0, self.word_dropout, ids_BT.shape[1:])
      ids_BT = jnp.where(keep | (ids_BT <= START_ID), ids_BT, UNKNOWN_ID)
    x_TBE = nn.Embed(
        self.vocab_size, self.embedding_dim, name='embed',
        embedding_init=nn.initializers.glorot_uniform())(ids_BT.T)
    x_TBE = _dropout(x_TBE, dropout_keys_B, 1, self.embedding_dropout)
    x_TBE = self.perturb('x', x_TBE)

    for layer in range(self.layers):
      states = [RecurrentLayer(
          self.cell, self.width, jnp.dtype(self.dtype), self.mask_padding,
          reverse=direction == 'backward', remat=self.remat,
          name=f'{direction}_{layer}')(x_TBE, lengths_B)
                for direction in self.directions]
      x_TBE = jnp.concatenate([h_TBH for h_TBH, _ in states], axis=-1)
    pooled_BF = self._pool(states, lengths_B)
    pooled_BF = _dropout(pooled_BF, dropout_keys_B, 2, self.pooled_dropout)

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


def _dropout(x: jax.Array, keys_B: jax.Array | None, kind: int, rate: float):
  """Drops features of [..., B, features], the same at all time steps."""
  if keys_B is None or not rate:
    return x
  return jnp.where(_keep(keys_B, kind, rate, x.shape[-1:]), x / (1 - rate), 0)


def build_model(config: ConfigDict) -> SentimentClassifier:
  """Makes the model that `config` describes; holds no arrays.

  Raises UserError if its parameters, or the states of a batch, are too many.
  """
  model = SentimentClassifier(
      vocab_size=config.data.vocab_size, **config.model.to_dict())
  if (count := parameter_count(param_shapes(model))) > MOST_PARAMETERS:
    raise UserError(
        f'the config asks for {count:,} parameters, more than '
        f'{MOST_PARAMETERS:,}: lower config.data.vocab_size, '
        'config.model.embedding_dim, width, layers or hidden_dim')
  states = config.global_batch_size * config.data.max_length * (
      model.embedding_dim + len(model.directions) * model.width)
  if states > _MOST_STATES:
    raise UserError(
        f'a batch of this config takes {states:,} numbers, more than '
        f'{_MOST_STATES:,}: lower config.global_batch_size, '
        'config.data.max_length, config.model.embedding_dim or width')
  return model


def seed_keys(seed: int) -> jax.Array:
  """The keys [2] of a run: of its initial parameters, and of its dropout."""
  return jax.random.split(jax.random.key(seed))


def init_params(model: SentimentClassifier, key: jax.Array) -> Params:
  """Draws the initial parameters, a nested dict of float32 arrays."""
  ids_BT = jnp.ones((1, 2), jnp.int32)
  return model.init(key, ids_BT, jnp.ones((1,), jnp.int32))['params']


@functools.lru_cache(maxsize=1)
def param_shapes(model: SentimentClassifier) -> Params:
  """`init_params` as `jax.ShapeDtypeStruct`s: nothing is allocated."""
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def parameter_count(params: Params) -> int:
  """The number of floats in a tree of arrays, or of their shapes."""
  return sum(x.size for x in jax.tree.leaves(params))


def parameter_table(params: Params) -> str:
  """A line for each array, its shape and size, and their total."""
  rows = [(jax.tree_util.keystr(path, simple=True, separator='/'),
           ' x '.join(map(str, x.shape)), f'{x.size:,}')
          for path, x in jax.tree_util.tree_leaves_with_path(params)]
  rows.append(('parameters', '', f'{parameter_count(params):,}'))
  name, shape, size = (max(map(len, column)) for column in
                       zip(*rows, strict=True))
  return '\n'.join(f'{a:<{name}}  {b:<{shape}}  {c:>{size}}'
                   for a, b, c in rows)


def params_sha256(params: Params) -> str:
  """One string for a tree of arrays: equal if and only if all bytes are."""
  digest = hashlib.sha256()
  for x in jax.tree.leaves(params):  # by name
    digest.update(np.ascontiguousarray(x).tobytes())
  return digest.hexdigest()
