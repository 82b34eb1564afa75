"""The scan over time against a Python loop and against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_imdb.model.recurrent import CELLS, LSTMCell, RecurrentLayer

T, B, E, H = 7, 3, 5, 4
LENGTHS = np.array([7, 1, 4], np.int32)


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _numpy_layer(cell, params, x, lengths, reverse=False):
  """float64 [T, B, H] states, written down from the papers' formulas."""
  kernel, recurrent, bias = (
      np.asarray(params[k], np.float64)
      for k in ('kernel', 'recurrent_kernel', 'bias'))
  h, c = np.zeros((B, H)), np.zeros((B, H))
  states = np.zeros((T, B, H))
  for t in reversed(range(T)) if reverse else range(T):
    for b in range(B):
      if t < lengths[b]:
        z = x[t, b] @ kernel + h[b] @ recurrent + bias
        if cell == 'lstm':
          i, f, g, o = np.split(z, 4)
          c[b] = _sigmoid(f) * c[b] + _sigmoid(i) * np.tanh(g)
          h[b] = _sigmoid(o) * np.tanh(c[b])
        else:
          h[b] = np.tanh(z)
    states[t] = h
  return states


def _layer(cell, **kwargs):
  layer = RecurrentLayer(cell, H, **kwargs)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(T, B, E)).astype(np.float32)
  shapes = jax.eval_shape(layer.init, jax.random.key(1), x, LENGTHS)['params']
  params = jax.tree.map(  # by NumPy: it compiles nothing
      lambda s: rng.uniform(-0.5, 0.5, s.shape).astype(s.dtype), shapes)
  return layer, params, x


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('cell', CELLS)
def test_scan_equals_numpy(cell, reverse):
  layer, params, x = _layer(cell, reverse=reverse)
  got, last = layer.apply({'params': params}, x, LENGTHS)
  want = _numpy_layer(cell, params['steps']['cell'], x, LENGTHS, reverse)
  np.testing.assert_allclose(got, want, atol=2e-6)
  np.testing.assert_array_equal(last, got[0 if reverse else -1])


@pytest.mark.parametrize('cell', CELLS)
def test_scan_equals_a_python_loop_over_the_cell(cell):
  layer, params, x = _layer(cell, mask_padding=False)
  module = CELLS[cell](H)
  carry, states = module.start(B), []
  for t in range(T):
    carry = module.apply({'params': params['steps']['cell']}, carry, x[t])
    states.append(carry[-1])
  got, _ = layer.apply({'params': params}, x, LENGTHS)
  np.testing.assert_allclose(got, np.stack(states), atol=1e-6)


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('mask_padding', [
    pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize('cell', CELLS)
def test_recomputing_the_gates_changes_no_gradient(cell, mask_padding, reverse):
  _, params, x = _layer(cell)
  target = np.random.default_rng(1).normal(size=(T, B, H))
  def gradient(remat):
    layer = RecurrentLayer(cell, H, jnp.float64, mask_padding, reverse, remat)
    def loss(params, x):
      return jnp.vdot(layer.apply({'params': params}, x, LENGTHS)[0], target)
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
  with jax.enable_x64():
    params, x = jax.tree.map(lambda p: np.asarray(p, np.float64), (params, x))
    a, b = gradient(True), gradient(False)
  assert all(g.dtype == np.float64 for g in jax.tree.leaves(a))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-10, atol=1e-10), a, b)


def test_recomputing_the_gates_stores_less():
  def stored(remat):
    layer, params, x = _layer('lstm', remat=remat)
    _, backward = jax.vjp(
        lambda p: layer.apply({'params': p}, x, LENGTHS)[0], params)
    return sum(array.size for array in jax.tree.leaves(backward))
  assert stored(True) < 0.5 * stored(False)


@pytest.mark.parametrize('cell', CELLS)
def test_bfloat16_rounds_what_is_multiplied_and_nothing_else(cell):
  def rounded(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)
  _, params, x = _layer(cell)
  params = params['steps']['cell']
  rng = np.random.default_rng(1)
  *c, h = (rng.normal(size=zeros.shape).astype(np.float32)
           for zeros in CELLS[cell](H).start(B))
  got = CELLS[cell](H, jnp.bfloat16).apply({'params': params}, (*c, h), x[0])
  kernels = {name: rounded(kernel) for name, kernel in params.items()
             if name != 'bias'}
  want = CELLS[cell](H).apply(
      {'params': params | kernels}, (*c, rounded(h)), rounded(x[0]))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize('cell', CELLS)
def test_bfloat16_adds_up_over_time_in_float32(cell, remat):
  # Of 2,048 equal terms a sum in bfloat16 ends at 256, a relative 0.9 too low.
  long = 2048
  x = np.ones((long, B, E), np.float32)
  lengths = np.full(B, long, np.int32)
  _, params, _ = _layer(cell)
  def gradient(dtype):
    layer = RecurrentLayer(cell, H, dtype, remat=remat)
    return jax.jit(jax.grad(lambda p: layer.apply(
        {'params': p}, x, lengths)[0].sum()))(params)['steps']['cell']
  low, full = gradient(jnp.bfloat16), gradient(jnp.float32)
  for name, want in full.items():
    assert low[name].dtype == jnp.float32
    assert np.abs(low[name] - want).max() < 0.02 * np.abs(want).max(), name


def test_state_stands_still_after_the_end_and_padding_has_no_gradient():
  layer, params, x = _layer('lstm')
  states = np.asarray(layer.apply({'params': params}, x, LENGTHS)[0])
  for b, length in enumerate(LENGTHS):
    assert (states[length - 1:, b] == states[length - 1, b]).all()
  gradient = np.asarray(jax.grad(
      lambda x: jnp.sum(layer.apply({'params': params}, x, LENGTHS)[0]))(x))
  for b, length in enumerate(LENGTHS):
    assert (gradient[length:, b] == 0).all()
    assert (gradient[:length, b] != 0).all()


def test_lstm_starts_as_keras_does():
  cell = LSTMCell(32)
  params = jax.jit(cell.init)(
      jax.random.key(0), cell.start(1), jnp.zeros((1, 48)))['params']
  np.testing.assert_array_equal(
      params['bias'], np.repeat([0, 1, 0, 0], 32))  # i f g o
  limit = np.sqrt(6 / (48 + 128))
  kernel = np.asarray(params['kernel'])
  assert 0.95 * limit < np.abs(kernel).max() <= limit
  recurrent = np.asarray(params['recurrent_kernel'])
  assert recurrent.shape == (32, 128)
  np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(32), atol=1e-5)
