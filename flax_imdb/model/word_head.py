"""The head of a language model: how well words go beside what was read.

Shapes as in `classifier`; D directions, N negatives, V words.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from flax_imdb.data.tokenizer import PADDING_ID, START_ID, UNKNOWN_ID

# Words that are compared with the true one, the same for a whole batch.
NEGATIVES = 512


class WordHead(nn.Module):
  """Scores words by a projection of each state, and by how frequent they are.

  The output weights are the embedding (Inan, Khosravi & Socher 2017), of which
  both directions have a projection of their own (as Peters et al. 2018).
  """
  directions: tuple[str, ...]

  @nn.compact
  def __call__(self, h_TSF: jax.Array, targets_DTS: jax.Array,
               negatives_N: jax.Array,
               table_VE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes logits of words: float32 [D, T, S] and [D, T, S, N].

    The first are of the `targets`, int32, one a state, the others of
    `negatives`, int32. The states of all directions are joined in F features.
    Before it has learned anything, the softmax is `log_share`.
    """
    vocab_size, features = table_VE.shape
    bias_V = self.param('bias', lambda key: log_share(
        jnp.arange(vocab_size), vocab_size))
    expected_DTSE = jnp.stack([
        nn.Dense(features, use_bias=False, name=direction,
                 kernel_init=nn.initializers.glorot_uniform())(h_TSH)
        for direction, h_TSH in zip(self.directions, jnp.split(
            h_TSF, len(self.directions), axis=-1), strict=True)])
    own_DTS = bias_V[targets_DTS] + jnp.sum(
        expected_DTSE * table_VE[targets_DTS], axis=-1)
    return own_DTS, bias_V[negatives_N] + jnp.dot(
        expected_DTSE, table_VE[negatives_N].T)


def targets(ids_ST: jax.Array, lengths_S: jax.Array,
            directions: tuple[str, ...]) -> jax.Array:
  """What each state is to predict: int32 [D, T, S], `PADDING_ID` for nothing.

  The next word forward and the word before backward, of the same segment. The
  start of a review is none, and padding predicts none.
  """
  ids_TS, t_T1 = ids_ST.T, jnp.arange(ids_ST.shape[1])[:, None]
  found = []
  for direction in directions:
    towards = 1 if direction == 'forward' else -1
    beside_TS, at_T1 = jnp.roll(ids_TS, -towards, axis=0), t_T1 + towards
    inside_TS = (t_T1 < lengths_S) & (0 <= at_T1) & (at_T1 < lengths_S)
    found.append(jnp.where(
        inside_TS & (beside_TS > START_ID), beside_TS, PADDING_ID))
  return jnp.stack(found)


def log_share(ids: jax.Array, vocab_size: int) -> jax.Array:
  """The logarithm of how often `draw` takes each of these ids; float32.

  Log-uniform by rank, as ids are: nearly Zipf's law. Ids that are no words, 0
  and 1, are given that of the first one, and never drawn.
  """
  rank = jnp.maximum(ids - UNKNOWN_ID, 0)
  return jnp.log(jnp.log1p(1 / (rank + 1)) / jnp.log(vocab_size - 1))


def draw(key: jax.Array, vocab_size: int) -> jax.Array:
  """Draws int32 [NEGATIVES] ids by `log_share`, with replacement.

  One from each of as many equal parts of the distribution: so the frequent
  words are always among them, as often as they should be.
  """
  parts = jnp.arange(NEGATIVES) + jax.random.uniform(key, (NEGATIVES,))
  rank = jnp.floor((vocab_size - 1.0) ** (parts / NEGATIVES)).astype(jnp.int32)
  return jnp.minimum(rank - 1 + UNKNOWN_ID, vocab_size - 1)
