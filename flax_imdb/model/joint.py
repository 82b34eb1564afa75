"""Both directions of a recurrent layer in one scan over time.

The directions share each product with the recurrent kernels, which stand in the
blocks of a diagonal, and the input is multiplied before the scan: fewer and
larger operations a time step than two scans have. An accelerator waits for
each; a CPU multiplies the zeros between the blocks.

Shapes: T time steps, B reviews, E input features, D directions, H width of
each, G gates of a cell.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_imdb.model.recurrent import CELLS, dense

Weights = dict[str, jax.Array]


def recurrence(cell: str, weights: Sequence[Weights], x_TBE: jax.Array,
               lengths_B: jax.Array, *, reverse: Sequence[bool],
               dtype: Any = jnp.float32, remat: bool = True
               ) -> list[jax.Array]:
  """What `RecurrentLayer`s of these weights return, float32 [T, B, H] each.

  Args:
    cell: a name of `CELLS`.
    weights: a direction each, the cell's parameters: `kernel` [E, GH],
      `recurrent_kernel` [H, GH] and `bias` [GH], float32.
    x_TBE: float32.
    lengths_B: int32, 0 to T: where t >= length the carry stands still.
    reverse: which directions read from the last step to the first.
    dtype: of the operands of products, which are added up in float32.
    remat: compute gates again in the backward pass.
  """
  length, rows, _ = x_TBE.shape
  directions = len(weights)
  width = weights[0]['recurrent_kernel'].shape[0]

  def beside(gates: list[jax.Array]) -> jax.Array:
    """[..., GH] a direction as [..., GDH]: gate by gate, as cells split."""
    apart = [x.reshape(*x.shape[:-1], -1, width) for x in gates]
    return jnp.stack(apart, axis=-2).reshape(*gates[0].shape[:-1], -1)

  def turned(x: jax.Array, direction: int) -> jax.Array:
    """[T, ...] in the order in which the direction reads, or back."""
    return x[::-1] if reverse[direction] else x

  z_TBZ = beside([turned(dense(x_TBE, w['kernel'], dtype) + w['bias'], d)
                  for d, w in enumerate(weights)])
  recurrent_kernel = jnp.concatenate([
      beside([w['recurrent_kernel'] if d == own else
              jnp.zeros_like(w['recurrent_kernel'])
              for d in range(directions)]) for own, w in enumerate(weights)])
  # [T, D]: the word that each direction reads at a step.
  words = jnp.stack([turned(jnp.arange(length), d)
                     for d in range(directions)], axis=1)

  def step(carry, inputs):
    words_D, z_BZ = inputs
    new = CELLS[cell].gates(
        carry, z_BZ + dense(carry[-1], recurrent_kernel, dtype))
    inside_BH = jnp.repeat(words_D < lengths_B[:, None], width, axis=1)
    new = tuple(jnp.where(inside_BH, n, o)
                for n, o in zip(new, carry, strict=True))
    return new, new[-1]

  # prevent_cse only guards code outside of loops; in a scan it costs time.
  if remat:
    step = jax.checkpoint(step, prevent_cse=False)
  carry = CELLS[cell](directions * width, parent=None).start(rows)
  _, h_TBH = jax.lax.scan(step, carry, (words, z_TBZ))
  return [turned(h, d)
          for d, h in enumerate(jnp.split(h_TBH, directions, axis=-1))]
