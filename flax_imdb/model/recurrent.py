"""Recurrent cells and their scan over time, which never computes on padding.

Shapes: T time steps, B reviews, E input features, H = width.
"""

from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

Carry = tuple[jax.Array, ...]


def dense(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
  """Multiplies [..., n] and [n, m] in `dtype`, adds up in float32 or better."""
  return jnp.dot(x.astype(dtype), kernel.astype(dtype),
                 preferred_element_type=jnp.promote_types(dtype, jnp.float32))


class LSTMCell(nn.Module):
  """Keras' LSTM cell: gates in the order i f g o, forget bias 1.

  Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers 2000:
  c' = sigmoid(f) c + sigmoid(i) tanh(g), h' = sigmoid(o) tanh(c'). The operands
  of the matrix products are of `dtype`; all else is float32.
  """
  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, carry: Carry, x_BE: jax.Array) -> Carry:
    _, h_BH = carry
    h4 = 4 * self.width
    kernel = self.param(
        'kernel', nn.initializers.glorot_uniform(), (x_BE.shape[-1], h4))
    recurrent_kernel = self.param(
        'recurrent_kernel', nn.initializers.orthogonal(), (self.width, h4))
    bias = self.param('bias', _forget_one, (h4,))
    # One wide product costs a CPU less than two narrow ones; so it is backward.
    z = dense(jnp.concatenate([x_BE, h_BH], axis=-1),
               jnp.concatenate([kernel, recurrent_kernel]), self.dtype) + bias
    return self.gates(carry, z)

  @staticmethod
  def gates(carry: Carry, z: jax.Array) -> Carry:
    """The next carry, of [B, 4H] what goes into the gates."""
    c_BH, _ = carry
    i, f, g, o = jnp.split(z, 4, axis=-1)
    c_BH = nn.sigmoid(f) * c_BH + nn.sigmoid(i) * jnp.tanh(g)
    return c_BH, nn.sigmoid(o) * jnp.tanh(c_BH)

  def start(self, batch_size: int) -> Carry:
    """The carry (c, h) before the first step: zeros, float32 [B, H] each."""
    zeros = jnp.zeros((batch_size, self.width))
    return zeros, zeros


class SimpleRNNCell(nn.Module):
  """Keras' SimpleRNN cell, h' = tanh(x W + h R + b) (Elman 1990)."""
  width: int
  dtype: Any = jnp.float32  # as of `LSTMCell`

  @nn.compact
  def __call__(self, carry: Carry, x_BE: jax.Array) -> Carry:
    h_BH, = carry
    kernel = self.param('kernel', nn.initializers.glorot_uniform(),
                        (x_BE.shape[-1], self.width))
    recurrent_kernel = self.param(
        'recurrent_kernel', nn.initializers.orthogonal(),
        (self.width, self.width))
    bias = self.param('bias', nn.initializers.zeros, (self.width,))
    return self.gates(carry, dense(x_BE, kernel, self.dtype)
                      + dense(h_BH, recurrent_kernel, self.dtype) + bias)

  @staticmethod
  def gates(carry: Carry, z: jax.Array) -> Carry:
    """The next carry, of [B, H] what goes into tanh."""
    del carry
    return jnp.tanh(z),

  def start(self, batch_size: int) -> Carry:
    """The carry (h,) before the first step: zeros, float32 [B, H]."""
    return jnp.zeros((batch_size, self.width)),


