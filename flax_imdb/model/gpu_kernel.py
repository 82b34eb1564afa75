"""The LSTM as two Pallas Triton kernels, forward and backward, for a GPU.

A scan starts some 40 kernels a time step there; here all of time is one. A
block of the GPU reads `TILE` reviews in one direction, its carry in registers.
It takes `CHUNK` steps at a time: what needs no carry (inputs times kernel; of
the backward pass the gates, and the gradients of weights and inputs) is one
product over the chunk, and the steps between do the rest.

Shapes: T time steps, B reviews, E input features, H = width; S rows of a step,
R = CHUNK * S those of a chunk; D and F are E and H up to a power of two, which
Triton asks for: past the true sizes 0 is read, and nothing written.
"""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp

Weights = dict[str, jax.Array]

TILE = 16  # reviews a block: the fewest rows that a tensor core multiplies
CHUNK = 4  # time steps a product

_GATES = range(4)  # i f g o


# The largest width of which no register is spilled on an H100: at 128 those of
# the backward pass in bfloat16 are, and float32 needs more shared memory than
# there is.
MOST_WIDTH = 64


def refusal(width: int, dtype: Any) -> str | None:
  """Says in a line why there is no kernel of this width, or None."""
  if width <= MOST_WIDTH:
    return None
  return ('the GPU kernel keeps recurrent weights of at most width '
          f'{MOST_WIDTH} on the chip, not of {width} in '
          f'{jnp.dtype(dtype).name}')


def lstm(weights: Sequence[Weights], x_TBE: jax.Array, lengths_B: jax.Array, *,
         reverse: Sequence[bool], dtype: Any = jnp.float32,
         interpret: bool = False) -> list[jax.Array]:
  """Computes `RecurrentLayer` of `LSTMCell`s, its directions side by side.

  Differentiable in weights and inputs. float32 is multiplied as XLA does on a
  GPU: in TF32, unless jax_default_matmul_precision says otherwise.

  Args:
    weights: the parameters of `LSTMCell` a direction, float32: kernel [E, 4H],
      recurrent_kernel [H, 4H], bias [4H].
    x_TBE: float32 [T, B, E].
    lengths_B: int32 [B] valid steps of each review, 0 to T.
    reverse: a direction each, whether it reads from the last step.
    dtype: of the operands of the products; all else is float32.
    interpret: compute without a GPU, slowly.

  Returns:
    float32 [T, B, H] hidden states of each direction, where past a review's end
    its state repeats.

  Raises:
    ValueError: there is a `refusal` of this width and dtype.
  """
  width = weights[0]['recurrent_kernel'].shape[0]
  if not interpret and (reason := refusal(width, dtype)):
    raise ValueError(reason)
  return _lstm(tuple(reverse), jnp.dtype(dtype), interpret, list(weights),
               x_TBE, lengths_B)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _lstm(reverse, dtype, interpret, weights, x, lengths):
  return _lstm_forward(reverse, dtype, interpret, weights, x, lengths)[0]


def _lstm_forward(reverse, dtype, interpret, weights, x, lengths):
  width = weights[0]['recurrent_kernel'].shape[0]
  states = [_float32(*x.shape[:2], width) for _ in reverse]
  h, c = _call(_forward, reverse, dtype, interpret, (weights, x, lengths), (),
               (states, states))
  return h, (weights, x, lengths, h, c)


def _lstm_backward(reverse, dtype, interpret, kept, gradient):
  *read, h, c = kept
  weights, x, _ = read
  tiles = pl.cdiv(x.shape[1], TILE)
  of_tiles, of_x = _call(
      _backward, reverse, dtype, interpret, read, (h, c, gradient),
      (jax.tree.map(lambda w: _float32(tiles, *w.shape), weights),
       [_float32(*x.shape) for _ in reverse]))
  return jax.tree.map(lambda w: w.sum(axis=0), of_tiles), sum(of_x), None


_lstm.defvjp(_lstm_forward, _lstm_backward)


