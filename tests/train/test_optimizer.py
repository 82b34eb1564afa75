"""The optimizers against formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_imdb.config import load_config
from flax_imdb.train.optimizer import (
  build_optimizer,
  learning_rate_schedule,
  put_rows,
  take_rows,
)


def _config(**fields):
  config = load_config('configs/notebook.py')
  for field, value in fields.items():
    config[field] = value
  return config


def _run(config, params, gradients):
  optimizer = build_optimizer(config, steps_per_epoch=10)
  state = optimizer.init(params)
  for gradient in gradients:
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return params


def _tree(x):
  return {'embed': {'embedding': x}, 'hidden': {'kernel': x, 'bias': x[0]}}


RNG = np.random.default_rng(0)
START = RNG.normal(size=(3, 4)).astype(np.float32)
GRADIENTS = RNG.normal(size=(20, 3, 4)).astype(np.float32)


def _rmsprop(x, rate, scale):
  """Keras 3: epsilon inside of the root, and v starts at 0."""
  v = np.zeros_like(x)
  for g in scale * GRADIENTS:
    v = 0.9 * v + 0.1 * g**2
    x = x - rate * g / np.sqrt(v + 1e-7)
  return x


def _adam(x, rate, scale=1.0, decay=0.0):
  m, v = np.zeros_like(x), np.zeros_like(x)
  for t, g in enumerate(scale * GRADIENTS, 1):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-7)
    x = x - rate * (step + decay * x)
  return x


@pytest.mark.parametrize(('name', 'reference'), [
    ('rmsprop', _rmsprop), ('adam', _adam), ('adamw', _adam),
    ('sgd', lambda x, rate, scale: x - rate * scale * GRADIENTS.sum(0))])
@pytest.mark.parametrize('scale', [1.0, 1e-4])  # 1e-4: epsilon counts
def test_optimizer_equals_numpy(scale, name, reference):
  got = _run(
      _config(optimizer=name), _tree(START), map(_tree, scale * GRADIENTS))
  np.testing.assert_allclose(
      got['hidden']['kernel'], reference(START, 1e-3, scale), atol=2e-6)


def test_weight_decay_shrinks_kernels_only():
  config = _config(optimizer='adamw', weight_decay=0.5, learning_rate=0.01)
  got = _run(config, _tree(START), map(_tree, GRADIENTS))
  np.testing.assert_allclose(
      got['hidden']['kernel'], _adam(START, 0.01, decay=0.5), atol=2e-6)
  plain = _adam(START, 0.01)
  np.testing.assert_allclose(got['embed']['embedding'], plain, atol=2e-6)
  np.testing.assert_allclose(got['hidden']['bias'], plain[0], atol=2e-6)
  still = _run(config, _tree(START), [_tree(np.zeros_like(START))] * 20)
  assert (np.abs(still['hidden']['kernel']) < np.abs(START)).all()


def test_clipping_bounds_the_whole_gradient():
  config = _config(optimizer='sgd', clip_norm=1.0, learning_rate=1.0)
  after = _run(config, _tree(START), [_tree(100 * GRADIENTS[0])])
  moved = jax.tree.map(np.subtract, after, _tree(START))
  assert float(optax.tree.norm(moved)) == pytest.approx(1, rel=1e-5)


def test_the_gradient_is_clipped_and_not_the_update():
  config = _config(optimizer='adam', clip_norm=1.0, learning_rate=1.0)
  after = _run(config, _tree(START), [_tree(100 * GRADIENTS[0])])
  # Adam's first step is the sign of each gradient, of whatever norm it is.
  np.testing.assert_allclose(
      after['hidden']['kernel'] - START, -np.sign(GRADIENTS[0]), atol=1e-4)


def test_cosine_rises_falls_and_ends_at_zero():
  config = _config(schedule='cosine', warmup_epochs=0.5, num_epochs=4)
  rate = learning_rate_schedule(config, steps_per_epoch=10)
  rates = np.array([float(rate(step)) for step in range(41)])
  np.testing.assert_allclose(rates[:6], 1e-3 * np.arange(6) / 5, rtol=1e-6)
  assert (np.diff(rates[5:]) < 0).all()
  assert rates[40] == 0
  halfway = 1e-3 * 0.5 * (1 + np.cos(np.pi * 20 / 35))
  assert rates[25] == pytest.approx(halfway, rel=1e-5)


def test_constant_stays_and_no_epochs_are_no_error():
  config = _config(num_epochs=0)
  rate = learning_rate_schedule(config, steps_per_epoch=10)
  rates = [float(rate(step)) for step in (0, 1, 1000)]
  assert rates == pytest.approx([1e-3] * 3)


def _sparse(config, params, gradients, rows_of):
  """Updates only the rows of each step, of the table and what is kept of it."""
  optimizer = build_optimizer(config, steps_per_epoch=10)
  whole = params, optimizer.init(params)
  for gradient, rows in zip(gradients, rows_of, strict=True):
    x, state = take_rows(whole, rows, 'bigrams')
    updates, state = optimizer.update(
        take_rows(gradient, rows, 'bigrams'), state, x)
    whole = put_rows(
        whole, (optax.apply_updates(x, updates), state), rows, 'bigrams')
  return whole


def _with_table(x):
  x = jnp.asarray(x)
  return {'bigrams': {'embedding': x}, 'logit': {'kernel': x}}


@pytest.mark.parametrize('name', ['adam', 'rmsprop', 'sgd', 'adamw'])
def test_the_sparse_form_is_the_dense_one_where_every_row_is_read(name):
  config = _config(optimizer=name, weight_decay=0.1, clip_norm=0.5)
  gradients = [_with_table(g) for g in GRADIENTS]
  want = _run(config, _with_table(START), gradients)
  # Rows that no table has, as they fill up a batch, change nothing.
  rows = np.array([0, 1, 2, 1 << 30, (1 << 30) + 1], np.int32)
  got, _ = _sparse(config, _with_table(START), gradients, [rows] * 20)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
               got, want)


def test_rows_that_a_batch_does_not_read_stand_still():
  """Each row has the bits of one that had its own steps alone."""
  config = _config(optimizer='adam', schedule='constant', clip_norm=0)
  rows_of = [np.flatnonzero(row).astype(np.int32) for row in
             np.random.default_rng(1).integers(0, 2, (20, 3))]
  gradients = [_with_table(g) for g in GRADIENTS]
  params, state = _sparse(
      config, _with_table(START), gradients, rows_of)
  m = v = np.zeros((3, 4))
  x = START.astype(np.float64)
  for step, (g, rows) in enumerate(zip(GRADIENTS, rows_of, strict=True), 1):
    read = np.isin(np.arange(3), rows)[:, None]
    m = np.where(read, 0.9 * m + 0.1 * g, m)
    v = np.where(read, 0.999 * v + 0.001 * g * g, v)
    moved = m / (1 - 0.9 ** step) / (
        np.sqrt(v / (1 - 0.999 ** step)) + 1e-7)
    x = np.where(read, x - config.learning_rate * moved, x)
  np.testing.assert_allclose(
      params['bigrams']['embedding'], x, rtol=1e-4, atol=1e-6)
  adam = next(s for s in jax.tree.leaves(
      state, is_leaf=lambda s: hasattr(s, 'mu')) if hasattr(s, 'mu'))
  np.testing.assert_allclose(adam.mu['bigrams']['embedding'], m, rtol=1e-4)
  assert adam.mu['logit']['kernel'].shape == (3, 4)


def test_no_rows_means_all():
  tree = _with_table(START)
  assert take_rows(
      tree, None, 'bigrams')['bigrams']['embedding'].shape == (3, 4)
  put = put_rows(tree, _with_table(2 * START), None, 'bigrams')
  np.testing.assert_array_equal(put['bigrams']['embedding'], 2 * START)
