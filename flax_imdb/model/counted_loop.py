"""A recurrent layer in a loop that ends with the longest review of its rows.

A scan has as many steps as a batch is wide, and each width is a program to
compile. This loop counts its steps when it runs: to be wider than its reviews
costs a batch the clearing of arrays, and a few widths are enough. JAX can't
differentiate such a loop backward: each step's carry is kept here, and a second
loop goes back over them, which computes the gates again. A GPU would have to
tell its host after each step whether to go on.

Shapes: T time steps, B reviews, E input features, H width.
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from flax_imdb.model.recurrent import CELLS, Carry, Summary

Weights = dict[str, jax.Array]


def recurrence(cell: str, weights: Sequence[Weights], x_TBE: jax.Array,
               lengths_B: jax.Array, *, reverse: Sequence[bool],
               dtype: Any = jnp.float32) -> list[jax.Array]:
  """As `joint.recurrence`, but that gates are always computed again."""
  return [_layer(cell, backward, dtype, w, x_TBE, lengths_B)
          for w, backward in zip(weights, reverse, strict=True)]


def summaries(cell: str, weights: Sequence[Weights], x_TBE: jax.Array,
              lengths_B: jax.Array, *, reverse: Sequence[bool],
              dtype: Any = jnp.float32) -> list[tuple[Summary, jax.Array]]:
  """What `RecurrentLayer`s that keep no states return; without a gradient."""
  steps = lengths_B.max()

  def of_direction(w: Weights, backward: bool) -> tuple[Summary, jax.Array]:
    def step(i, loop):
      (carry, summary), t = loop, steps - 1 - i if backward else i
      carry = _step(cell, dtype, w, carry, _at(x_TBE, t), t < lengths_B)
      return carry, summary.then(carry[-1], (t < lengths_B)[:, None])

    start = _start(cell, w, x_TBE)
    carry, summary = jax.lax.fori_loop(
        0, steps, step, (start, Summary.of_none(start[-1])))
    return summary, carry[-1]

  return [of_direction(w, backward)
          for w, backward in zip(weights, reverse, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _layer(cell: str, reverse: bool, dtype: Any, w: Weights, x_TBE: jax.Array,
           lengths_B: jax.Array) -> jax.Array:
  """The states of one direction, float32 [T, B, H]."""
  return _forward(cell, reverse, dtype, w, x_TBE, lengths_B)[0]


def _forward(cell, reverse, dtype, w, x_TBE, lengths_B):
  """The states, and what `_backward` needs: the carries, [T + 1, B, H] each."""
  length, steps = x_TBE.shape[0], lengths_B.max()
  start = _start(cell, w, x_TBE)

  def step(i, loop):
    carry, kept = loop
    t = steps - 1 - i if reverse else i
    carry = _step(cell, dtype, w, carry, _at(x_TBE, t), t < lengths_B)
    return carry, tuple(_put(a, x, t if reverse else t + 1)
                        for a, x in zip(kept, carry, strict=True))

  # Zeros are the carry before the first step, too, wherever that is.
  kept = tuple(jnp.zeros((length + 1, *x.shape), x.dtype) for x in start)
  carry, kept = jax.lax.fori_loop(0, steps, step, (start, kept))
  h_TBH = kept[-1][:-1] if reverse else jnp.where(
      _inside(length, steps), kept[-1][1:], carry[-1])
  return h_TBH, (w, x_TBE, lengths_B, kept)


def _backward(cell, reverse, dtype, saved, d_TBH):
  """The gradients by `w` and `x_TBE`, of that by the states."""
  w, x_TBE, lengths_B, kept = saved
  length, steps = x_TBE.shape[0], lengths_B.max()

  def step(i, loop):
    d_carry, d_w, d_x = loop
    t = i if reverse else steps - 1 - i
    carry = tuple(_at(a, t + 1 if reverse else t) for a in kept)
    _, back = jax.vjp(
        lambda w, carry, x: _step(cell, dtype, w, carry, x, t < lengths_B),
        w, carry, _at(x_TBE, t))
    by_w, d_carry, by_x = back(
        (*d_carry[:-1], d_carry[-1] + _at(d_TBH, t)))
    return d_carry, jax.tree.map(jnp.add, d_w, by_w), _put(d_x, by_x, t)

  *others, d_h = (jnp.zeros_like(a[0]) for a in kept)
  if not reverse:  # the last state repeats up to the width
    d_h = d_TBH.sum(axis=0, where=~_inside(length, steps))
  _, d_w, d_x = jax.lax.fori_loop(0, steps, step, (
      (*others, d_h), jax.tree.map(jnp.zeros_like, w), jnp.zeros_like(x_TBE)))
  return d_w, d_x, None


_layer.defvjp(_forward, _backward)


def _start(cell: str, w: Weights, x_TBE: jax.Array) -> Carry:
  return CELLS[cell](
      w['recurrent_kernel'].shape[0], parent=None).start(x_TBE.shape[1])


def _step(cell: str, dtype: Any, w: Weights, carry: Carry, x_BE: jax.Array,
          inside_B: jax.Array) -> Carry:
  """The next carry, which is the last one where the review is over."""
  width = w['recurrent_kernel'].shape[0]
  new = CELLS[cell](width, dtype, parent=None).apply({'params': w}, carry, x_BE)
  return tuple(jnp.where(inside_B[:, None], n, o)
               for n, o in zip(new, carry, strict=True))


def _at(x: jax.Array, t: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(x, t, keepdims=False)


def _put(x: jax.Array, value: jax.Array, t: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(x, value, t, 0)


def _inside(length: int, steps: jax.Array) -> jax.Array:
  """Which of the time steps are computed, bool [T, 1, 1]."""
  return (jnp.arange(length) < steps)[:, None, None]
