"""The classifier: Embed -> recurrent layers -> pooling -> Dense -> logit.

Shapes: B reviews, S segments of reviews, T tokens (padding included), E
embedding_dim, H width. Without segments each review is one, and S is B. Logits
are [B] of two classes, and [B, C] of C > 2.
"""

from collections.abc import Callable
import functools
import hashlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from flax_imdb.data import classes
from flax_imdb.data.tokenizer import START_ID, UNKNOWN_ID
from flax_imdb.errors import UserError
from flax_imdb.model import counted_loop, forms, word_head
from flax_imdb.model.recurrent import RecurrentLayer, Summary

# Numbers in float32, so 1 GiB and 8 GiB, for a config.json may be a stranger's;
# configs/default.py has 7 million parameters, and 25 million in a batch.
MOST_PARAMETERS = 1 << 28
_MOST_STATES = 1 << 31

Params = dict[str, Any]

_INPUTS = ('ids', 'lengths', 'segments', 'bigrams', 'log_odds', 'linear')
# The embedding of which a step reads and changes a few rows.
TABLE = 'bigrams'
# The collection in which a change of the embedded input is passed, as 'x'.
ADVERSARIAL = 'adversarial'


class SentimentClassifier(nn.Module):
  """Token ids in, logits of a review out; see configs/default.py, `model`.

  Or, of the objective language_model, logits of words: another head on the same
  layers. This is one of the `members`, whose parameters have an axis of them in
  front; see `each_member`.
  """
  class_count: int
  vocab_size: int
  bigram_rows: int  # of the embedding of pairs; 0 without
  log_odds_features: int  # numbers a token; 0 without
  embedding_dim: int
  members: int
  cell: str
  width: int
  layers: int
  linear_weight: float  # of a linear model's logit; 0 without
  bidirectional: bool
  pooling: str
  hidden_dim: int
  word_dropout: float
  bigram_dropout: float
  log_odds_dropout: float
  embedding_dropout: float
  pooled_dropout: float
  mask_padding: bool
  remat: bool
  dtype: str
  objective: str
  recurrence: str = 'scan'  # a form of `forms.py`
  # Of the layer that is pooled. What is only predicted needs none of them: its
  # memory does not grow with T * S * H.
  keep_states: bool = True

  @property
  def directions(self) -> tuple[str, ...]:
    """The names of the directions in which each layer reads."""
    return ('forward', 'backward') if self.bidirectional else ('forward',)

  @nn.compact
  def __call__(self, ids: jax.Array, lengths: jax.Array,
               segments: jax.Array | None = None,
               bigrams: jax.Array | None = None,
               log_odds: jax.Array | None = None,
               linear: jax.Array | None = None,
               negatives: jax.Array | None = None,
               dropout_keys_B: jax.Array | None = None) -> Any:
    """Computes float32 [B] logits; positive means a positive review.

    That is one of the second of two classes; of more [B, C], of each class. Of
    the objective language_model what `WordHead` returns.

    Args:
      ids: int32 [S, T], padded at the end.
      lengths: int32 [S] tokens of each segment, up to T.
      segments: int32 [B, K], the segments of each review, S for none; None
        where each review is one, which then has a token at least.
      bigrams: int32 [S, T], if the model has `bigram_rows`.
      log_odds: float32 [S, T, log_odds_features], if it has some.
      linear: float32 logits of a linear model, [B] or [B, C], if it has a
        weight: where there is no dropout, what is returned is the mean of both.
      negatives: int32 [N], the words that a language model compares with.
      dropout_keys_B: a PRNG key a review, or None for no dropout: a review's
        masks depend on its own key alone, neither on B nor on T.
    """
    own_S, review_S = segment_keys(dropout_keys_B, segments, lengths.shape[0])
    words = ids  # of which some may not be read
    if own_S is not None and self.word_dropout:
      keep = _keep(own_S, 0, self.word_dropout, ids.shape[1:])
      ids = jnp.where(keep | (ids <= START_ID), ids, UNKNOWN_ID)
    embed = nn.Embed(
        self.vocab_size, self.embedding_dim, name='embed',
        embedding_init=nn.initializers.glorot_uniform())
    x_TSE = embed(ids.T)
    if self.bigram_rows:
      assert bigrams is not None
      pairs_TSE = nn.Embed(
          self.bigram_rows, self.embedding_dim, name=TABLE,
          embedding_init=nn.initializers.zeros)(bigrams.T)
      if own_S is not None and self.bigram_dropout:
        keep = _keep(own_S, 3, self.bigram_dropout, bigrams.shape[1:])
        pairs_TSE = jnp.where(
            keep.T[..., None], pairs_TSE / (1 - self.bigram_dropout), 0)
      x_TSE += pairs_TSE
    x_TSE = _dropout(x_TSE, review_S, 1, self.embedding_dropout)
    x_TSE = self.perturb('x', self.perturb('x', x_TSE), ADVERSARIAL)
    if self.log_odds_features:
      assert log_odds is not None
      if own_S is not None and self.log_odds_dropout:
        keep = _keep(own_S, 4, self.log_odds_dropout, log_odds.shape[1:])
        log_odds = jnp.where(keep, log_odds, 0)
      x_TSE = jnp.concatenate([x_TSE, jnp.swapaxes(log_odds, 0, 1)], axis=-1)

    read_S = lengths if self.mask_padding else jnp.full_like(
        lengths, ids.shape[1])
    for layer in range(self.layers - 1):
      x_TSE = self._states(layer, x_TSE, read_S)
    if self.objective == 'language_model':
      x_TSE = self._states(self.layers - 1, x_TSE, read_S)
      assert negatives is not None
      return word_head.WordHead(self.directions, name='words')(
          _dropout(x_TSE, review_S, 2, self.pooled_dropout),
          word_head.targets(words, lengths, self.directions), negatives,
          embed.embedding)
    pooled_BF = self._pool(
        self._summaries(self.layers - 1, x_TSE, read_S), read_S, segments)
    pooled_BF = _dropout(pooled_BF, dropout_keys_B, 2, self.pooled_dropout)

    # In float32: bfloat16 would round logits to 8 bits, and save nothing here.
    dense = functools.partial(
        nn.Dense, kernel_init=nn.initializers.glorot_uniform())
    if self.hidden_dim:
      pooled_BF = nn.relu(dense(self.hidden_dim, name='hidden')(pooled_BF))
    logits = dense(classes.columns(self.class_count), name='logit')(pooled_BF)
    if self.class_count == 2:
      logits = logits[:, 0]
    # Each learns alone, and errs in its own way; see data/linear.py.
    if self.linear_weight and dropout_keys_B is None:
      assert linear is not None
      logits = (logits + self.linear_weight * linear) / (
          1 + self.linear_weight)
    return logits

  def _states(self, layer: int, x_TSE: jax.Array,
              lengths_S: jax.Array) -> jax.Array:
    """The states of a layer, of all directions side by side."""
    return jnp.concatenate([h_TSH for h_TSH, _ in self._read(
        layer, x_TSE, lengths_S, keep_states=True)], axis=-1)

  def _summaries(self, layer: int, x_TSE: jax.Array, lengths_S: jax.Array
                 ) -> list[tuple[Summary, jax.Array]]:
    """Of the states of a layer, and the last of these, a direction each."""
    return [(h if isinstance(h, Summary) else Summary.of_states(h, lengths_S),
             last) for h, last in self._read(
                 layer, x_TSE, lengths_S, self.keep_states)]

  def _read(self, layer: int, x_TSE: jax.Array, lengths_S: jax.Array,
            keep_states: bool) -> list[tuple[Any, jax.Array]]:
    """What `RecurrentLayer` returns, a direction each, in the model's form.

    Some forms have all states, whether they are asked for or not.
    """
    names = [f'{direction}_{layer}' for direction in self.directions]
    reverse = [direction == 'backward' for direction in self.directions]
    dtype = jnp.dtype(self.dtype)
    if self.recurrence == 'scan' or self.is_initializing():
      return [RecurrentLayer(
          self.cell, self.width, dtype, self.mask_padding, reverse=backward,
          remat=self.remat, keep_states=keep_states, name=name)(
              x_TSE, lengths_S)
              for name, backward in zip(names, reverse, strict=True)]
    params = self.variables['params']
    weights = [params[name]['steps']['cell'] for name in names]
    if self.recurrence == 'loop' and not keep_states:
      return list(counted_loop.summaries(
          self.cell, weights, x_TSE, lengths_S, reverse=reverse, dtype=dtype))
    states = forms.recurrence(
        self.recurrence, self.cell, weights, x_TSE, lengths_S, reverse=reverse,
        dtype=dtype, remat=self.remat)
    # Past a review's end its last state repeats.
    return [(h_TSH, h_TSH[0 if backward else -1])
            for h_TSH, backward in zip(states, reverse, strict=True)]

  def _pool(self, summaries: list[tuple[Summary, jax.Array]],
            lengths_S: jax.Array,
            segments_BK: jax.Array | None = None) -> jax.Array:
    """Joins what pooling asks for of each direction, as [B, features]."""
    def of_reviews(x_S, fill):  # [S, ...] -> [B, K, ...]
      return x_S.at[segments_BK].get(mode='fill', fill_value=fill)
    tokens_B = lengths_S
    if segments_BK is not None:
      tokens_B = jnp.maximum(of_reviews(lengths_S, 0).sum(axis=1), 1)
    pooled = []
    for kind in self.pooling.split('+'):
      for summary, last in summaries:
        if kind == 'last':
          if segments_BK is not None:  # that of the last segment
            number = jnp.sum(segments_BK < lengths_S.shape[0], axis=1)
            last = last[jnp.take_along_axis(
                segments_BK, jnp.maximum(number - 1, 0)[:, None], axis=1)[:, 0]]
          pooled.append(last)
        elif kind == 'mean':
          total = summary.total
          if segments_BK is not None:
            total = of_reviews(total, 0).sum(axis=1)
          # XLA makes a division into this product, or does not, by what is
          # around it: an export would round otherwise than predict.
          pooled.append(total * (1 / tokens_B)[:, None])
        else:
          most = summary.most
          if segments_BK is not None:
            most = of_reviews(most, -1).max(axis=1)
          pooled.append(most)
    return jnp.concatenate(pooled, axis=-1)


