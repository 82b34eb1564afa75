"""Recurrent cells and their scan over time, which never computes on padding.

Shapes: T time steps, B reviews, E input features, H = width.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

Carry = tuple[jax.Array, ...]


def _dense(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
  """Multiplies in `dtype`, adds up in float32 or better."""
  return jnp.dot(x.astype(dtype), kernel.astype(dtype),
                 preferred_element_type=jnp.promote_types(dtype, jnp.float32))


def _gates(x_BE: jax.Array, h_BH: jax.Array, params: dict[str, jax.Array],
           dtype: Any) -> list[jax.Array]:
  """The activated gates i, f, g, o, each [B, H], in Keras' order."""
  # One wide product costs a CPU less than two narrow ones.
  z = _dense(
      jnp.concatenate([x_BE, h_BH], axis=-1),
      jnp.concatenate([params['kernel'], params['recurrent_kernel']]),
      dtype) + params['bias']
  i, f, g, o = jnp.split(z, 4, axis=-1)
  return [nn.sigmoid(i), nn.sigmoid(f), jnp.tanh(g), nn.sigmoid(o)]


class LSTMCell(nn.Module):
  """Keras' LSTM cell: gates in the order i f g o, forget bias 1.

  Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers 2000:
  c' = sigmoid(f) c + sigmoid(i) tanh(g), h' = sigmoid(o) tanh(c').

  Attributes:
    width: H, units.
    dtype: of the operands of the matrix products; all else is float32.
  """
  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, carry: Carry, x_BE: jax.Array) -> Carry:
    c_BH, h_BH = carry
    h4 = 4 * self.width
    params = {
        'kernel': self.param(
            'kernel', nn.initializers.glorot_uniform(), (x_BE.shape[-1], h4)),
        'recurrent_kernel': self.param(
            'recurrent_kernel', nn.initializers.orthogonal(), (self.width, h4)),
        'bias': self.param('bias', _forget_one, (h4,))}
    i, f, g, o = _gates(x_BE, h_BH, params, self.dtype)
    c_BH = f * c_BH + i * g
    return c_BH, o * jnp.tanh(c_BH)

  def start(self, batch_size: int) -> Carry:
    """The carry (c, h) before the first step: zeros, float32 [B, H] each."""
    zeros = jnp.zeros((batch_size, self.width))
    return zeros, zeros


class SimpleRNNCell(nn.Module):
  """Keras' SimpleRNN cell, h' = tanh(x W + h R + b) (Elman 1990).

  Attributes: as `LSTMCell`.
  """
  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, carry: Carry, x_BE: jax.Array) -> Carry:
    h_BH, = carry
    kernel = self.param(
        'kernel', nn.initializers.glorot_uniform(),
        (x_BE.shape[-1], self.width))
    recurrent_kernel = self.param(
        'recurrent_kernel', nn.initializers.orthogonal(),
        (self.width, self.width))
    bias = self.param('bias', nn.initializers.zeros, (self.width,))
    return jnp.tanh(_dense(x_BE, kernel, self.dtype)
                    + _dense(h_BH, recurrent_kernel, self.dtype) + bias),

  def start(self, batch_size: int) -> Carry:
    """The carry (h,) before the first step: zeros, float32 [B, H]."""
    return jnp.zeros((batch_size, self.width)),


CELLS = {'lstm': LSTMCell, 'simple_rnn': SimpleRNNCell}


class _Step(nn.Module):
  """One time step: the cell, and the carry frozen where the review is over."""
  cell: str
  width: int
  dtype: Any
  mask_padding: bool

  @nn.compact
  def __call__(self, carry: Carry, inputs: tuple[jax.Array, jax.Array],
               lengths_B: jax.Array) -> tuple[Carry, Carry]:
    t, x_BE = inputs
    new = CELLS[self.cell](self.width, self.dtype, name='cell')(carry, x_BE)
    if self.mask_padding:
      inside_B1 = (t < lengths_B)[:, None]
      new = tuple(jnp.where(inside_B1, n, o) for n, o in
                  zip(new, carry, strict=True))
    # Adds nothing, unless `report` asks for the gradient at these places.
    new = tuple(self.perturb(name, x)
                for name, x in zip('ch'[-len(new):], new, strict=True))
    return new, new


