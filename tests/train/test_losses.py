"""The gradient of a step is that of the loss as written down, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_imdb.config import load_config
from flax_imdb.data.batches import TrainBatches
from flax_imdb.data.classes import columns
from flax_imdb.data.reading import Reading, Share
from flax_imdb.data.reviews import Reviews
from flax_imdb.fields import check_fields
from flax_imdb.model import classifier
from flax_imdb.train import losses

LONGEST = 20


def _reviews(n=8, seed=0, class_count=2):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, LONGEST, n)
  tokens = lengths.sum()
  return Reviews(
      rng.integers(4, 50, tokens).astype(np.uint16),
      np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
      rng.integers(0, class_count, n).astype(np.int8),
      {'bigrams': rng.integers(0, 30, tokens).astype(np.int32),
       'log_odds': rng.normal(size=(
           tokens, 2 * columns(class_count))).astype(np.float32)})


def _problem(inputs='words+bigrams+log_odds', segment_length=8, class_count=2,
             **fields):
  """(config, model, params, batch of 7 reviews, keys), all in float64."""
  config = load_config('configs/default.py')
  config.data.update(vocab_size=50, max_length=LONGEST, bigrams=30,
                     segment_length=segment_length, train_segments=0,
                     log_odds_order=2)
  config.model.update(inputs=inputs, embedding_dim=3, width=4, **{
      name: 0.0 for name in ('word_dropout', 'bigram_dropout',
                             'log_odds_dropout', 'embedding_dropout',
                             'pooled_dropout')})
  config.update_from_flattened_dict(fields)
  check_fields(config)
  batch = TrainBatches(
      _reviews(class_count=class_count)[:7], 0, 8, Reading.of(config.data),
      Share())(0)
  if inputs == 'words':
    batch = {k: v for k, v in batch.items() if k[:3] not in ('big', 'log')}
  model = classifier.build_model(config, class_count).clone(dtype='float64')
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


def _logits(model, params, batch, keys, change=None):
  variables = {'params': params}
  if change is not None:
    variables[classifier.ADVERSARIAL] = {'x': change}
  return model.apply(
      variables, **classifier.inputs(batch), dropout_keys_B=keys)


def _p(z):
  """The probabilities of all classes, [B, K], of logits [B] or [B, K]."""
  if z.ndim == 1:
    return jnp.stack([1 / (1 + jnp.exp(z)), 1 / (1 + jnp.exp(-z))], axis=-1)
  return jnp.exp(z) / jnp.exp(z).sum(axis=-1, keepdims=True)


def _targets(batch, count):
  """What labels, a number each or shares, say of each class: [B, K]."""
  y = batch['labels']
  if y.ndim == 2:
    return y
  if count == 2:
    return jnp.stack([1 - y, y], axis=-1)
  return jnp.eye(count)[y.astype(int)]


def _known(batch):
  return np.asarray(batch['labels']).reshape(len(batch['weights']), -1)[
      :, 0] >= 0


def _loss(batch, z, smoothing=0.0, class_weights=None):
  """The weighted sum of cross entropies, a logarithm for each class."""
  p = _p(z)
  y = _targets(batch, p.shape[1])
  entropy = -(((1 - smoothing) * y + smoothing / p.shape[1])
              * jnp.log(p)).sum(axis=1)
  counts = 1 if class_weights is None else y @ class_weights
  return (batch['weights'] * _known(batch) * counts * entropy).sum()


def _divergence(batch, p, z):
  """The weighted sum of KL(p || q), by the probabilities of all classes."""
  return (batch['weights'] * (p * jnp.log(p / _p(z))).sum(axis=1)).sum()


def _entropy(batch, z):
  """The weighted sum of entropies, of reviews without a label."""
  q = _p(z)
  entropy = -(q * jnp.log(q)).sum(axis=1)
  return (batch['weights'] * ~_known(batch) * entropy).sum()


def _segments(batch, i):
  """The places of a review's segments."""
  own = np.asarray(batch['segments'][i] if 'segments' in batch else [i])
  return own[own < len(batch['ids'])]


def _scaled(batch, norm, x):
  """`x` at a norm, of each review alone, by a loop over reviews."""
  change = np.zeros(x.shape)
  for i in np.flatnonzero(batch['weights']):
    own = _segments(batch, i)
    square = (x[:, own] ** 2).sum()
    change[:, own] = norm * x[:, own] / np.sqrt(square) if square else 0
  return change


