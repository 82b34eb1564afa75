"""What is measured of each step, as a struct that adds and divides."""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp


@struct.dataclass
class Metrics:
  """Sums over steps, float32 [] each; a step's own are those of one step."""
  loss: jax.Array  # cross entropies in nats, added up over reviews
  correct: jax.Array  # reviews on the right side
  weight: jax.Array  # reviews
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
    """Of one step, counted from 1; `loss` is the sum over its reviews."""
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    def if_finite(x):
      return jnp.where(finite, x, 0)
    return cls(
        if_finite(loss), if_finite(correct), if_finite(weight),
        if_finite(grad_norm), skipped=(~finite).astype(jnp.float32),
        bad_step=step.astype(jnp.float32), bad_loss=loss / weight,
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
    """Mean loss in nats, accuracy, and n of which they are; on the host."""
    weight = float(self.weight)
    return {'loss': float(self.loss) / weight,
            'accuracy': float(self.correct) / weight, 'n': round(weight)}
