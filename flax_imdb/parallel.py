"""Devices: placement of state and batches, and the one pmap wrapper.

Parameters are truly replicated: no array has a device axis but the batch. A
`pmap` with `in_axes=None` for them is the form with the cheapest dispatch.

Without jit (config.debug) there is one device and no pmap: the arrays that the
model sees are then real ones, to print or to inspect in a debugger.
"""

from collections.abc import Callable
from collections.abc import Sequence
import time
from typing import Any

import jax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from flax_imdb import processes
from flax_imdb.errors import UserError

AXIS = 'batch'


def _devices() -> list[jax.Device]:
  return jax.local_devices()[:1 if _debugging() else None]


def _debugging() -> bool:
  return jax.config.jax_disable_jit  # type: ignore[attr-defined]


def check(global_batch_size: int) -> None:
  """Checks that the devices of all processes share a batch evenly.

  Raises:
    UserError: they do not; names the sizes that would fit.
  """
  n = len(_devices()) * processes.count()
  if processes.count() > 1 and n != jax.device_count():
    raise UserError('the processes have different numbers of devices: give '
                    'each as many, for instance with JAX_NUM_CPU_DEVICES')
  if global_batch_size % n:
    raise UserError(
        f'config.global_batch_size={global_batch_size} is not divisible by the '
        f'{n} devices: use {max(1, global_batch_size // n) * n}'
        + (', or set JAX_NUM_CPU_DEVICES to a divisor'
           if jax.default_backend() == 'cpu' else ''))


def replicate(tree: Any) -> Any:
  """Puts a tree of arrays whole on every local device.

  The placement is the one `data_parallel` returns its state in: any other
  would compile the step a second time.
  """
  mesh = Mesh(np.array(_devices()), (AXIS,))
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def to_host(tree: Any) -> Any:
  """Copies a replicated tree to NumPy arrays, from the first local device."""
  # A copy: a mere view would keep the buffer from being donated. Not `x[0]`,
  # which gathers from all devices.
  return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data), tree)


def own_rows(global_batch_size: int) -> slice:
  """The rows of a batch that the devices of this process work on."""
  n = global_batch_size // processes.count()
  return slice(processes.index() * n, (processes.index() + 1) * n)


def gather_rows(rows: np.ndarray) -> np.ndarray:
  """The `own_rows` of all processes, joined along the last axis; [..., B]."""
  if processes.count() == 1:
    return rows
  from jax.experimental import multihost_utils
  return np.concatenate(list(multihost_utils.process_allgather(rows)), axis=-1)


def shard(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Splits rows among the local devices: [B, ...] to [D, B/D, ...].

  B and D are those of this process.
  """
  n = len(_devices())
  return {k: v.reshape(n, -1, *v.shape[1:]) for k, v in batch.items()}


def data_parallel(step: Callable[[Any, Any], tuple[Any, Any]],
                  devices: Sequence[jax.Device] | None = None) -> Callable:
  """Compiles step(state, batch) -> (state, sums) for the devices of all.

  Args:
    step: works on one device's rows; must add up what depends on them with
      `sum_over_devices`, or the devices drift apart unseen.
    devices: instead of those there are, to lower the step for them; may be
      described rather than there, as in `ahead_of_time`.

  Returns:
    A function of a replicated state, whose buffers it reuses, and a batch of
    `shard`; both results are replicated. It returns before they are computed,
    and on a CPU begins once the step before is over.
  """
  if _debugging():
    return lambda state, batch: step(state, _only_shard(batch))
  compiled = jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=(None, None),
                      devices=devices, donate_argnums=0)
  if devices is not None or jax.default_backend() != 'cpu':
    return compiled
  # One thread a device, as in `environment`: queued steps would take those that
  # the others' all-reduce waits for, and never end.
  return lambda state, batch: compiled(jax.block_until_ready(state), batch)


def forward(function: Callable[[Any, Any], Any],
            devices: Sequence[jax.Device] | None = None) -> Callable:
  """Compiles function(params, batch) -> rows; the rows keep the device axis.

  `devices` as in `data_parallel`.
  """
  if _debugging():
    return lambda params, batch: function(params, _only_shard(batch))
  return jax.pmap(
      function, AXIS, in_axes=(None, 0), out_axes=0, devices=devices)


def sum_over_devices(tree: Any) -> Any:
  """Adds up a tree over the devices, inside a `data_parallel` step."""
  if _debugging():
    return tree
  # One vector is one all-reduce; over gloo a tree costs one round trip a leaf.
  vector, unravel = ravel_pytree(tree)
  return unravel(jax.lax.psum(vector, AXIS))


def row_keys(key: jax.Array, rows: int) -> jax.Array:
  """Derives one PRNG key for each of this device's rows.

  A key depends on the row's place in the global batch, not on the number of
  devices, so dropout is the same on any of them.
  """
  device = 0 if _debugging() else jax.lax.axis_index(AXIS)
  place = device * rows + jax.numpy.arange(rows)
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(place)


def _only_shard(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {k: v[0] for k, v in batch.items()}


class CompileClock:
  """Times the compilations: the first call for each batch width."""

  def __init__(self):
    self._count, self._seconds = 0, 0.0

  def wrap(self, function: Callable[[Any, dict], Any]) -> Callable:
    """Counts what function(state, batch) compiles; waits for it."""
    seen = set()
    def timed(state, batch):
      shape = batch['ids'].shape
      if shape in seen:
        return function(state, batch)
      seen.add(shape)
      start = time.perf_counter()
      result = jax.block_until_ready(function(state, batch))
      self._count += 1
      self._seconds += time.perf_counter() - start
      return result
    return timed

  def take(self) -> str:
    """A few words on the compilations since the last call, '' if none."""
    count, seconds = self._count, self._seconds
    self._count, self._seconds = 0, 0.0
    if not count:
      return ''
    shapes = 'batch shape' if count == 1 else 'batch shapes'
    return f', {count} {shapes} compiled in {seconds:.1f} s'