def _noise(model, batch, keys):
  """Of each segment by its key, however long, by a loop over segments."""
  noise = np.zeros((*batch['ids'].T.shape, model.embedding_dim))
  for i in np.flatnonzero(batch['weights']):
    for number, s in enumerate(_segments(batch, i)):
      key, length = keys[i], batch['lengths'][s]
      if 'segments' in batch:
        key = jax.random.fold_in(key, 16 + number)
      drawn = jax.random.normal(
          jax.random.fold_in(key, 5), (LONGEST + 3, model.embedding_dim))
      noise[:length, s] = drawn[:length]
  return noise


def _terms(config, model, params, batch, keys, class_weights=None):
  """(logits, function of parameters): each term, with what is added constant.

  The terms are cross entropy, entropy, adversarial and virtual adversarial.
  """
  def slope(term, at):
    return np.asarray(jax.jit(jax.grad(
        lambda x: term(_logits(model, params, batch, keys, x))))(at))
  noise = _noise(model, batch, keys)
  z = jax.jit(lambda: _logits(model, params, batch, keys))()
  p = np.asarray(_p(z))
  def loss(z):
    return _loss(batch, z, config.label_smoothing, class_weights)
  adversarial = _scaled(
      batch, config.adversarial_norm, slope(loss, np.zeros_like(noise)))
  virtual = _scaled(batch, config.virtual_adversarial_norm, slope(
      lambda z: _divergence(batch, p, z), _scaled(batch, 0.1, noise)))
  def terms(params):
    z = _logits(model, params, batch, keys)
    return jnp.array([
        loss(z),
        config.entropy_weight * _entropy(batch, z),
        config.adversarial_weight * loss(
            _logits(model, params, batch, keys, adversarial)),
        config.virtual_adversarial_weight * _divergence(
            batch, p, _logits(model, params, batch, keys, virtual))])
  return np.asarray(z), jax.jit(terms)


ALL = {'adversarial_norm': 0.7, 'adversarial_weight': 1.5,
       'virtual_adversarial_norm': 0.9, 'virtual_adversarial_weight': 1.3,
       'entropy_weight': 0.8}
# Of 7 reviews and a filling: some have no label, one is likely negative.
LABELS = np.array([0, -1, 1, 0.3, -1, 1, 0, -1])
OF_FOUR = np.array([0, -1, 1, 3, -1, 1, 2, -1])
SHARES = np.where(OF_FOUR[:, None] < 0, -1, np.eye(4)[OF_FOUR] * 0.7 + 0.075)


@pytest.mark.parametrize('fields', [
    {}, {'inputs': 'words', 'segment_length': 0},
    pytest.param({'model.word_dropout': 0.3, 'model.bigram_dropout': 0.4,
                  'model.embedding_dropout': 0.3, 'model.pooled_dropout': 0.5,
                  'model.log_odds_dropout': 0.2}, marks=pytest.mark.slow),
    {'labels': OF_FOUR, 'label_smoothing': 0.1},
    {'labels': OF_FOUR, 'weights': np.array([0.4, 0.7, 1.9, 1.0])},
    {'labels': SHARES, 'weights': np.array([0.4, 0.7, 1.9, 1.0])},
    {'weights': np.array([0.6, 1.7])}],
    ids=['segments', 'words', 'dropout', 'four classes', 'four, weighted',
         'four, shares', 'two, weighted'])
def test_the_gradient_is_that_of_all_terms(fields):
  fields = dict(fields)
  labels, weights = fields.pop('labels', LABELS), fields.pop('weights', None)
  classes = 2 if labels is LABELS else 4
  with jax.enable_x64(True):
    config, model, params, batch, keys = _problem(
        class_count=classes, **fields, **ALL)
    batch['labels'] = jnp.asarray(labels, 'float64')
    loss, correct, labelled, gradient = jax.jit(
        lambda params: losses.loss_and_gradient(
            config, model, params, batch, keys, weights))(params)
    z, terms = _terms(config, model, params, batch, keys, weights)
    plain, entropy, worse, moved = terms(params)
    # A review counts 1 in what is shown.
    np.testing.assert_allclose(
        loss, _loss(batch, z, config.label_smoothing), rtol=1e-12)
    assert weights is None or abs(loss - plain) > 0.05
    known = np.flatnonzero(_known(batch) & (np.asarray(batch['weights']) > 0))
    assert labelled == len(known) == 5
    right = (z > 0) == (labels > 0.5) if classes == 2 else z.argmax(axis=1) == (
        _targets(batch, 4).argmax(axis=1))
    assert correct == right[known].sum()
    # What is added makes each worse, and no term is small.
    assert worse > 1.5 * plain and min(entropy, moved) > 0.02
    rng = np.random.default_rng(2)
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
      direction = rng.normal(size=g.shape)
      def at(distance, path=path, direction=direction):
        return terms(jax.tree_util.tree_map_with_path(
            lambda p, x: x + distance * direction if p == path else x, params))
      want = (at(1e-5) - at(-1e-5)) / 2e-5
      got = np.vdot(g, direction)
      assert np.linalg.norm(g) > 1e-4, path
      np.testing.assert_allclose(got, want.sum(), rtol=1e-6, atol=1e-8)


