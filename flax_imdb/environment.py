"""What must be set before jax is imported. Imports nothing heavy itself.

Each is a default: what the user's environment says stays, or is refused.
"""

import importlib.metadata
import importlib.util
import os
import re

from flax_imdb.errors import UserError
from flax_imdb.storage import cache

# With fewer reviews than this a device waits more than it works.
MIN_ROWS_PER_DEVICE = 16
# What jax needs to be installed for another platform than the CPU.
_ACCELERATORS = ('libtpu', 'jax_cuda12_plugin', 'jax_cuda13_plugin')


# jaxlib that computes wrongly, and where that is told.
_WRONG = {'0.10.2': 'on CPUs: github.com/jax-ml/jax/issues/39103'}


def check_jaxlib() -> None:
  """Raises UserError for a jaxlib that is known to compute wrongly."""
  version = importlib.metadata.version('jaxlib')
  if why := _WRONG.get(version):
    raise UserError(f'jaxlib {version} computes wrongly ({why}): pip install '
                    f"--upgrade 'jax!={version}', which takes jaxlib with it")


def _cpu_devices(global_batch_size: int, cores: int) -> int:
  """One a core, if the batch is divided evenly and each has work enough."""
  most = min(cores, global_batch_size // MIN_ROWS_PER_DEVICE)
  return max((n for n in range(1, most + 1) if global_batch_size % n == 0),
             default=1)


def configure(global_batch_size: int) -> None:
  """Sets the environment variables that jax and XLA read when they start.

  Raises UserError if one of the user's is malformed, or would be a deadlock.
  """
  env = os.environ
  for name in ('JAX_NUM_CPU_DEVICES', 'NPROC'):
    if not env.get(name):  # jax refuses an empty one
      env.pop(name, None)
  cores = len(os.sched_getaffinity(0)) if hasattr(
      os, 'sched_getaffinity') else os.cpu_count() or 1
  if 'xla_force_host_platform_device_count' not in env.get('XLA_FLAGS', ''):
    env.setdefault(
        'JAX_NUM_CPU_DEVICES', str(_cpu_devices(global_batch_size, cores)))
  # One thread a device: of a larger pool, such as XLA's own of a thread a core,
  # idle threads take kernels of microseconds from busy ones, which costs up to
  # a fifth of a step. In a smaller one no device may be left to arrive at the
  # all-reduce that the others wait in: `cluster.devices` runs a step at a time.
  forced = re.search(r'--xla_force_host_platform_device_count=(\S*)',
                     env.get('XLA_FLAGS', ''))
  if 'JAX_NUM_CPU_DEVICES' in env:
    devices = _count('JAX_NUM_CPU_DEVICES', env['JAX_NUM_CPU_DEVICES'])
  else:
    devices = _count(forced[0], forced[1]) if forced else 1
  platforms = env.get('JAX_PLATFORMS') or ''
  accelerator = any(map(importlib.util.find_spec, _ACCELERATORS))
  pool = devices
  if accelerator and platforms != 'cpu':  # whose compilers may take all cores
    pool = max(devices, cores)
  threads = _count('NPROC', env.setdefault('NPROC', str(pool)))
  if threads < devices and platforms in ('', 'cpu'):
    raise UserError(
        f'NPROC={threads} threads are too few for {devices} CPU devices, which '
        'would wait for each other for ever: unset NPROC, set it to at least '
        f'{devices}, or set JAX_NUM_CPU_DEVICES={threads}')
  # Whole AVX-512 registers, which LLVM avoids by itself, save 4 %; elsewhere
  # the flag means nothing. LLVM's later passes take a third of the compilation
  # and save nothing here; what they do for a GPU is not known, so they stay.
  flags = ['--xla_cpu_prefer_vector_width=512']
  if not accelerator:
    flags.append('--xla_backend_optimization_level=1')
  given = env.get('XLA_FLAGS', '')
  env['XLA_FLAGS'] = ' '.join(
      [given, *(f for f in flags if f.split('=')[0] not in given)]).strip()
  env.setdefault('JAX_COMPILATION_CACHE_DIR', str(cache.directory() / 'xla'))
  # By default only what took over a second to compile is kept: nothing, here.
  env.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  env.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
  env.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # XLA's C++ log: errors only


def _count(name: str, value: str) -> int:
  """Reads a positive whole number of the environment."""
  if not (value.isascii() and value.isdigit() and int(value)):
    raise UserError(f'{name} is {value!r}, not a positive whole number: '
                    'unset it, or correct it')
  return int(value)