class Summary(NamedTuple):
  """What pooling needs of the states of a review's words, float32 [B, H]."""
  most: jax.Array  # their maximum, -1 of none
  total: jax.Array  # their sum

  @classmethod
  def of_none(cls, start_BH: jax.Array) -> 'Summary':
    """That before the first step, as large as a state."""
    return cls(jnp.full_like(start_BH, -1), jnp.zeros_like(start_BH))

  @classmethod
  def of_states(cls, h_TBH: jax.Array, lengths_B: jax.Array) -> 'Summary':
    """That of states which are all there."""
    inside_TB1 = (jnp.arange(len(h_TBH))[:, None] < lengths_B)[..., None]
    return cls(jnp.max(h_TBH, axis=0, where=inside_TB1, initial=-1),
               jnp.sum(h_TBH, axis=0, where=inside_TB1))

  def then(self, h_BH: jax.Array, inside_B1: jax.Array) -> 'Summary':
    """That after one more state, where it is of a word."""
    return Summary(
        jnp.where(inside_B1, jnp.maximum(self.most, h_BH), self.most),
        jnp.where(inside_B1, self.total + h_BH, self.total))


CELLS: dict[str, Any] = {'lstm': LSTMCell, 'simple_rnn': SimpleRNNCell}


class _Step(nn.Module):
  """One time step: the cell, and the carry frozen where the review is over."""
  cell: str
  width: int
  dtype: Any
  mask_padding: bool

  @nn.compact
  def __call__(self, loop: tuple[Carry, Summary | None],
               inputs: tuple[jax.Array, jax.Array], lengths_B: jax.Array
               ) -> tuple[tuple[Carry, Summary | None], Any]:
    (carry, summary), (t, x_BE) = loop, inputs
    new = CELLS[self.cell](self.width, self.dtype, name='cell')(carry, x_BE)
    inside_B1 = (t < lengths_B)[:, None]
    if self.mask_padding:
      new = tuple(jnp.where(inside_B1, n, o) for n, o in
                  zip(new, carry, strict=True))
    # Adds nothing, unless `report` asks for the gradient at these places.
    new = tuple(self.perturb(name, x)
                for name, x in zip('ch'[-len(new):], new, strict=True))
    if summary is None:
      return (new, None), new[-1]
    return (new, summary.then(new[-1], inside_B1)), None


class RecurrentLayer(nn.Module):
  """A cell of `CELLS` scanned over time, with `width` H units."""
  cell: str
  width: int
  dtype: Any = jnp.float32
  # Freeze the carry at t >= length. A backward layer then waits in its zero
  # carry for the review's last word, so no sequence is ever turned round.
  mask_padding: bool = True
  reverse: bool = False  # read from the last step to the first
  # Compute the gates again in the backward pass rather than store them: on a
  # CPU twice as fast, for it writes a tenth of the memory.
  remat: bool = True
  keep_states: bool = True  # of all steps; else what pooling needs of them

  @nn.compact
  def __call__(self, x_TBE: jax.Array, lengths_B: jax.Array
               ) -> tuple[jax.Array | Summary, jax.Array]:
    """Reads float32 [T, B, E] inputs, int32 [B] valid steps of each, 0 to T.

    Returns float32 [T, B, H] hidden states, where past a review's end its state
    repeats, or their `Summary`; and [B, H] that after the last word read. Who
    needs only the latter spares the loop from writing the former.
    """
    length, batch_size, _ = x_TBE.shape
    # prevent_cse only guards code outside of loops; in a scan it costs time.
    step = nn.remat(_Step, prevent_cse=False) if self.remat else _Step
    scan = nn.scan(
        step, variable_broadcast='params', variable_axes={'perturbations': 0},
        split_rngs={'params': False},
        in_axes=(0, nn.broadcast), out_axes=0, reverse=self.reverse)
    start = CELLS[self.cell](self.width, parent=None).start(batch_size)
    none = None if self.keep_states else Summary.of_none(start[-1])
    steps = scan(self.cell, self.width, self.dtype, self.mask_padding,
                 name='steps')
    (carry, summary), h_TBH = steps(
        (start, none), (jnp.arange(length), x_TBE), lengths_B)
    return h_TBH if summary is None else summary, carry[-1]


def _forget_one(key: jax.Array, shape: tuple[int], dtype: Any = jnp.float32):
  """Zeros, but 1 for the forget gate (Jozefowicz et al. 2015)."""
  del key
  return jnp.zeros(shape, dtype).at[shape[0] // 4:shape[0] // 2].set(1)
