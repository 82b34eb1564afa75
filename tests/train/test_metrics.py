"""Metrics add up over steps, divide by their weight, and name a bad step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_imdb.errors import UserError
from flax_imdb.train.metrics import Metrics


def _step(step, loss=6.0, correct=3.0, weight=4.0, grad_norm=0.5):
  return Metrics.of_step(*(jnp.asarray(x) for x in (
      step, loss, correct, weight, grad_norm)))


def _numbers(metrics):
  return {k: float(v) for k, v in vars(metrics).items()}


def test_means_divide_by_the_weight():
  assert _step(1).means() == {'loss': 1.5, 'accuracy': 0.75, 'n': 4}


def test_an_epoch_without_a_label_has_no_means():
  step = _step(1, loss=0.0, correct=0.0, weight=0.0)
  assert (step.skipped, step.bad_loss) == (0, 0)  # config.debug traps a NaN
  with pytest.raises(UserError, match='no training review has a label'):
    (Metrics.zero() + step).means()
  assert (step + _step(2)).means() == {'loss': 1.5, 'accuracy': 0.75, 'n': 4}


def test_steps_add_up():
  total = Metrics.zero() + _step(1) + _step(2, loss=2.0, weight=1.0)
  assert _numbers(total) == {
      'loss': 8, 'correct': 6, 'weight': 5, 'grad_norm': 1, 'skipped': 0,
      'bad_step': 0, 'bad_loss': 0, 'bad_grad_norm': 0}


@pytest.mark.parametrize('bad', [
    {'loss': np.nan}, {'loss': np.inf}, {'grad_norm': np.nan}])
def test_a_bad_step_is_in_no_sum_but_its_own(bad):
  total = _numbers(_step(1) + _step(2, **bad) + _step(3))
  assert total['skipped'] == 1 and total['bad_step'] == 2
  assert (total['loss'], total['correct'], total['weight'],
          total['grad_norm']) == (12, 6, 8, 1)
  assert not np.isfinite(total['bad_loss'] + total['bad_grad_norm'])


def test_of_several_bad_steps_the_first_is_told_of():
  total = _step(1) + _step(2, loss=np.inf) + _step(3, loss=-np.inf)
  assert _numbers(total)['bad_step'] == 2
  assert float(total.bad_loss) == np.inf and float(total.skipped) == 2


def test_an_epoch_that_begins_forgets_the_one_before():
  before = _step(1) + _step(2, loss=np.nan)
  assert _numbers(before.unless(jnp.asarray(True))) == _numbers(Metrics.zero())
  kept = before.unless(jnp.asarray(False))
  jax.tree.map(np.testing.assert_array_equal, kept, before)
