"""Devices: placement of state and batches, the one pmap and its all-reduce.

Parameters are truly replicated: no array has a device axis but the batch. A
`pmap` with `in_axes=None` for them is the form with the cheapest dispatch.

Without jit (config.debug) there is one device and no pmap: the arrays that the
model sees are then real ones, to print or to inspect in a debugger.
"""

from collections.abc import Callable, Sequence
import functools
import importlib.metadata
import platform
import sys
from typing import Any

import jax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from flax_imdb import __version__
from flax_imdb.cluster import processes
from flax_imdb.errors import UserError

AXIS = 'batch'
_WHOLE = {'bigram_rows'}  # that all devices need of a batch
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
VOTES = 'votes'  # of the processes that want to stop, see `preemption.Stop`


def _devices() -> list[jax.Device]:
  return jax.local_devices()[:1 if debugging() else None]


def debugging() -> bool:
  """Whether jit is off, so that nothing is compiled."""
  return jax.config.jax_disable_jit  # type: ignore[attr-defined]


def _count() -> int:
  """The devices of all processes; UserError if some have more than others."""
  n = len(_devices()) * processes.count()
  if processes.count() > 1 and n != jax.device_count():
    raise UserError('the processes have different numbers of devices: give '
                    'each as many, for instance with JAX_NUM_CPU_DEVICES')
  return n


def versions() -> dict[str, str]:
  """Those of the packages that compute."""
  return {name: importlib.metadata.version(name) for name in _PACKAGES}


def environment() -> dict[str, str]:
  """What the bits of a run depend on beside its config, for people to read."""
  return {
      'flax_imdb': __version__, 'Python': platform.python_version(),
      **versions(),
      'system': f'{sys.platform} {platform.machine()}',
      'devices': f'{_count()} x {_devices()[0].device_kind}'}


def memory() -> tuple[int, int] | None:
  """Bytes in use on the first local device, and how many a program may use.

  None where the backend does not say, as on a CPU.
  """
  found = _devices()[0].memory_stats() or {}
  if 'bytes_in_use' not in found or 'bytes_limit' not in found:
    return None
  return found['bytes_in_use'], found['bytes_limit']


def fill_up(batch_size: int) -> int:
  """The next larger batch that the devices of all share evenly, if need be.

  For what has no gradient, where the rows that are added cost but their time.
  Raises UserError if some processes have more devices than others.
  """
  return -(-batch_size // _count()) * _count()


def check_batch_size(global_batch_size: int) -> None:
  """Raises UserError if the devices of all can't share a batch evenly."""
  n = _count()
  if global_batch_size % n:
    raise UserError(
        f'config.global_batch_size={global_batch_size} is not divisible by the '
        f'{n} devices: use {max(1, global_batch_size // n) * n}'
        + (', or set JAX_NUM_CPU_DEVICES to a divisor'
           if jax.default_backend() == 'cpu' else ''))


def replicate(tree: Any) -> Any:
  """Puts a tree of arrays whole on every local device."""
  # As `data_parallel` returns its state, or the step would be compiled twice.
  mesh = Mesh(np.array(_devices()), (AXIS,))
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def to_host(tree: Any) -> Any:
  """Copies a replicated tree to NumPy arrays, from the first local device."""
  # A copy: a mere view would keep the buffer from being donated. Not `x[0]`,
  # which gathers from all devices.
  return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data), tree)


def share() -> tuple[int, slice]:
  """The number of devices of all processes, and those of this one."""
  own = len(_devices())
  first = processes.index() * own
  return _count(), slice(first, first + own)


def gather_rows(rows: np.ndarray) -> np.ndarray:
  """The rows of the `share` of each process, joined along the second axis."""
  if processes.count() == 1:
    return rows
  processes.report_alive()
  from jax.experimental import multihost_utils
  return np.concatenate(list(multihost_utils.process_allgather(rows)), axis=1)


def shard(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Splits rows among the D local devices: [B, ...] to [D, B/D, ...].

  An array of `_WHOLE` goes to each, [R, ...] to [D, R, ...].
  """
  n = len(_devices())
  return {k: np.broadcast_to(v, (n, *v.shape)) if k in _WHOLE else
          v.reshape(n, -1, *v.shape[1:]) for k, v in batch.items()}


def data_parallel(step: Callable[[Any, Any, Callable], tuple[Any, Any]],
                  devices: Sequence[jax.Device] | None = None) -> Callable:
  """Compiles step(state, batch, sum_over_devices) for the devices of all.

  `step` works on one device's rows and returns a state and sums. What depends
  on the rows it must add up in one call of `sum_over_devices`, or the devices
  drift apart unseen. `devices` are others than those there are, to lower the
  step for them; they may be described only, as in `analysis.ahead_of_time`.

  Returns a function of a replicated state, whose buffers it reuses, and a batch
  of `shard`. What it returns is replicated: (state, sums), or with `VOTES` in
  the batch, float32 [D, B/D], (state, (sums, votes)), the votes added up in the
  same all-reduce, to float32 []. It returns before they are computed, and on a
  CPU begins once the step before is over. Unless jit is off it has a `lower` of
  the same arguments, as what `jax.jit` returns has.
  """
  def voting_step(state, batch):
    votes = [batch[VOTES].sum()] if VOTES in batch else []
    def sum_over_devices(tree):
      nonlocal votes
      tree, votes = _sum_over_devices((tree, votes))
      return tree
    state, sums = step(state, batch, sum_over_devices)
    return state, (sums, *votes) if votes else sums

  if debugging():
    return lambda state, batch: voting_step(state, _only_shard(batch))
  compiled = jax.pmap(
      voting_step, AXIS, in_axes=(None, 0), out_axes=(None, None),
      devices=devices, donate_argnums=0)
  if devices is not None or jax.default_backend() != 'cpu':
    return compiled
  # One thread a device, as in `environment`: queued steps would take those that
  # the others' all-reduce waits for, and never end.
  @functools.wraps(compiled)  # and its `lower`
  def after_the_last(state, batch):
    return compiled(jax.block_until_ready(state), batch)
  return after_the_last


def data_parallel_forward(
    function: Callable[[Any, Any], Any],
    devices: Sequence[jax.Device] | None = None) -> Callable:
  """Compiles function(params, batch) -> rows, which keep the device axis."""
  if debugging():
    return lambda params, batch: function(params, _only_shard(batch))
  return jax.pmap(
      function, AXIS, in_axes=(None, 0), out_axes=0, devices=devices)


def _sum_over_devices(tree: Any) -> Any:
  if debugging():
    return tree
  # One vector is one all-reduce; over gloo a tree costs one round trip a leaf.
  vector, unravel = ravel_pytree(tree)
  return unravel(jax.lax.psum(vector, AXIS))


def _only_shard(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {k: jax.device_put(v[0]) for k, v in batch.items()}
