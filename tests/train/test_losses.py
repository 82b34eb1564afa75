"""The gradient of a step is that of the loss as written down, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_imdb.config import check_fields, load_config
from flax_imdb.data.batches import TrainBatches
from flax_imdb.data.reading import Reading, Share
from flax_imdb.data.reviews import Reviews
from flax_imdb.model import classifier
from flax_imdb.train import losses

LONGEST = 20


def _reviews(n=8, seed=0):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, LONGEST, n)
  tokens = lengths.sum()
  return Reviews(
      rng.integers(4, 50, tokens).astype(np.uint16),
      np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
      rng.integers(0, 2, n).astype(np.int8),
      {'bigrams': rng.integers(0, 30, tokens).astype(np.int32),
       'log_odds': rng.normal(size=(tokens, 2)).astype(np.float32)})


def _problem(inputs='words+bigrams+log_odds', segment_length=8, **fields):
  """(config, model, params, batch of 7 reviews, keys), all in float64."""
  config = load_config('configs/default.py')
  config.data.update(vocab_size=50, max_length=LONGEST, bigrams=30,
                     segment_length=segment_length, log_odds_order=2)
  config.model.update(inputs=inputs, embedding_dim=3, width=4, **{
      name: 0.0 for name in ('word_dropout', 'bigram_dropout',
                             'embedding_dropout', 'pooled_dropout')})
  config.update_from_flattened_dict(fields)
  check_fields(config)
  batch = TrainBatches(
      _reviews()[:7], 0, 8, Reading.of(config.data), Share())(0)
  if inputs == 'words':
    batch = {k: v for k, v in batch.items() if k[:3] not in ('big', 'log')}
  model = classifier.build_model(config).clone(dtype='float64')
  if 'bigram_rows' in batch:
    model = model.clone(bigram_rows=len(batch['bigram_rows']))
  rng = np.random.default_rng(1)
  params = jax.tree.map(
      lambda x: jnp.asarray(rng.normal(size=x.shape) / 2),
      classifier.param_shapes(model))
  batch = {k: jnp.asarray(v, 'float64') if v.dtype.kind == 'f' else
           jnp.asarray(v) for k, v in batch.items()}
  return config, model, params, batch, classifier.dropout_keys(
      model, 0, 3, batch['places'])


def _loss(model, params, batch, keys, change=None, smoothing=0.0):
  """The weighted sum of cross entropies, as a sum of two logarithms."""
  variables = {'params': params}
  if change is not None:
    variables[classifier.ADVERSARIAL] = {'x': change}
  z = model.apply(variables, **classifier.inputs(batch), dropout_keys_B=keys)
  y = (1 - smoothing) * batch['labels'] + smoothing / 2
  entropy = y * jnp.logaddexp(0, -z) + (1 - y) * jnp.logaddexp(0, z)
  return (batch['weights'] * entropy).sum()


def _change(norm, model, params, batch, keys):
  """The change of each review alone, by a loop over reviews."""
  rows, length = batch['ids'].shape
  none = jnp.zeros((length, rows, model.embedding_dim))
  g = np.asarray(jax.jit(jax.grad(lambda x: _loss(
      model, params, batch, keys, x)))(none))
  change = np.zeros_like(g)
  for i, weight in enumerate(batch['weights']):
    own = batch['segments'][i] if 'segments' in batch else jnp.array([i])
    own = np.asarray(own[own < rows])
    if weight:
      change[:, own] = norm * g[:, own] / np.sqrt((g[:, own] ** 2).sum())
  return change


@pytest.mark.parametrize('fields', [
    {}, {'inputs': 'words', 'segment_length': 0},
    pytest.param({'model.word_dropout': 0.3, 'model.bigram_dropout': 0.4,
                  'model.embedding_dropout': 0.3, 'model.pooled_dropout': 0.5,
                  'model.log_odds_dropout': 0.2}, marks=pytest.mark.slow)],
    ids=['segments', 'words', 'dropout'])
def test_the_gradient_is_that_of_both_losses(fields):
  with jax.enable_x64(True):
    config, model, params, batch, keys = _problem(
        **fields, adversarial_norm=0.7, adversarial_weight=1.5)
    loss, correct, gradient = jax.jit(
        lambda params: losses.loss_and_gradient(
            config, model, params, batch, keys))(params)
    np.testing.assert_allclose(
        loss, jax.jit(lambda p: _loss(model, p, batch, keys))(params),
        rtol=1e-12)
    assert correct <= 7
    change = _change(0.7, model, params, batch, keys)
    both = jax.jit(lambda p: _loss(model, p, batch, keys) + 1.5 * _loss(
        model, p, batch, keys, change))
    assert both(params) > 2.5 * loss  # it is worse for what was added
    rng = np.random.default_rng(2)
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
      direction = rng.normal(size=g.shape)
      def at(distance, path=path, direction=direction):
        return both(jax.tree_util.tree_map_with_path(
            lambda p, x: x + distance * direction if p == path else x, params))
      want = (at(1e-5) - at(-1e-5)) / 2e-5
      got = np.vdot(g, direction)
      assert np.linalg.norm(g) > 1e-4, path
      np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


def test_without_a_norm_it_is_the_plain_gradient():
  with jax.enable_x64(True):
    config, model, params, batch, keys = _problem(adversarial_norm=0.0,
                                                  label_smoothing=0.2)
    loss, _, gradient = jax.jit(lambda p: losses.loss_and_gradient(
        config, model, p, batch, keys))(params)
    want, plain = jax.jit(jax.value_and_grad(lambda p: _loss(
        model, p, batch, keys, smoothing=0.2)))(params)
    np.testing.assert_allclose(loss, want, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
                 gradient, plain)


def test_what_is_added_has_its_norm_in_each_review():
  with jax.enable_x64(True):
    _, model, params, batch, keys = _problem()
    rows, length = batch['ids'].shape
    none = jnp.zeros((length, rows, model.embedding_dim))
    gradient = jax.jit(jax.grad(
        lambda x: _loss(model, params, batch, keys, x)))(none)
    change = np.asarray(losses._worst(gradient, batch['segments']))
    square_S = np.append((change ** 2).sum(axis=(0, 2)), 0)
    norms = np.sqrt(square_S[batch['segments']].sum(axis=1))
    np.testing.assert_allclose(norms, batch['weights'], atol=1e-9)
    # Padding, and places that no review has, are left as they are.
    outside = np.arange(length)[:, None] >= np.asarray(batch['lengths'])
    assert (change[outside] == 0).all()