def _float32(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _power_of_two(size):
  return max(16, pl.next_power_of_2(size))  # a tensor core's least


def _call(kernel, reverse, dtype, interpret, read, inputs, outputs):
  """Runs `kernel` for each tile and direction; returns arrays like `outputs`.

  `inputs` and `outputs` are tuples of a list with an item a direction.
  """
  weights, x, _ = read
  width = weights[0]['recurrent_kernel'].shape[0]
  tiles = pl.cdiv(x.shape[1], TILE)
  # What gates activate, and its gradient: not in place, or a warp that is late
  # would read what another one has written.
  chunk = (2, 4, CHUNK * TILE, _power_of_two(width))
  arguments = (*read, inputs)
  tree = jax.tree.structure((*arguments, outputs))

  def run(*refs):
    weights, x, lengths, inputs, outputs = jax.tree.unflatten(tree, refs[:-1])
    tile = pl.program_id(0)
    for d, from_last in enumerate(reverse):
      @pl.when(pl.program_id(1) == d)
      def _(d=d, from_last=from_last):
        kernel(_Block(weights[d], x, lengths, refs[-1], tile, from_last, dtype,
                      interpret), *(refs[d] for refs in (*inputs, *outputs)))

  run.__name__ = 'lstm' + kernel.__name__
  flat, form = jax.tree.flatten(outputs)
  *results, _ = pl.pallas_call(
      run, grid=(tiles, len(reverse)), interpret=interpret, name=run.__name__,
      out_shape=[*flat, _float32(tiles, len(reverse), *chunk)],
      out_specs=[*(pl.BlockSpec() for _ in flat), pl.BlockSpec(
          (None, None, *chunk), lambda i, d: (i, d, 0, 0, 0, 0))],
      compiler_params=triton.CompilerParams(
          num_warps=8, num_stages=1),
  )(*jax.tree.leaves(arguments))
  return jax.tree.unflatten(form, results)


class _Rows(NamedTuple):
  """Reviews at time steps: where they are in [T, B, ...], and which count."""
  now: tuple[jax.Array, jax.Array]  # indices of time and review
  before: tuple[jax.Array, jax.Array]  # those of the carry that is read
  there: jax.Array  # bool: in the arrays at all
  inside: jax.Array  # bool: before the review's end
  begun: jax.Array  # bool: inside, and not the first step


class _Block:
  """A tile of reviews in one direction: what one block of the GPU computes."""

  def __init__(self, weights, x, lengths, scratch, tile, from_last, dtype,
               interpret):
    self.weights, self.x, self.scratch = weights, x, scratch
    self.from_last, self.dtype = from_last, dtype
    self.interpret = interpret
    self.length, self.batch, self.features = x.shape
    self.width, _ = weights['recurrent_kernel'].shape
    self.tile = tile
    self.of_x = jnp.arange(_power_of_two(self.features))  # [D]
    self.of_h = jnp.arange(_power_of_two(self.width))  # [F]
    def reviews(rows):
      b = self.tile * TILE + lax.rem(jnp.arange(rows), TILE)
      return b, _read(lengths, (b,), b < self.batch, 0)
    self.step_reviews = reviews(TILE)
    self.chunk_reviews = reviews(CHUNK * TILE)
    self.zeros_SF = jnp.zeros((TILE, len(self.of_h)))

  def _rows(self, step, b, lengths):
    def time(step):  # past the end where there is none
      t = self.length - 1 - step if self.from_last else step
      return jnp.where((step >= 0) & (step < self.length), t, self.length)
    there = (step < self.length) & (b < self.batch)
    inside = there & (time(step) < lengths)
    return _Rows((time(step), b), (time(step - 1), b), there, inside,
                 inside & (step > 0))

  def step(self, step):
    """The S rows of a step, counted from where the direction begins."""
    b, lengths = self.step_reviews
    return self._rows(jnp.full_like(b, step), b, lengths)

  def chunk(self, first):
    """The R rows of the steps from `first` on."""
    b, lengths = self.chunk_reviews
    return self._rows(first + lax.div(jnp.arange(len(b)), TILE), b, lengths)

  def place(self, name, gate):
    """Indices of a gate's weights, and where they are no filling."""
    of_gate, inside = gate * self.width + self.of_h, self.of_h < self.width
    if name == 'bias':
      return (of_gate,), inside
    rows, size = ((self.of_x, self.features) if name == 'kernel' else
                  (self.of_h, self.width))
    return ((rows[:, None], of_gate[None]),
            (rows < size)[:, None] & inside[None])

  def weight(self, name, gate):
    """A gate's weights, float32 [D, F], [F, F] or, of the bias, [F]."""
    return _read(self.weights[name], *self.place(name, gate))

  def dot(self, a, b, axes=(1, 0)):
    """Sums over the axis of a and that of b, in float32."""
    return lax.dot_general(
        a.astype(self.dtype), b.astype(self.dtype),
        (((axes[0],), (axes[1],)), ((), ())),
        preferred_element_type=jnp.float32)

  def inputs(self, rows):
    """float32 [R, D], 0 at padding."""
    return _read(self.x, *_columns(rows.now, rows.inside, self.of_x,
                                   self.features))

  def states(self, ref, place, mask):
    """float32 [., F] of a ref [T, B, H] at `_Rows`."""
    return _read(ref, *_columns(place, mask, self.of_h, self.width))

  def write(self, ref, rows, value):
    """Writes float32 [., F] into a ref [T, B, H] at `_Rows`."""
    _write(ref, value,
           *_columns(rows.now, rows.there, self.of_h, self.width))

  def places(self, part, i):
    """Where in that part of the scratch the gates of a chunk's step i are."""
    return [(part, k, pl.ds(i * TILE, TILE)) for k in _GATES]

  def barrier(self):
    """Lets a thread read what others of its block have written."""
    if not self.interpret:
      triton.debug_barrier()


def _read(ref, index, mask, other=0.):
  return triton.load(ref.at[index], mask=mask, other=other)


def _write(ref, value, index, mask):
  triton.store(ref.at[index], value, mask=mask)


def _columns(place, mask_R, columns, size):
  """Indices and mask of all columns, of which `size` are true, at rows."""
  return ((*(index[:, None] for index in place), columns[None]),
          mask_R[:, None] & (columns < size)[None])


def _activate(z):
  i, f, g, o = z
  return jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)