def test_a_prediction_that_nothing_moved_diverges_from_none():
  batch = {'weights': np.ones(4, np.float32)}
  logits = jnp.array([-30.0, -1.0, 0.5, 30.0])
  assert losses._divergence(batch, logits, logits) == 0
  at = jax.grad(losses._divergence, argnums=(1, 2))(batch, logits, logits + 1)
  assert (at[0] == 0).all()  # held constant
  np.testing.assert_allclose(
      at[1], jax.nn.sigmoid(logits + 1) - jax.nn.sigmoid(logits), atol=1e-7)


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_reviews_without_a_label_are_left_out_of_the_cross_entropy(smoothing):
  """As those that only fill a batch."""
  with jax.enable_x64(True):
    config, model, params, batch, keys = _problem(
        adversarial_norm=0.7, label_smoothing=smoothing)
    step = jax.jit(lambda batch: losses.loss_and_gradient(
        config, model, params, batch, keys))
    without = step(batch | {'labels': LABELS})
    filling = step(batch | {
        'labels': np.maximum(LABELS, 0),
        'weights': np.where(LABELS < 0, 0, batch['weights'])})
    assert without[2] == 5 and optax.tree.norm(without[3]) > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
                 without, filling)
    every = step(batch)
    assert every[2] == 7 and abs(every[0] - without[0]) > 0.1


def test_without_a_norm_it_is_the_plain_gradient():
  with jax.enable_x64(True):
    config, model, params, batch, keys = _problem(adversarial_norm=0.0,
                                                  label_smoothing=0.2)
    loss, _, _, gradient = jax.jit(lambda p: losses.loss_and_gradient(
        config, model, p, batch, keys))(params)
    want, plain = jax.jit(jax.value_and_grad(lambda p: _loss(
        batch, _logits(model, p, batch, keys), 0.2)))(params)
    np.testing.assert_allclose(loss, want, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
                 gradient, plain)


@pytest.mark.parametrize(('fields', 'passes'), [
    ({}, 1), ({'adversarial_norm': 0.3}, 2), ({'entropy_weight': 1.0}, 1),
    ({'virtual_adversarial_norm': 1.0}, 3), (ALL, 4)])
def test_a_term_that_is_off_takes_no_pass(fields, passes, monkeypatch):
  with jax.enable_x64(True):
    config, model, params, batch, keys = _problem(**fields)
    made = []
    apply = type(model).apply
    monkeypatch.setattr(type(model), 'apply', lambda *args, **kwargs: (
        made.append(None), apply(*args, **kwargs))[1])
    jax.eval_shape(lambda p: losses.loss_and_gradient(
        config, model, p, batch, keys), params)
    assert len(made) == passes


def test_what_is_added_has_its_norm_in_each_review():
  with jax.enable_x64(True):
    _, model, params, batch, keys = _problem()
    rows, length = batch['ids'].shape
    none = jnp.zeros((length, rows, model.embedding_dim))
    gradient = jax.jit(jax.grad(lambda x: _loss(
        batch, _logits(model, params, batch, keys, x))))(none)
    change = np.asarray(losses._along({'x': gradient}, 0.5, batch)['x'])
    square_S = np.append((change ** 2).sum(axis=(0, 2)), 0)
    norms = np.sqrt(square_S[batch['segments']].sum(axis=1))
    np.testing.assert_allclose(norms, 0.5 * batch['weights'], atol=1e-9)
    # Padding, and places that no review has, are left as they are.
    outside = np.arange(length)[:, None] >= np.asarray(batch['lengths'])
    assert (change[outside] == 0).all()
