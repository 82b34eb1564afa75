"""Which word each state is to predict, and which are drawn to compare with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_imdb.model import word_head


def test_each_direction_predicts_the_word_that_it_has_yet_to_read():
  ids = jnp.array([[1, 7, 2, 9, 0], [5, 6, 4, 8, 7], [1, 0, 0, 0, 0]])
  forward, backward = word_head.targets(
      ids, jnp.array([4, 5, 1]), ('forward', 'backward'))
  # The next one, though it is unknown; past the last one, nothing.
  np.testing.assert_array_equal(
      forward.T, [[7, 2, 9, 0, 0], [6, 4, 8, 7, 0], [0, 0, 0, 0, 0]])
  # The one before, but for a start.
  np.testing.assert_array_equal(
      backward.T, [[0, 0, 7, 2, 0], [0, 5, 6, 4, 8], [0, 0, 0, 0, 0]])
  (alone,) = word_head.targets(ids, jnp.array([4, 5, 1]), ('forward',))
  np.testing.assert_array_equal(alone, forward)


@pytest.mark.parametrize('vocab_size', [5, 700])
def test_words_are_drawn_as_often_as_the_correction_says(vocab_size):
  draws = 200
  drawn = np.asarray(jax.jit(jax.vmap(
      lambda key: word_head.draw(key, vocab_size)))(
          jax.random.split(jax.random.key(3), draws)))
  assert drawn.shape == (draws, word_head.NEGATIVES)
  assert drawn.min() == 2 and drawn.max() == vocab_size - 1
  share = np.exp(np.asarray(
      word_head.log_share(jnp.arange(vocab_size), vocab_size)))
  assert share[2:].sum() == pytest.approx(1, abs=1e-5)
  expected = share * word_head.NEGATIVES * draws
  counts = np.bincount(drawn.ravel(), minlength=vocab_size)
  np.testing.assert_allclose(
      counts[2:], expected[2:], atol=5 * expected[2:].max() ** 0.5)
  # One of each part: a frequent word comes as often as it should, each time.
  often = (drawn == 2).sum(axis=1)
  assert np.ptp(often) <= 1 and len(np.unique(drawn[0])) > 2
  assert len(np.unique(drawn, axis=0)) > 1
