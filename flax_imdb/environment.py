"""What must be set before jax is imported. Imports nothing heavy itself.

Each is a default: what the user's environment says stays, or is refused.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import subprocess

from flax_imdb.errors import UserError
from flax_imdb.storage import cache

# With fewer reviews than this a device waits more than it works.
MIN_ROWS_PER_DEVICE = 16
# What jax needs to be installed for another platform than the CPU.
_CUDA = ('jax_cuda12_plugin', 'jax_cuda13_plugin')
_ACCELERATORS = ('libtpu', *_CUDA)
_CGROUPS = pathlib.Path('/sys/fs/cgroup')
_OWN_CGROUP = pathlib.Path('/proc/self/cgroup')


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


def available_cores() -> int:
  """The cores that this process may use, at least 1."""
  cores = len(os.sched_getaffinity(0)) if hasattr(
      os, 'sched_getaffinity') else os.cpu_count() or 1
  return max(1, int(min(cores, _quota(), _slurm_share())))


def _quota() -> float:
  """Processor seconds a second that cgroups let a container have; or inf.

  Other than of the affinity, jax and Python know nothing of it: a thread a core
  of the host would be stopped for most of the time.
  """
  try:
    lines = _OWN_CGROUP.read_text().splitlines()
  except OSError:  # no Linux
    return float('inf')
  least = float('inf')
  for line in lines:
    _, controllers, path = line.split(':', 2)
    if controllers and 'cpu' not in controllers.split(','):
      continue
    top = _CGROUPS / 'cpu' if controllers else _CGROUPS  # version 1, or 2
    folder = top / path.lstrip('/')
    # In a container the path may be the host's, and the top its own.
    for group in {top, *(x for x in (folder, *folder.parents)
                         if x.is_relative_to(top))}:
      least = min(least, _quota_of(group))
  return least


def _quota_of(group: pathlib.Path) -> float:
  for names in (['cpu.max'], ['cpu.cfs_quota_us', 'cpu.cfs_period_us']):
    try:
      quota, period = ' '.join(
          (group / name).read_text() for name in names).split()
    except (OSError, ValueError):  # not there
      continue
    if quota not in ('max', '-1'):
      return int(quota) / int(period)
  return float('inf')


def slurm_tasks() -> int | None:
  """How many processes the SLURM step has that this is one of, else None.

  Raises UserError if SLURM's variable for it is malformed.
  """
  env = os.environ
  if not ('SLURM_STEP_NODELIST' in env and 'SLURM_PROCID' in env):
    return None
  # The shell that salloc opens is a step of one task in a job of several.
  name = ('SLURM_STEP_NUM_TASKS' if 'SLURM_STEP_NUM_TASKS' in env
          else 'SLURM_NTASKS')
  return _count(name, env.get(name, '1'))


def _slurm_share() -> float:
  """The cores of this task, which SLURM need not have bound to them; or inf."""
  env = os.environ
  if not slurm_tasks():
    return float('inf')
  if 'SLURM_CPUS_PER_TASK' in env:
    return _count('SLURM_CPUS_PER_TASK', env['SLURM_CPUS_PER_TASK'])
  # '4(x2),3' are 4 on two nodes and 3 on another. All tasks take as many.
  tasks = re.findall(r'(?:^|,)(\d+)', env.get('SLURM_STEP_TASKS_PER_NODE', ''))
  if not tasks or 'SLURM_CPUS_ON_NODE' not in env:
    return float('inf')
  return (_count('SLURM_CPUS_ON_NODE', env['SLURM_CPUS_ON_NODE'])
          // max(map(int, tasks)))


def configure(global_batch_size: int) -> None:
  """Sets the environment variables that jax and XLA read when they start.

  And how glibc allocates, see `_keep_freed_memory`.

  Raises UserError if one of the user's is malformed, or would be a deadlock.
  """
  env = os.environ
  for name in ('JAX_NUM_CPU_DEVICES', 'NPROC'):
    if not env.get(name):  # jax refuses an empty one
      env.pop(name, None)
  cores = available_cores()
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
  # The embedding's gradient adds up rows in whatever order the threads arrive:
  # without this, a resumed run would not reach the same bits.
  if any(map(importlib.util.find_spec, _CUDA)):
    flags.append('--xla_gpu_deterministic_ops=true')
  given = env.get('XLA_FLAGS', '')
  env['XLA_FLAGS'] = ' '.join(
      [given, *(f for f in flags if f.split('=')[0] not in given)]).strip()
  env.setdefault('JAX_COMPILATION_CACHE_DIR', str(cache.directory() / 'xla'))
  # By default only what took over a second to compile is kept: nothing, here.
  env.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  env.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
  env.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # XLA's C++ log: errors only
  _keep_freed_memory()


def shares(jobs: int, global_batch_size: int) -> list[dict[str, str]]:
  """Variables of each of so many runs at once: a GPU, or a share of the cores.

  One run has all, and so are no variables set. Raises UserError where there
  are fewer GPUs or cores; a TPU, too, takes one run at a time.
  """
  if jobs == 1:
    return [{}]
  if (os.environ.get('JAX_PLATFORMS') != 'cpu'
      and any(map(importlib.util.find_spec, _ACCELERATORS))):
    gpus = _gpus()
    if len(gpus) < jobs:
      raise UserError(
          f'--jobs={jobs}: each run takes a GPU, and there are {len(gpus)}: '
          f'give --jobs={len(gpus) or 1}, or set JAX_PLATFORMS=cpu')
    return [{'CUDA_VISIBLE_DEVICES': gpu} for gpu in gpus[:jobs]]
  if jobs > (cores := available_cores()):
    raise UserError(f'--jobs={jobs}: there are {cores} cores: give '
                    f'--jobs={cores}, or fewer with several each')
  devices = _cpu_devices(global_batch_size, cores // jobs)
  given = os.environ.get('JAX_NUM_CPU_DEVICES') or (
      'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', ''))
  share = {} if given else {'JAX_NUM_CPU_DEVICES': str(devices)}
  return [share] * jobs


def _gpus() -> list[str]:
  """The GPUs that jax may use, as CUDA_VISIBLE_DEVICES names them."""
  given = os.environ.get('CUDA_VISIBLE_DEVICES')
  if given is not None:
    return [gpu for gpu in given.split(',') if gpu]
  try:
    process = subprocess.run(
        ['nvidia-smi', '--query-gpu=uuid', '--format=csv,noheader'],
        capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):  # no driver: no GPU
    return []
  return process.stdout.split()


def _keep_freed_memory() -> None:
  """Lets glibc keep what is freed, for the next step to use again.

  Else each step's scratch memory, if it takes over 32 MiB, is given back and
  asked for anew, and the kernel clears it page by page: configs/default.py
  would take half as long again. Elsewhere it does nothing.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt and not any(name.startswith('MALLOC_') for name in os.environ):
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # of malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, (1 << 31) - 1)
    mallopt(top_pad, 1 << 26)


def _count(name: str, value: str) -> int:
  """Reads a positive whole number of the environment."""
  if not (value.isascii() and value.isdigit() and int(value)):
    raise UserError(f'{name} is {value!r}, not a positive whole number: '
                    'unset it, or correct it')
  return int(value)
