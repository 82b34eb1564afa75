"""The forms in which a layer may be computed, and which one a device gets.

`recurrent.py`, the cell under `nn.scan`, is the definition; it draws the
parameters, and the other forms read them. A checkpoint knows no form.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_imdb.cluster import devices
from flax_imdb.errors import UserError
from flax_imdb.model import counted_loop, joint

# Steps and reviews of the layer that is compiled to see whether it can be.
_TRIED = 128, 512


class Layer(NamedTuple):
  """What a form must be able to do."""
  cell: str
  width: int
  features: int  # of the input
  dtype: str


def choose(recurrence: str, layer: Layer, device: jax.Device,
           announce: Callable[[str], None] | None = None) -> str:
  """The form, of `recurrence`'s, for a value of config.model.recurrence.

  `device` may be one that is only described. To train, `announce` is told what
  is chosen and why; without it, to evaluate, what the device does not have is
  the scan. Raises UserError if it does not have what is asked for.
  """
  if recurrence in ('scan', 'joint'):
    form = recurrence
  elif recurrence == 'interpret':  # to train, and see that it does
    form = recurrence if announce else 'scan'
  elif recurrence == 'loop':
    form = 'scan' if _no_loop(device) else 'loop'
  else:
    form, why = _kernel(layer, device)
    if why and recurrence == 'kernel' and announce:
      raise UserError(f'config.model.recurrence=kernel: {why}')
  if announce and recurrence != 'scan':
    announce(explain(form, recurrence, layer, device))
  return form


def to_predict(form: str, device: jax.Device) -> str:
  """The form that predicts on this device what a model of `form` learned.

  Where there is a loop it reads as far as the longest review of a batch, and
  gives the bits of the scan, which reads the padding behind that, too.
  """
  return 'loop' if form == 'scan' and not _no_loop(device) else form


def explain(
    form: str, recurrence: str, layer: Layer, device: jax.Device) -> str:
  """One line: the form that `choose` gave for this, and why."""
  why = 'as config.model.recurrence says'
  if recurrence == 'loop' and form == 'scan':
    why = f'for {_no_loop(device)}'
  elif recurrence in ('kernel', 'auto'):
    _, refused = _kernel(layer, device)
    why = f'for {refused}' if refused else 'which has a kernel of its own'
  return f'recurrence: {form} on {device.device_kind}, {why}'


def _no_loop(device: jax.Device) -> str:
  """Why a device has no loop, or ''."""
  if devices.debugging():
    return 'config.debug runs without jit'
  if device.platform != 'cpu':
    return 'a loop that counts its steps is for a CPU'
  return ''


@functools.lru_cache
def _kernel(layer: Layer, device: jax.Device) -> tuple[str, str]:
  """The form that is a device's kernel; or scan, and why it can't have it."""
  kind = device.device_kind
  if layer.cell != 'lstm':
    return 'scan', f'there is a kernel of lstm, none of {layer.cell}'
  if devices.debugging():
    return 'scan', 'config.debug runs without jit'
  if device.platform == 'tpu':
    # Only now, as below: no run on a CPU has use for Pallas, which takes longer
    # to import than Flax.
    from flax_imdb.model import tpu_kernel
    form, why = 'tpu', tpu_kernel.refusal(
        layer.width, layer.features, layer.dtype, kind)
  elif 'NVIDIA' in kind:
    from flax_imdb.model import gpu_kernel
    form, why = 'gpu', gpu_kernel.refusal(layer.width, layer.dtype)
  else:
    return 'scan', (f'{kind} is no TPU and no GPU of NVIDIA, which have a '
                    'kernel: give --config.model.recurrence=scan, or auto')
  why = why or _failure(form, layer, device)
  return ('scan', why) if why else (form, '')


def _failure(form: str, layer: Layer, device: jax.Device) -> str:
  """What the compiler says against the kernel on this device, or ''."""
  length, rows = _TRIED
  where = jax.sharding.SingleDeviceSharding(device)
  def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  h4 = 4 * layer.width
  weights = {'kernel': array(layer.features, h4),
             'recurrent_kernel': array(layer.width, h4), 'bias': array(h4)}
  def loss(weights, x_TBE, lengths_B):
    states, = recurrence(form, layer.cell, [weights], x_TBE, lengths_B,
                         reverse=[False], dtype=layer.dtype)
    return states.sum()
  try:
    jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(
        weights, array(length, rows, layer.features),
        array(rows, dtype=jnp.int32)).compile()
  except Exception as e:  # whatever a compiler can raise: it is passed on
    return f'it does not compile: {str(e).splitlines()[0]:.200}'
  return ''


def recurrence(form: str, cell: str, weights: Sequence[dict[str, jax.Array]],
               x_TBE: jax.Array, lengths_B: jax.Array, *,
               reverse: Sequence[bool], dtype: Any = jnp.float32,
               remat: bool = True) -> list[jax.Array]:
  """The layer in another form than scan; see `joint.recurrence`."""
  if form == 'joint':
    return joint.recurrence(
        cell, weights, x_TBE, lengths_B, reverse=reverse, dtype=dtype,
        remat=remat)
  if form == 'loop':
    return counted_loop.recurrence(
        cell, weights, x_TBE, lengths_B, reverse=reverse, dtype=dtype)
  if form == 'gpu':
    from flax_imdb.model import gpu_kernel as kernel
  else:
    from flax_imdb.model import tpu_kernel as kernel  # type: ignore[no-redef]
  return kernel.lstm(
      weights, x_TBE, lengths_B, reverse=reverse, dtype=dtype,
      interpret=form == 'interpret')
