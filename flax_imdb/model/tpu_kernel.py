"""The LSTM over all of time as one TPU kernel forward and one backward.

A scan is some forty operations a time step, which wait for each other. Here
weights and carry stay on the chip, in VMEM, while chunks of time pass through:
x and h come and go as the grid walks, and each step is two products and what
lies between them. Both directions take their steps side by side, so that one
computes where the other waits. The backward kernel computes the gates again and
adds up the gradient of the weights on the chip.

Reviews lie in the 128 lanes of a register, so that gates are whole registers
even of a narrow layer. Shapes: T steps in chunks of K, B reviews in tiles of L,
E input features, H width; all are padded: E and H to whole sublanes with zero
weights, B and T with steps that no review has.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

LANES, _SUBLANES = 128, 8
_MOST_STEPS, _LEAST_STEPS = 64, 8  # of a chunk: more bring nothing
# MiB. What a kernel may take without being asked twice, on all chips.
_USUAL = 12
# What there is (the chips' data sheets), where it is more than 16.
_CAPACITY = {'TPU v5 lite': 128, 'TPU v5e': 128, 'TPU v5': 64, 'TPU v5p': 64,
             'TPU v6 lite': 128, 'TPU v6e': 128}
_F32 = jnp.float32

Weights = dict[str, jax.Array]


class _Plan(NamedTuple):
  """How a call is cut into pieces."""
  reverse: tuple[bool, ...]  # of each direction
  steps: int  # K
  chunks: int  # that make T
  tile: int  # L
  unrolled: int  # steps, whose gradients of the weights are added up at once
  dtype: str  # of the products' operands
  mib: int  # of VMEM to ask for
  interpret: bool


def refusal(width: int, features: int, dtype: Any, kind: str) -> str | None:
  """Why a TPU of this `device_kind` can't have the kernel, or None if it can.

  `features` are those of the layer's input.
  """
  need = _plan((False,), _LEAST_STEPS, 1, *_padded(features, width), dtype,
               False).mib
  if need <= (have := _CAPACITY.get(kind, 16)):
    return None
  return (f'config.model.width={width} takes {need} MiB of the {have} that '
          f'{kind} has on its chip: use a smaller one, '
          'config.model.dtype=bfloat16, or config.model.recurrence=joint')


def lstm(weights: Sequence[Weights], x_TBE: jax.Array, lengths_B: jax.Array, *,
         reverse: Sequence[bool], dtype: Any = jnp.float32,
         interpret: bool = False) -> list[jax.Array]:
  """What `RecurrentLayer`s of LSTM cells return, float32 [T, B, H] each.

  Args:
    weights: a direction each, the parameters of `LSTMCell`: `kernel` [E, 4H],
      `recurrent_kernel` [H, 4H] and `bias` [4H], float32.
    x_TBE: float32.
    lengths_B: int32, 0 to T: where t >= length the carry stands still.
    reverse: which directions read from the last step to the first.
    dtype: of the operands of products, which are added up in float32. Those of
      float32 a TPU rounds to bfloat16, here as in a scan.
    interpret: runs on a CPU, slowly, to compare.

  Has a gradient by weights and x.
  """
  length, rows, features = x_TBE.shape
  width = weights[0]['recurrent_kernel'].shape[0]
  e, h = _padded(features, width)
  plan = _plan(tuple(reverse), length, rows, e, h, dtype, interpret)
  if plan.mib > _USUAL and len(weights) > 1:  # they would not share the chip
    return [states for w, r in zip(weights, reverse, strict=True)
            for states in lstm([w], x_TBE, lengths_B, reverse=[r], dtype=dtype,
                               interpret=interpret)]
  pad_rows = -rows % plan.tile
  x_TEB = jnp.pad(jnp.swapaxes(x_TBE, 1, 2), (
      (0, plan.steps * plan.chunks - length), (0, e - features), (0, pad_rows)))
  lengths_1B = jnp.pad(lengths_B, (0, pad_rows))[None]
  kernels, biases = zip(*(_joined(w, e, h) for w in weights), strict=True)
  return [jnp.swapaxes(h_THB[:length, :width, :rows], 1, 2) for h_THB in
          _lstm(plan, lengths_1B, x_TEB, list(kernels), list(biases))]


def _joined(weights: Weights, e: int, h: int) -> tuple[jax.Array, jax.Array]:
  """The weights as float32 [4H, E + H], and the bias as [4H, LANES]."""
  def gates(x: jax.Array, rows: int) -> jax.Array:  # [n, 4 width] -> [4H, rows]
    x = x.reshape(len(x), 4, -1)
    x = jnp.pad(x, ((0, rows - len(x)), (0, 0), (0, h - x.shape[-1])))
    return x.reshape(rows, 4 * h).T
  bias = gates(weights['bias'][None], 1)
  return (jnp.concatenate([gates(weights['kernel'], e),
                           gates(weights['recurrent_kernel'], h)], axis=1),
          jnp.broadcast_to(bias, (4 * h, LANES)))


def _padded(features: int, width: int) -> tuple[int, int]:
  return features + -features % _SUBLANES, width + -width % _SUBLANES


def _plan(reverse: tuple[bool, ...], length: int, rows: int, e: int, h: int,
          dtype: Any, interpret: bool) -> _Plan:
  """Cuts T and B so that the backward kernel, the larger one, fits VMEM."""
  dtype = jnp.dtype(dtype)
  # Wide tiles hide what a step waits for, until they overflow the registers.
  tile = LANES * max(1, min(-(-rows // LANES), 4, 128 // h))
  unrolled = 2 if h <= 64 else 1  # wider gates keep the chip busy, and spill
  weights = 4 * h * (e + h)
  # Numbers a direction; blocks come twice, for one is copied while one is used.
  fixed = 2 * (2 * weights * dtype.itemsize / 4 + 4 * h * LANES  # kernels, bias
               + weights + 4 * h * tile)  # and their gradients
  fixed += 2 * h * tile + unrolled * 16 * h * tile  # carry, gates
  a_step = 2 * tile * (2 * e + 3 * h)  # x, dx, h, c and dh
  count = len(reverse)
  def mib(steps: int) -> float:
    return 4 * count * (fixed + steps * a_step) / 2**20
  most = min(_MOST_STEPS, max(_LEAST_STEPS, length + length % 2))
  while most > _LEAST_STEPS and mib(most) > _USUAL:
    most -= 2
  # Of the larger chunks those that fill up T with the fewest steps.
  steps = min(range(most, most // 2, -2), key=lambda steps: -length % steps)
  return _Plan(reverse, steps, -(-length // steps), tile, unrolled, dtype.name,
               int(mib(steps) + 1), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lstm(plan: _Plan, lengths_1B: jax.Array, x_TEB: jax.Array,
          kernels: list[jax.Array], biases: list[jax.Array]
          ) -> list[jax.Array]:
  """[T, H, B] a direction, of padded arrays as `_joined` makes them."""
  return _forward(plan, lengths_1B, x_TEB, kernels, biases, saved=False)[0]


def _lstm_fwd(plan: _Plan, lengths_1B: jax.Array, x_TEB: jax.Array,
              kernels: list[jax.Array], biases: list[jax.Array]):
  states, c_before = _forward(
      plan, lengths_1B, x_TEB, kernels, biases, saved=True)
  return states, (lengths_1B, x_TEB, kernels, biases, states, c_before)


def _lstm_bwd(plan: _Plan, residuals: tuple, d_states: list[jax.Array]):
  residuals = *residuals, d_states
  dx_TEB, d_kernels, d_biases = _backward(plan, *residuals)
  return (None, sum(dx_TEB), [dk.sum(axis=0).T for dk in d_kernels],
          [db.reshape(-1, *db.shape[1:2], db.shape[2] // LANES, LANES).sum(
              axis=(0, 2)) for db in d_biases])


_lstm.defvjp(_lstm_fwd, _lstm_bwd)


def _forward(plan: _Plan, lengths_1B: jax.Array, x_TEB: jax.Array,
             kernels: list[jax.Array], biases: list[jax.Array], saved: bool):
  """States [T, H, B] a direction; `saved`, also c before each step."""
  length, e, rows = x_TEB.shape
  h = kernels[0].shape[0] // 4
  times = _times(plan, plan.reverse)
  out = 2 if saved else 1
  return pl.pallas_call(
      functools.partial(_forward_kernel, plan),
      grid=(rows // plan.tile, plan.chunks),
      in_specs=[_of_tile(1, plan), times(e), *_fixed([kernels, biases])],
      out_specs=[times(h)] * out,
      out_shape=[[jax.ShapeDtypeStruct((length, h, rows), _F32)
                  for _ in kernels]] * out,
      scratch_shapes=[[pltpu.VMEM((h, plan.tile), _F32) for _ in kernels]] * 2,
      name=_name('forward', plan, rows), **_options(plan),
  )(lengths_1B, [x_TEB] * len(kernels), _cast(plan, kernels), biases)


def _backward(plan: _Plan, lengths_1B: jax.Array, x_TEB: jax.Array,
              kernels: list[jax.Array], biases: list[jax.Array],
              states: list[jax.Array], c_before: list[jax.Array],
              d_states: list[jax.Array]):
  """Gradients a direction: dx [T, E, B]; of each tile those of the weights.

  They are [tiles, E + H, 4H], and of the bias, reviews apart, [tiles, 4H, L].
  """
  length, e, rows = x_TEB.shape
  h4, joined = kernels[0].shape
  h, tiles = h4 // 4, rows // plan.tile
  times = _times(plan, tuple(not reverse for reverse in plan.reverse))
  transposed = [kernel.T for kernel in kernels]
  sums = [(joined, h4), (h4, plan.tile)]
  return pl.pallas_call(
      functools.partial(_backward_kernel, plan),
      grid=(tiles, plan.chunks),
      in_specs=[_of_tile(1, plan), times(e),
                *_fixed([kernels, transposed, biases]),
                _edges(plan, h), *[times(h)] * 3],
      out_specs=[times(e), *([pl.BlockSpec((None, *shape), lambda i, k: (
          i, 0, 0)) for _ in kernels] for shape in sums)],
      out_shape=[[jax.ShapeDtypeStruct((length, e, rows), _F32)
                  for _ in kernels],
                 *([jax.ShapeDtypeStruct((tiles, *shape), _F32)
                    for _ in kernels] for shape in sums)],
      scratch_shapes=[[pltpu.VMEM((h, plan.tile), _F32) for _ in kernels]] * 2,
      name=_name('backward', plan, rows), **_options(plan),
  )(lengths_1B, [x_TEB] * len(kernels), _cast(plan, kernels),
    _cast(plan, transposed), biases, states, states, c_before, d_states)


def _times(plan: _Plan, reverse: Sequence[bool]) -> Callable[[int], list]:
  """Blocks of K steps of [T, size, B] a direction, in the order it goes."""
  def index(backwards: bool) -> Callable:
    if backwards:
      return lambda i, k: (plan.chunks - 1 - k, 0, i)
    return lambda i, k: (k, 0, i)
  return lambda size: [pl.BlockSpec((plan.steps, size, plan.tile), index(r))
                       for r in reverse]


def _edges(plan: _Plan, size: int) -> list[pl.BlockSpec]:
  """The step of [T, size, B] that each direction read before its chunk."""
  def index(reverse: bool) -> Callable:
    if reverse:
      return lambda i, k: (
          jnp.minimum(k + 1, plan.chunks - 1) * plan.steps, 0, i)
    return lambda i, k: (
        jnp.maximum((plan.chunks - 1 - k) * plan.steps - 1, 0), 0, i)
  return [pl.BlockSpec((1, size, plan.tile), index(r)) for r in plan.reverse]


def _of_tile(size: int, plan: _Plan) -> pl.BlockSpec:
  return pl.BlockSpec((size, plan.tile), lambda i, k: (0, i))


def _fixed(arrays: list[list[jax.Array]]) -> list[list[pl.BlockSpec]]:
  """What stays in VMEM, whole."""
  return [[pl.BlockSpec(x.shape, lambda i, k: (0, 0)) for x in xs]
          for xs in arrays]


def _cast(plan: _Plan, kernels: list[jax.Array]) -> list[jax.Array]:
  return [kernel.astype(plan.dtype) for kernel in kernels]


def _name(way: str, plan: _Plan, rows: int) -> str:
  """With the numbers that `analysis/schedules.py` multiplies by."""
  return (f'lstm_{way}_{rows // plan.tile}x{plan.chunks}x'
          f'{plan.steps // plan.unrolled}')


def _options(plan: _Plan) -> dict[str, Any]:
  return {'interpret': plan.interpret,
          'compiler_params': pltpu.CompilerParams(
              dimension_semantics=('parallel', 'arbitrary'),  # tiles, time
              vmem_limit_bytes=max(16, plan.mib) << 20)}


def _forward_kernel(plan: _Plan, lengths_1L, xs, kernels, biases, states,
                    *rest) -> None:
  """One chunk of one tile. All refs but the first are lists, a direction each.

  `rest` are, where it is saved, c before each step, [K, H, L]; and the carry
  from one chunk to the next, h and c [H, L].
  """
  *c_before, h_carry, c_carry = rest
  _zero_at_first(h_carry, c_carry)
  chunk = pl.program_id(1)

  def step(number: jax.Array, carry: list) -> list:
    after = []
    for d, (h, c) in enumerate(carry):
      t, inside_1L = _place(
          plan, plan.reverse[d], chunk, number, lengths_1L)
      for saved in c_before:
        saved[d][t] = c
      i, f, g, o = _gates(
          plan, kernels[d], biases[d], jnp.concatenate([xs[d][t], h]))
      new_c = _sigmoid(f) * c + _sigmoid(i) * g
      h = jnp.where(inside_1L, _sigmoid(o) * jnp.tanh(new_c), h)
      states[d][t] = h
      after.append((h, jnp.where(inside_1L, new_c, c)))
    return after

  carry = _read(h_carry, c_carry)
  carry = jax.lax.fori_loop(
      0, plan.steps, step, carry, unroll=plan.unrolled)
  _write(carry, h_carry, c_carry)


def _backward_kernel(plan: _Plan, lengths_1L, xs, kernels, transposed, biases,
                     edges, states, c_before, d_states, dxs, d_kernels,
                     d_biases, dh_carry, dc_carry) -> None:
  """One chunk of one tile, in the other order of time; refs as forward.

  `edges` are the states that the chunk began with; the first of all with 0.
  `d_kernels` and `d_biases` stay in VMEM while the chunks of a tile pass.
  """
  _zero_at_first(dh_carry, dc_carry, d_kernels, d_biases)
  chunk = pl.program_id(1)
  edges_HL = [jnp.where(chunk == plan.chunks - 1, 0, edge[0]) for edge in edges]

  def step(number: jax.Array, d: int, carry: tuple) -> tuple:
    """Returns the carry, dz [4H, L] and what the step read, [E + H, L]."""
    t, inside_1L = _place(
        plan, not plan.reverse[d], chunk, number, lengths_1L)
    last = plan.steps - 1
    before = jnp.minimum(t + 1, last) if plan.reverse[d] else jnp.maximum(
        t - 1, 0)
    h = jnp.where(number == last, edges_HL[d], states[d][before])
    read, c = jnp.concatenate([xs[d][t], h]), c_before[d][t]
    i, f, g, o = _gates(plan, kernels[d], biases[d], read)
    forget = _sigmoid(f)
    tanh_c = jnp.tanh(forget * c + _sigmoid(i) * g)
    dh, dc = carry[0] + d_states[d][t], carry[1]
    dh_in = jnp.where(inside_1L, dh, 0)
    dc_in = jnp.where(inside_1L, dc, 0) + (
        dh_in * _sigmoid(o) * (1 - tanh_c * tanh_c))
    # i, f and o are tanh(z / 2), by which sigmoid(z) has a slope of a quarter
    # of 1 - tanh(z / 2)^2.
    dz = jnp.concatenate([
        dc_in * g * (.25 * (1 - i * i)), dc_in * c * (.25 * (1 - f * f)),
        dc_in * _sigmoid(i) * (1 - g * g),
        dh_in * tanh_c * (.25 * (1 - o * o))])
    d_read = _dot(plan, transposed[d][...], dz, 0)
    e = xs[d].shape[1]
    dxs[d][t] = d_read[:e]
    return ((d_read[e:] + jnp.where(inside_1L, 0, dh),
             jnp.where(inside_1L, dc_in * forget, dc)), dz, read)

  def steps(n: jax.Array, carry: list) -> list:
    after = []
    for d, of_direction in enumerate(carry):
      dk: Any = 0.
      db: Any = 0.
      for u in range(plan.unrolled):
        of_direction, dz, read = step(n * plan.unrolled + u, d, of_direction)
        dk += _dot(plan, read, dz, 1)
        db += dz
      d_kernels[d][...] += dk
      d_biases[d][...] += db
      after.append(of_direction)
    return after

  carry = jax.lax.fori_loop(
      0, plan.steps // plan.unrolled, steps, _read(dh_carry, dc_carry))
  _write(carry, dh_carry, dc_carry)


def _place(plan: _Plan, reverse: bool, chunk: jax.Array, number: jax.Array,
           lengths_1L) -> tuple[jax.Array, jax.Array]:
  """Where in its chunk a step is, and which reviews it is a word of."""
  if reverse:
    chunk, number = plan.chunks - 1 - chunk, plan.steps - 1 - number
  return number, chunk * plan.steps + number < lengths_1L[...]


def _gates(plan: _Plan, kernel, bias, read: jax.Array) -> list[jax.Array]:
  """Tanh of g, and of half of i, f and o: one operation, sigmoid is three."""
  z = _dot(plan, kernel[...], read, 0) + jnp.concatenate(
      [bias[...]] * (plan.tile // LANES), axis=1)
  i, f, g, o = jnp.split(z, 4)
  return [jnp.tanh(.5 * i), jnp.tanh(.5 * f), jnp.tanh(g), jnp.tanh(.5 * o)]


def _sigmoid(tanh_half: jax.Array) -> jax.Array:
  """sigmoid(z) of tanh(z / 2)."""
  return .5 * tanh_half + .5


def _dot(plan: _Plan, a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
  """The product over the last axis of `a` and this one of `b`."""
  return jax.lax.dot_general(
      a.astype(plan.dtype), b.astype(plan.dtype), (((1,), (axis,)), ((), ())),
      preferred_element_type=_F32)


def _zero_at_first(*refs) -> None:
  @pl.when(pl.program_id(1) == 0)
  def _() -> None:
    for of_directions in refs:
      for ref in of_directions:
        ref[...] = jnp.zeros_like(ref)


def _read(*refs) -> list[tuple[jax.Array, ...]]:
  return [tuple(ref[...] for ref in of_direction)
          for of_direction in zip(*refs, strict=True)]


def _write(carry: list[tuple[jax.Array, ...]], *refs) -> None:
  for values, of_direction in zip(carry, zip(*refs, strict=True), strict=True):
    for value, ref in zip(values, of_direction, strict=True):
      ref[...] = value
