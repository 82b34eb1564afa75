"""The compiler computes what the model says: jit against NumPy in float64.

At the sizes of the published configs, for what is wrong may be so only there:
jaxlib 0.10.2 was, on a CPU (jax-ml/jax#39103).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_imdb.config import load_config
from flax_imdb.model import classifier

B = 16  # reviews


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _states(cell, params, x_TBE, lengths_B, reverse):
  """All states [T, B, H] of a layer, and the last one: the papers' formulas."""
  h = c = np.zeros((B, len(params['recurrent_kernel'])))
  states = np.empty((len(x_TBE), *h.shape))
  steps = range(len(x_TBE))
  for t in reversed(steps) if reverse else steps:
    z = (x_TBE[t] @ params['kernel'] + h @ params['recurrent_kernel']
         + params['bias'])
    if cell == 'lstm':
      i, f, g, o = np.split(z, 4, axis=-1)
      new_c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
      new_h = _sigmoid(o) * np.tanh(new_c)
    else:
      new_c, new_h = c, np.tanh(z)
    inside = (t < lengths_B)[:, None]
    c, h = np.where(inside, new_c, c), np.where(inside, new_h, h)
    states[t] = h
  return states, h


def _logits(model, params, ids_BT, lengths_B):
  """The whole model; [B]."""
  x_TBE = params['embed']['embedding'][ids_BT.T]
  states = [_states(model.cell, params[f'{direction}_0']['steps']['cell'],
                    x_TBE, lengths_B, direction == 'backward')
            for direction in model.directions]
  inside_TB1 = (np.arange(len(x_TBE))[:, None] < lengths_B)[..., None]
  pooled = [{'last': lambda h, last: last,
             'mean': lambda h, last: (np.where(inside_TB1, h, 0).sum(0)
                                      / lengths_B[:, None]),
             'max': lambda h, last: np.where(inside_TB1, h, -1).max(0)}[kind](
                 *state)
            for kind in model.pooling.split('+') for state in states]
  hidden = np.maximum(0, np.concatenate(pooled, -1) @ params['hidden']['kernel']
                      + params['hidden']['bias'])
  return (hidden @ params['logit']['kernel'] + params['logit']['bias'])[:, 0]


_slow = pytest.mark.slow


# Not the max of SimpleRNN's states: many are all but equal, and rounding says
# which of them gets the gradient.
@pytest.mark.parametrize(('file', 'cell', 'pooling'), [
    ('words', 'lstm', 'max+mean'),
    ('notebook', 'simple_rnn', 'last'),
    pytest.param('words', 'lstm', 'last', marks=_slow),
    pytest.param('words', 'simple_rnn', 'mean', marks=_slow),
    pytest.param('words', 'simple_rnn', 'last', marks=_slow),
    pytest.param('notebook', 'lstm', 'last', marks=_slow),
    pytest.param('notebook', 'lstm', 'max+mean', marks=_slow),
    pytest.param('notebook', 'simple_rnn', 'mean', marks=_slow)])
def test_logits_and_gradients_are_those_of_numpy(file, cell, pooling):
  config = load_config(f'configs/{file}.py')
  config.model.update(cell=cell, pooling=pooling, mask_padding=True)
  model = classifier.build_model(config)
  rng = np.random.default_rng(0)
  params = jax.device_get(
      jax.jit(lambda: classifier.init_params(model, jax.random.key(0)))())
  shape = B, config.data.max_length
  ids_BT = rng.integers(4, config.data.vocab_size, shape).astype(np.int32)
  lengths_B = rng.integers(1, shape[1] + 1, B).astype(np.int32)
  lengths_B[:2] = 1, shape[1]
  weights_B = rng.normal(size=B)

  @jax.jit
  def computed(params):
    def loss(params):
      logits = model.apply({'params': params}, ids_BT, lengths_B)
      return jnp.vdot(logits, weights_B.astype(np.float32)), logits
    return jax.grad(loss, has_aux=True)(params)

  gradient, logits = computed(params)
  exact = jax.tree.map(np.float64, params)
  np.testing.assert_allclose(
      logits, _logits(model, exact, ids_BT, lengths_B), atol=2e-6)

  # Along a random direction in each array, by central differences.
  for path, g in jax.tree_util.tree_leaves_with_path(gradient):
    direction = rng.normal(size=g.shape)
    def loss(distance, path=path, direction=direction):
      moved = jax.tree_util.tree_map_with_path(
          lambda p, x: x + distance * direction if p == path else x, exact)
      return weights_B @ _logits(model, moved, ids_BT, lengths_B)
    want = (loss(1e-6) - loss(-1e-6)) / 2e-6
    got = np.vdot(np.float64(g), direction)
    scale = np.linalg.norm(np.float64(g))
    assert scale > 1e-6, path
    assert abs(got - want) < 1e-4 * scale, (path, got, want)


def test_a_product_of_each_row_and_a_sum_of_it_are_right():
  """What jaxlib 0.10.2 gets wrong: squares of 0 to n - 1, summed by row."""
  n = 1 << 15
  x_N3 = np.zeros((n + 1, 3), np.float32)
  x_N3[:, 0] = np.arange(n + 1)
  matrix = jnp.eye(3, dtype=jnp.float32)
  squares = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(x_N3)
  np.testing.assert_array_equal(squares, x_N3[:, 0] ** 2)
