"""Gates are what the cell computes, and nothing is changed by looking."""

import jax
import numpy as np
import pytest
from support.models import tiny_model

from flax_imdb.data.reviews import Reviews
from flax_imdb.inference import gates
from flax_imdb.model.recurrent import LSTMCell


def _reviews(lengths):
  rng = np.random.default_rng(0)
  return Reviews(rng.integers(4, 30, sum(lengths)).astype(np.uint16),
                 np.cumsum([0, *lengths]), np.zeros(len(lengths), np.int16))


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _by_hand(cell, x_TE):
  """The gates of one review, step by step in float64."""
  kernel, recurrent, bias = (np.asarray(cell[name], np.float64) for name in (
      'kernel', 'recurrent_kernel', 'bias'))
  width = len(recurrent)
  c, h = np.zeros(width), np.zeros(width)
  found = {name: [] for name in ('input', 'forget', 'candidate', 'output')}
  for x in x_TE:
    i, f, g, o = np.split(x @ kernel + h @ recurrent + bias, 4)
    for name, z in zip(found, (_sigmoid(i), _sigmoid(f), np.tanh(g),
                               _sigmoid(o)), strict=True):
      found[name].append(z)
    c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
    h = _sigmoid(o) * np.tanh(c)
  return found


@pytest.mark.parametrize('recurrence', ['scan', 'joint'])
def test_they_are_those_of_the_cell_at_each_token(recurrence):
  config, model, params = tiny_model(**{'model.bidirectional': True})
  reviews = _reviews([3, 7, 5])
  params = jax.device_get(params)
  found = gates.make_gates(
      config, model.clone(recurrence=recurrence), reviews)(params)
  assert list(found) == ['candidate', 'forget', 'input', 'output']
  table = np.asarray(params['embed']['embedding'])
  want = {name: [] for name in found}
  for row in range(3):
    ids = reviews.ids[reviews.offsets[row]:reviews.offsets[row + 1]]
    own = _by_hand(params['forward_0']['steps']['cell'], table[ids])
    for name in want:
      want[name] += own[name]
  for name, x in found.items():
    assert x.shape == (15, model.width)  # no padding
    np.testing.assert_allclose(
        np.sort(x, axis=0), np.sort(want[name], axis=0), atol=1e-5)


def test_the_cell_s_own_step_agrees():
  """Of one step: the next state is made of these gates."""
  config, model, params = tiny_model()
  params = jax.device_get(params)
  reviews = _reviews([1])
  found = gates.make_gates(config, model, reviews)(params)
  x = np.asarray(params['embed']['embedding'])[reviews.ids]
  cell = LSTMCell(model.width)
  c, h = cell.apply({'params': params['forward_0']['steps']['cell']},
                    cell.start(1), x)
  np.testing.assert_allclose(c, found['input'] * found['candidate'], atol=1e-6)
  np.testing.assert_allclose(h, found['output'] * np.tanh(c), atol=1e-6)


@pytest.mark.parametrize('objective', ['label', 'language_model'])
def test_reviews_in_segments_are_looked_at_too(objective):
  config, model, params = tiny_model(**{
      'objective': objective, 'data.segment_length': 4, 'show_examples': 0})
  found = gates.make_gates(config, model, _reviews([3, 9]))(
      jax.device_get(params))
  # One segment of 3, and three of 4 that overlap.
  assert found['input'].shape == (3 + 3 * 4, model.width)


def test_of_several_members_the_first_is_looked_at():
  config, model, params = tiny_model(**{'model.members': 2})
  params = jax.device_get(params)
  reviews = _reviews([4])
  found = gates.make_gates(config, model, reviews)(params)
  alone = {**params}
  alone = jax.tree.map(lambda x: x[0], alone)
  want = gates.make_gates(
      config, model.clone(members=1), reviews)(alone)
  for name in found:
    np.testing.assert_array_equal(found[name], want[name])