def owners(segments_BK: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """The review of each segment, and which of its segments it is: int32 [S].

  `count` is S. A place that no review has is given to the first one.
  """
  def placed(x):
    x = jnp.broadcast_to(x, segments_BK.shape).astype(jnp.int32)
    return jnp.zeros(count, jnp.int32).at[segments_BK].set(x, mode='drop')
  rows, number = segments_BK.shape
  return placed(jnp.arange(rows)[:, None]), placed(jnp.arange(number))


def segment_keys(keys_B: jax.Array | None, segments_BK: jax.Array | None,
                 count: int) -> tuple[jax.Array | None, jax.Array | None]:
  """PRNG keys [S] of each segment: its own, and its review's; None without.

  `count` is S; without segments it is B.
  """
  if keys_B is None or segments_BK is None:
    return keys_B, keys_B
  review_S, number_S = owners(segments_BK, count)
  keys_S = keys_B[review_S]
  # Past the kinds of dropout, which are folded into a review's own key.
  return jax.vmap(jax.random.fold_in)(keys_S, 16 + number_S), keys_S


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


def inputs(batch: dict[str, Any]) -> dict[str, Any]:
  """What the model reads of a batch, by and in order of its arguments."""
  return {name: batch[name] for name in _INPUTS if name in batch}


def build_model(
    config: ConfigDict, class_count: int = 2) -> SentimentClassifier:
  """Makes the model that `config` describes, for so many classes.

  These are those of the data set, and no field. The model holds no arrays.
  Raises UserError if its parameters, or the states of a batch, are too many.
  """
  fields = config.model.to_dict()
  kinds = fields.pop('inputs').split('+')
  del fields['recurrence']  # of a device; see `for_device`
  model = SentimentClassifier(
      class_count=class_count, vocab_size=config.data.vocab_size,
      bigram_rows=config.data.bigrams if 'bigrams' in kinds else 0,
      log_odds_features=(
          config.data.log_odds_order * classes.columns(class_count)
          if 'log_odds' in kinds else 0),
      objective=config.objective,
      **fields | {'linear_weight': fields['linear_weight'] * (
          'linear' in kinds)})
  if (count := parameter_count(param_shapes(model))) > MOST_PARAMETERS:
    raise UserError(
        f'the config asks for {count:,} parameters, more than '
        f'{MOST_PARAMETERS:,}: lower config.data.vocab_size, '
        'config.data.bigrams, config.model.embedding_dim, width, layers or '
        'hidden_dim')
  of_direction = model.width + word_head.NEGATIVES * (
      model.objective == 'language_model')
  rows = max(config.global_batch_size, config.eval_batch_size)
  states = rows * config.data.max_length * (
      model.embedding_dim + model.log_odds_features
      + len(model.directions) * of_direction) * model.members
  if states > _MOST_STATES:
    raise UserError(
        f'a batch of this config takes {states:,} numbers, more than '
        f'{_MOST_STATES:,}: lower config.global_batch_size, '
        'config.eval_batch_size, config.data.max_length, '
        'config.model.embedding_dim, width or members')
  return model


def for_device(
    config: ConfigDict, model: SentimentClassifier, device: jax.Device,
    announce: Callable[[str], None] | None = None) -> SentimentClassifier:
  """The model in the form of config.model.recurrence; see `forms.choose`.

  Its parameters are the same, and what it computes but for rounding.
  """
  return model.clone(recurrence=forms.choose(
      config.model.recurrence, _layer(model), device, announce))


def to_predict(model: SentimentClassifier,
               device: jax.Device) -> SentimentClassifier:
  """The model that predicts the same on this device; see `forms.to_predict`.

  Of several layers a loop would keep the carries of all but the last; and where
  padding is read there is nothing to leave out, and the last digits are others.
  """
  if model.layers > 1 or not model.mask_padding:
    return model
  return model.clone(recurrence=forms.to_predict(model.recurrence, device))


def explain_form(config: ConfigDict, model: SentimentClassifier,
                 device: jax.Device) -> str:
  """One line on the form of a model of `for_device`, and why it has that."""
  return forms.explain(
      model.recurrence, config.model.recurrence, _layer(model), device)


def _layer(model: SentimentClassifier) -> forms.Layer:
  """The layer with the widest input."""
  below = len(model.directions) * model.width if model.layers > 1 else 0
  return forms.Layer(
      model.cell, model.width,
      max(model.embedding_dim + model.log_odds_features, below), model.dtype)


def each_member(model: SentimentClassifier,
                function: Callable[..., Any]) -> Callable[..., Any]:
  """Function(params, ...) of one member, for all: trees with their axis.

  One member is no axis.
  """
  return function if model.members == 1 else jax.vmap(function)


def predict(model: SentimentClassifier, params: Params,
            inputs: dict[str, Any]) -> jax.Array:
  """Computes float32 logits, the mean of those of the members.

  `inputs` are those of `SentimentClassifier`, by name. There is no gradient.
  """
  pooling = model.clone(keep_states=False)
  def logits(params: Params) -> Any:
    return pooling.apply({'params': params}, **inputs)
  found = each_member(model, logits)(params)
  return found if model.members == 1 else found.mean(axis=0)


def seed_keys(seed: int) -> jax.Array:
  """The keys [2] of a run: of its initial parameters, and of its dropout."""
  return jax.random.split(jax.random.key(seed))


def step_key(seed: int, step: jax.Array) -> jax.Array:
  """The key of int32 [] a step, of which all that it draws is made."""
  return jax.random.fold_in(seed_keys(seed)[1], step)


def dropout_keys(
    model: SentimentClassifier, seed: int, step: jax.Array,
    places_B: jax.Array) -> jax.Array:
  """A PRNG key for each review, by int32 [B] its place in the global batch.

  So dropout is the same on any number of devices. [members, B] of several.
  """
  def keys(key: jax.Array) -> jax.Array:
    return jax.vmap(lambda place: jax.random.fold_in(key, place))(places_B)
  return each_member(model, keys)(_member_keys(model, step_key(seed, step)))


def _member_keys(model: SentimentClassifier, key: jax.Array) -> jax.Array:
  return key if model.members == 1 else jax.random.split(key, model.members)


def init_params(model: SentimentClassifier, key: jax.Array) -> Params:
  """Draws the initial parameters, a nested dict of float32 arrays."""
  ids_BT = jnp.ones((1, 2), jnp.int32)
  def init(key: jax.Array) -> Params:
    return model.init(
        key, ids_BT, jnp.ones((1,), jnp.int32), bigrams=ids_BT,
        log_odds=jnp.ones((1, 2, model.log_odds_features)),
        linear=jnp.ones(1), negatives=jnp.ones(1, jnp.int32))['params']
  return each_member(model, init)(_member_keys(model, key))


@functools.lru_cache(maxsize=1)
def param_shapes(model: SentimentClassifier) -> Params:
  """`init_params` as `jax.ShapeDtypeStruct`s: nothing is allocated."""
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def averaged(params: Params) -> Params:
  """The parameters that are averaged: all but the table of pairs.

  Of which a step changes some rows: to average it would change all others too.
  """
  return {name: x for name, x in params.items() if name != TABLE}


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
