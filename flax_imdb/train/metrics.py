"""What is measured of each step, as a struct that adds and divides."""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp

from flax_imdb.errors import UserError


@struct.dataclass
class Metrics:
  """Sums over steps, float32 [] each; a step's own are those of one step."""
  # Cross entropies in nats, of reviews with a label, or of predicted words:
  # these are so many in an epoch that the sums are rounded, by some 1e-6.
  loss: jax.Array
  correct: jax.Array  # of these, those that are predicted right
  weight: jax.Array  # how many these are
  grad_norm: jax.Array  # norms of the gradient, added up over steps
  skipped: jax.Array  # steps that were not finite, in none of the above
  bad_step: jax.Array  # the first of them, counted from 1; else means nothing
  bad_loss: jax.Array  # its mean loss
  bad_grad_norm: jax.Array  # and the norm of its gradient

  @classmethod
  def zero(cls) -> 'Metrics':
    """Of no step."""
    return cls(**{x.name: jnp.zeros(()) for x in dataclasses.fields(cls)})

  @classmethod
  def of_step(cls, step: jax.Array, loss: jax.Array, correct: jax.Array,
              weight: jax.Array, grad_norm: jax.Array) -> 'Metrics':
    """Of one step, counted from 1, and of its reviews with a label, or words.

    `loss` is the sum over these, and `weight` how many they are.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    def if_finite(x):
      return jnp.where(finite, x, 0)
    return cls(
        if_finite(loss), if_finite(correct), if_finite(weight),
        if_finite(grad_norm), skipped=(~finite).astype(jnp.float32),
        bad_step=step.astype(jnp.float32),
        bad_loss=loss / jnp.maximum(weight, 1),  # there may be none
        bad_grad_norm=grad_norm)

  def __add__(self, later: 'Metrics') -> 'Metrics':
    """Of the steps of both; of those not finite the first is told of."""
    total = jax.tree.map(jnp.add, self, later)
    tell = (self.skipped == 0) & (later.skipped > 0)
    return total.replace(**{
        name: jnp.where(tell, getattr(later, name), getattr(self, name))
        for name in ('bad_step', 'bad_loss', 'bad_grad_norm')})

  def unless(self, condition: jax.Array) -> 'Metrics':
    """Of no step where bool [] `condition` is true."""
    return jax.tree.map(lambda x: jnp.where(condition, 0, x), self)

  def means(self) -> dict[str, float]:
    """Mean loss in nats, accuracy, and n of which they are; on the host.

    Raises UserError if no review had a label.
    """
    if not (weight := float(self.weight)):
      raise UserError('no training review has a label: give '
                      'config.data.train_split some that do')
    return {'loss': float(self.loss) / weight,
            'accuracy': float(self.correct) / weight, 'n': round(weight)}