def _forward(block, h_ref, c_ref):
  recurrent = [block.weight('recurrent_kernel', k) for k in _GATES]

  def chunk(n, carry):
    x_RD = block.inputs(block.chunk(n * CHUNK))

    def project(k, _):
      block.scratch[0, k] = (block.dot(x_RD, block.weight('kernel', k))
                          + block.weight('bias', k)[None])
    lax.fori_loop(0, 4, project, None)
    block.barrier()

    def step(i, carry):
      h_SF, c_SF = carry
      rows = block.step(n * CHUNK + i)
      places = block.places(0, i)
      i, f, g, o = _activate([
          block.scratch[place] + block.dot(h_SF, kernel)
          for place, kernel in zip(places, recurrent, strict=True)])
      inside = rows.inside[:, None]
      c_SF = jnp.where(inside, f * c_SF + i * g, c_SF)
      h_SF = jnp.where(inside, o * jnp.tanh(c_SF), h_SF)
      block.write(h_ref, rows, h_SF)
      block.write(c_ref, rows, c_SF)
      return h_SF, c_SF

    carry = lax.fori_loop(0, CHUNK, step, carry)
    block.barrier()
    return carry

  lax.fori_loop(0, pl.cdiv(block.length, CHUNK), chunk,
                (block.zeros_SF, block.zeros_SF))


def _backward(block, h_ref, c_ref, gradient_ref, of_weights, of_x_ref):
  chunks = pl.cdiv(block.length, CHUNK)

  def chunk(turn, carry):
    n = chunks - 1 - turn
    rows = block.chunk(n * CHUNK)
    def read():
      return {'kernel': block.inputs(rows),
              'recurrent_kernel': block.states(h_ref, rows.before, rows.begun)}

    def project(k, read):
      block.scratch[0, k] = block.weight('bias', k)[None] + sum(
          block.dot(a, block.weight(name, k)) for name, a in read.items())
      return read
    lax.fori_loop(0, 4, project, read())
    block.barrier()
    recurrent = [block.weight('recurrent_kernel', k) for k in _GATES]
    carry = lax.fori_loop(
        0, CHUNK, functools.partial(step, n, recurrent), carry)
    block.barrier()

    def gradient(name, k, factor):
      dz_RF = block.scratch[1, k]
      index, mask = block.place(name, k)
      index = (jnp.full_like(index[0], block.tile), *index)
      sums = (dz_RF.sum(axis=0) if factor is None else
              block.dot(factor, dz_RF, (0, 0)))
      ref = of_weights[name]
      _write(ref, sums + _read(ref, index, mask & (turn > 0)), index, mask)
      return factor
    for name, factor in (read() | {'bias': None}).items():
      lax.fori_loop(0, 4, functools.partial(gradient, name), factor)

    def of_x(k, of_x_RD):
      return of_x_RD + block.dot(
          block.scratch[1, k], block.weight('kernel', k), (1, 1))
    of_x_RD = lax.fori_loop(
        0, 4, of_x, jnp.zeros((len(rows.there), len(block.of_x))))
    _write(of_x_ref, of_x_RD, *_columns(rows.now, rows.there, block.of_x,
                                        block.features))
    block.barrier()
    return carry

  def step(n, recurrent, turn, carry):
    dh_SF, dc_SF = carry
    at = CHUNK - 1 - turn
    rows = block.step(n * CHUNK + at)
    inside = rows.inside[:, None]
    i, f, g, o = _activate(
        [block.scratch[place] for place in block.places(0, at)])
    c_SF = block.states(c_ref, rows.before, rows.begun)
    tanh = jnp.tanh(f * c_SF + i * g)
    dh_SF += block.states(gradient_ref, rows.now, rows.there)
    dh = jnp.where(inside, dh_SF, 0)
    dc = jnp.where(inside, dc_SF, 0) + dh * o * (1 - tanh * tanh)
    dz = (dc * g * i * (1 - i), dc * c_SF * f * (1 - f), dc * i * (1 - g * g),
          dh * tanh * o * (1 - o))
    for place, z in zip(block.places(1, at), dz, strict=True):
      block.scratch[place] = z
    before = sum(block.dot(z, kernel, (1, 1))
                 for z, kernel in zip(dz, recurrent, strict=True))
    return (jnp.where(inside, before, dh_SF), jnp.where(inside, dc * f, dc_SF))

  lax.fori_loop(0, chunks, chunk, (block.zeros_SF, block.zeros_SF))