class RecurrentLayer(nn.Module):
  """A cell scanned over time.

  Attributes:
    cell: a key of `CELLS`.
    width: H, units.
    dtype: of the operands of the matrix products.
    mask_padding: freeze the carry at t >= length. A backward layer then waits
      in its zero carry until it meets the review's last word, so no sequence
      is ever turned round.
    reverse: read from the last step to the first.
    gradient: how it is computed, to the same numbers but for rounding:
      'stored' keeps every gate for the backward pass; 'remat' keeps the carry
      and computes the gates again; 'fused' does so in `_lstm_gradient`,
      written by hand (an LSTM's only; other cells take 'remat').
  """
  cell: str
  width: int
  dtype: Any = jnp.float32
  mask_padding: bool = True
  reverse: bool = False
  gradient: str = 'fused'

  @nn.compact
  def __call__(self, x_TBE: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Runs the layer.

    Args:
      x_TBE: float32 [T, B, E] inputs, time first.
      lengths_B: int32 [B] valid steps of each review, 1 to T.

    Returns:
      float32 [T, B, H] hidden states; past a review's end its state repeats.
    """
    length, batch_size, _ = x_TBE.shape
    fused = self.gradient == 'fused' and self.cell == 'lstm'
    # prevent_cse only guards code outside of loops; in a scan it costs time.
    step = (_Step if fused or self.gradient == 'stored'
            else nn.remat(_Step, prevent_cse=False))
    scan = nn.scan(
        step, variable_broadcast='params', variable_axes={'perturbations': 0},
        split_rngs={'params': False},
        in_axes=(0, nn.broadcast), out_axes=0, reverse=self.reverse)
    carry = CELLS[self.cell](self.width, parent=None).start(batch_size)
    steps = scan(self.cell, self.width, self.dtype, self.mask_padding,
                 name='steps')

    def run(steps: nn.Module, x_TBE: jax.Array, lengths_B: jax.Array) -> Carry:
      return steps(carry, (jnp.arange(length), x_TBE), lengths_B)[1]

    if not fused:
      return run(steps, x_TBE, lengths_B)[-1]

    def forward(steps, x_TBE, lengths_B):
      states = run(steps, x_TBE, lengths_B)
      params = steps.variables['params']['cell']
      return states[-1], (params, x_TBE, lengths_B, *states)

    def backward(residuals, dh_TBH):
      dparams, dx_TBE = _lstm_gradient(
          *residuals, dh_TBH, dtype=self.dtype, reverse=self.reverse,
          mask_padding=self.mask_padding)
      return {'params': {'cell': dparams}}, dx_TBE, None

    return nn.custom_vjp(
        lambda *args: run(*args)[-1], forward, backward)(
            steps, x_TBE, lengths_B)


def _lstm_gradient(
    params: dict[str, jax.Array], x_TBE: jax.Array, lengths_B: jax.Array,
    c_TBH: jax.Array, h_TBH: jax.Array, dh_TBH: jax.Array, *, dtype: Any,
    reverse: bool, mask_padding: bool
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Backpropagation through time of the scanned `LSTMCell`, in one scan.

  As `nn.remat` it computes the gates again from the carry. Unlike what jax
  derives, it multiplies the joined [x, h] once each by the joined kernel, its
  transpose and dz, and adds up the kernel's gradient in place.

  Source: Graves 2012, section 4.6, without peepholes; z are the gates before
  their activation, and a frozen step hands its gradients through.

  Args:
    params: the cell's.
    x_TBE: the inputs.
    lengths_B: as the layer's.
    c_TBH: cell states after each step.
    h_TBH: hidden states after each step.
    dh_TBH: the gradient of the loss by the hidden states.
    dtype: as the layer's.
    reverse: as the layer's.
    mask_padding: as the layer's.

  Returns:
    The gradients by params and by x_TBE.
  """
  length, _, features = x_TBE.shape
  joined_kernel_T = jnp.concatenate(
      [params['kernel'], params['recurrent_kernel']]).T

  def step(carry, inputs):
    dc, dh_later, dkernel, dbias = carry
    t, x, c_new, dh = inputs
    before = t + 1 if reverse else t - 1
    is_first = (before < 0) | (before >= length)
    # Not as a scanned input: that needs a shifted copy of both.
    c, h = (jnp.where(is_first, 0, jax.lax.dynamic_index_in_dim(
        states, jnp.clip(before, 0, length - 1), keepdims=False))
            for states in (c_TBH, h_TBH))
    dh += dh_later
    inside = (t < lengths_B)[:, None] if mask_padding else True

    i, f, g, o = _gates(x, h, params, dtype)
    tanh_c = jnp.tanh(c_new)
    dh_inside = jnp.where(inside, dh, 0)
    dc_inside = jnp.where(inside, dc, 0) + dh_inside * o * (1 - tanh_c**2)
    dz = jnp.concatenate([
        dc_inside * g * i * (1 - i), dc_inside * c * f * (1 - f),
        dc_inside * i * (1 - g**2), dh_inside * tanh_c * o * (1 - o)], axis=-1)

    dxh = _dense(dz, joined_kernel_T, dtype)
    # Transposed before it is joined: a product with a transposed operand takes
    # the slow path on a CPU.
    dkernel += _dense(jnp.concatenate([x.T, h.T]), dz, dtype)
    dc = jnp.where(inside, dc_inside * f, dc)
    dh = jnp.where(inside, dxh[:, features:], dh)
    return (dc, dh, dkernel, dbias + dz.sum(axis=0)), dxh[:, :features]

  zeros_BH = jnp.zeros_like(dh_TBH[0])
  carry = (zeros_BH, zeros_BH, jnp.zeros_like(joined_kernel_T.T),
           jnp.zeros_like(params['bias']))
  (_, _, dkernel, dbias), dx_TBE = jax.lax.scan(
      step, carry, (jnp.arange(length), x_TBE, c_TBH, dh_TBH),
      reverse=not reverse)
  return {'kernel': dkernel[:features], 'recurrent_kernel': dkernel[features:],
          'bias': dbias}, dx_TBE


def _forget_one(key: jax.Array, shape: tuple[int], dtype: Any = jnp.float32):
  """Zeros, but 1 for the forget gate (Jozefowicz et al. 2015)."""
  del key
  return jnp.zeros(shape, dtype).at[shape[0] // 4:shape[0] // 2].set(1)
