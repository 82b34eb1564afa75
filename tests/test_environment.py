"""What is set before jax starts, and that the user's settings stay."""

import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from flax_imdb import cli, environment, main
from flax_imdb.errors import TransientError, UserError
from flax_imdb.storage import cache

ROOT = pathlib.Path(environment.__file__).parents[1]


@pytest.fixture
def env(monkeypatch):
  """An environment of its own, without what `configure` sets."""
  copy = {k: v for k, v in os.environ.items() if not k.startswith(
      ('JAX_', 'XLA_', 'NPROC', 'TF_CPP', 'SLURM_'))}
  copy['JAX_PLATFORMS'] = 'cpu'  # whatever is installed here
  monkeypatch.setattr(os, 'environ', copy)
  return copy


def _cores(monkeypatch, n):
  monkeypatch.setattr(
      os, 'sched_getaffinity', lambda pid: set(range(n)), raising=False)
  monkeypatch.setattr(environment, '_quota', lambda: float('inf'))


@pytest.mark.parametrize(('batch', 'cores', 'devices'), [
    (128, 1, 1), (128, 2, 2), (128, 3, 2), (128, 6, 4), (128, 8, 8),
    (128, 64, 8), (512, 64, 32), (92, 8, 4), (90, 8, 5), (127, 8, 1),
    (32, 2, 2), (31, 2, 1), (16, 2, 1), (1, 1, 1), (1, 64, 1)])
def test_cpu_devices(batch, cores, devices):
  assert environment._cpu_devices(batch, cores) == devices
  assert batch % devices == 0


@pytest.mark.parametrize('batch', [1, 8, 48, 100, 128, 384])
@pytest.mark.parametrize('cores', [1, 2, 5, 32])
def test_cpu_devices_share_the_batch_and_have_enough_of_it(batch, cores):
  n = environment._cpu_devices(batch, cores)
  assert 1 <= n <= cores and batch % n == 0
  assert n == 1 or batch // n >= environment.MIN_ROWS_PER_DEVICE


def test_configure_sets_devices_pool_and_compile_cache(env, monkeypatch):
  _cores(monkeypatch, 4)
  environment.configure(128)
  assert env['JAX_NUM_CPU_DEVICES'] == '4'
  assert env['NPROC'] == '4'
  assert env['JAX_COMPILATION_CACHE_DIR'] == str(
      cache.directory() / 'xla')
  assert env['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] == '0'
  assert env['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] == '-1'


@pytest.mark.parametrize(('cores', 'batch'), [
    (1, 128), (2, 16), (2, 128), (8, 128)])
def test_the_pool_holds_a_thread_a_device(env, monkeypatch, cores, batch):
  _cores(monkeypatch, cores)
  environment.configure(batch)
  assert env['NPROC'] == env['JAX_NUM_CPU_DEVICES']


# The files of /sys/fs/cgroup and the lines of /proc/self/cgroup.
QUOTAS = {
    'version 2, in a container of its own': (
        ['0::/'], {'cpu.max': '300000 100000\n'}, 3),
    'version 2, of the pod': (
        ['0::/pod/container'], {'pod/cpu.max': '200000 100000\n',
                                'pod/container/cpu.max': 'max 100000\n'}, 2),
    'version 2, of the container': (
        ['0::/pod/container'], {'pod/cpu.max': 'max 100000\n',
                                'pod/container/cpu.max': '50000 25000\n'}, 2),
    'version 1': (
        ['4:memory:/', '1:cpu,cpuacct:/', '0::/'],
        {'cpu/cpu.cfs_quota_us': '400000\n',
         'cpu/cpu.cfs_period_us': '100000\n'}, 4),
    'version 1, whose path is that of the host': (
        ['2:cpuacct,cpu:/docker/17'], {'cpu/cpu.cfs_quota_us': '100000\n',
                                       'cpu/cpu.cfs_period_us': '50000\n'}, 2),
    'version 1, of a folder': (
        ['2:cpu:/docker/17'], {'cpu/docker/17/cpu.cfs_quota_us': '30000\n',
                               'cpu/docker/17/cpu.cfs_period_us': '10000\n',
                               'cpu/cpu.cfs_quota_us': '-1\n',
                               'cpu/cpu.cfs_period_us': '10000\n'}, 3),
    'a part of a core more': (['0::/'], {'cpu.max': '290000 100000\n'}, 2),
    'less than a core': (['0::/'], {'cpu.max': '20000 100000\n'}, 1),
    'more than there are': (['0::/'], {'cpu.max': '6400000 100000\n'}, 8),
    'none': (['0::/'], {'cpu.max': 'max 100000\n'}, 8),
    'version 1, none': (['1:cpu:/'], {'cpu/cpu.cfs_quota_us': '-1\n',
                                      'cpu/cpu.cfs_period_us': '100000\n'}, 8),
    'no file': (['0::/'], {}, 8),
    'above the container': (['0::/../other'], {'cpu.max': '100 100\n'}, 1),
    'no cgroups': (None, {}, 8),
}


@pytest.mark.parametrize('name', QUOTAS)
def test_a_container_has_as_many_devices_as_its_quota(
    name, env, monkeypatch, tmp_path):
  lines, files, cores = QUOTAS[name]
  monkeypatch.setattr(
      os, 'sched_getaffinity', lambda pid: set(range(8)), raising=False)
  monkeypatch.setattr(environment, '_CGROUPS', tmp_path / 'sys')
  monkeypatch.setattr(environment, '_OWN_CGROUP', tmp_path / 'own')
  if lines is not None:
    (tmp_path / 'own').write_text('\n'.join(lines) + '\n')
  for file, text in files.items():
    path = tmp_path / 'sys' / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  environment.configure(8 * 3 * 16)
  assert env['JAX_NUM_CPU_DEVICES'] == env['NPROC'] == str(cores)


@pytest.mark.parametrize(('variables', 'devices'), [
    ({}, 16),
    ({'SLURM_CPUS_PER_TASK': '2'}, 2),
    ({'SLURM_STEP_TASKS_PER_NODE': '4(x2)', 'SLURM_CPUS_ON_NODE': '16'}, 4),
    ({'SLURM_STEP_TASKS_PER_NODE': '2,4(x3),1', 'SLURM_CPUS_ON_NODE': '8'}, 2),
    ({'SLURM_STEP_TASKS_PER_NODE': '4', 'SLURM_CPUS_ON_NODE': '2'}, 1)])
def test_a_slurm_task_counts_its_own_share(
    env, monkeypatch, variables, devices):
  _cores(monkeypatch, 16)
  env.update(variables)
  environment.configure(16 * 16)
  assert env['JAX_NUM_CPU_DEVICES'] == '16'  # in no step: the shell of salloc
  for name in ('JAX_NUM_CPU_DEVICES', 'NPROC', 'XLA_FLAGS'):
    del env[name]
  env.update(SLURM_STEP_NODELIST='a', SLURM_PROCID='0', SLURM_NTASKS='8')
  environment.configure(16 * 16)
  assert env['JAX_NUM_CPU_DEVICES'] == env['NPROC'] == str(devices)


@pytest.mark.parametrize(('mode', 'rows'), [('train', 8), ('predict', 64)])
def test_slurm_tasks_share_the_batch_where_they_are_one_run(
    env, monkeypatch, mode, rows):
  asked = []
  def configure(rows):
    asked.append(rows)
    raise UserError('enough')
  monkeypatch.setattr(environment, 'configure', configure)
  env.update(SLURM_STEP_NODELIST='a', SLURM_PROCID='0', SLURM_NTASKS='8')
  argv = [f'--mode={mode}', '--workdir=/nonexistent/run']
  with pytest.raises(UserError, match='enough'):
    main._start_jax(*cli.parse(argv))
  assert asked == [rows]
  # The shell that salloc opens: a step of one task in a job of several.
  env['SLURM_STEP_NUM_TASKS'] = '1'
  assert environment.slurm_tasks() == 1
  del env['SLURM_STEP_NUM_TASKS']
  env['SLURM_NTASKS'] = 'many'
  if mode == 'train':
    with pytest.raises(UserError, match="SLURM_NTASKS is 'many', not a posit"):
      main._start_jax(*cli.parse(argv))


def test_without_affinity_the_cores_are_counted(env, monkeypatch):
  monkeypatch.delattr(os, 'sched_getaffinity', raising=False)
  monkeypatch.setattr(os, 'cpu_count', lambda: 2)
  monkeypatch.setattr(environment, '_quota', lambda: float('inf'))
  environment.configure(128)
  assert env['JAX_NUM_CPU_DEVICES'] == '2'


@pytest.mark.parametrize(('name', 'value'), [
    ('JAX_NUM_CPU_DEVICES', '3'), ('NPROC', '17'),
    ('JAX_COMPILATION_CACHE_DIR', 'elsewhere'),
    ('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '7'),
    ('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '9'),
    ('TF_CPP_MIN_LOG_LEVEL', '0'),
    ('XLA_FLAGS', '--xla_cpu_prefer_vector_width=256')])
def test_configure_keeps_what_the_user_set(env, name, value):
  env[name] = value
  environment.configure(128)
  assert value in env[name].split()
  assert 'JAX_NUM_CPU_DEVICES' in env and 'NPROC' in env


def test_configure_leaves_the_devices_to_xla_flags(env):
  flags = '--xla_dump_to=x --xla_force_host_platform_device_count=2'
  env['XLA_FLAGS'] = flags
  environment.configure(128)
  assert 'JAX_NUM_CPU_DEVICES' not in env
  assert env['NPROC'] == '2'


@pytest.mark.parametrize(('there', 'more'), [
    ('', ['--xla_backend_optimization_level=1']), ('libtpu', []),
    ('jax_cuda12_plugin', ['--xla_gpu_deterministic_ops=true']),
    ('jax_cuda13_plugin', ['--xla_gpu_deterministic_ops=true'])])
def test_configure_adds_to_the_users_xla_flags(env, monkeypatch, there, more):
  """A run on a GPU is reproducible without a script that sets anything."""
  monkeypatch.setattr(
      importlib.util, 'find_spec', lambda name: name == there or None)
  flags = ['--xla_cpu_prefer_vector_width=512', *more]
  environment.configure(128)
  assert env['XLA_FLAGS'].split() == flags
  own = ['--xla_dump_to=x', '--xla_backend_optimization_level=2',
         '--xla_gpu_deterministic_ops=false']
  env['XLA_FLAGS'] = ' '.join(own)
  environment.configure(128)
  assert env['XLA_FLAGS'].split() == [*own, flags[0]]


def test_this_xla_knows_the_flag_for_gpus():
  code = 'import jax; print(jax.numpy.ones(3).sum())'
  env = os.environ | {'XLA_FLAGS': '--xla_gpu_deterministic_ops=true'}
  assert subprocess.run([sys.executable, '-c', code], env=env, check=True,
                        capture_output=True, text=True).stdout == '3.0\n'


def test_configure_takes_an_empty_variable_for_none(env, monkeypatch):
  _cores(monkeypatch, 2)
  env['JAX_NUM_CPU_DEVICES'] = env['NPROC'] = ''
  environment.configure(128)
  assert env['JAX_NUM_CPU_DEVICES'] == '2' and env['NPROC'] == '2'


@pytest.mark.parametrize('value', ['0', '-1', 'two', '2.0', '\u0662'])
@pytest.mark.parametrize('name', [
    'JAX_NUM_CPU_DEVICES', 'NPROC', '--xla_force_host_platform_device_count'])
def test_a_malformed_number_is_refused(env, name, value):
  if name.startswith('--'):
    env['XLA_FLAGS'] = f'{name}={value}'
  else:
    env[name] = value
  with pytest.raises(UserError, match=f'{name}.* is {value!r}, not a positive'):
    environment.configure(128)


@pytest.mark.parametrize(('devices', 'pool', 'platforms'), [
    ('2', '1', 'cpu'), ('8', '1', ''), ('8', '7', 'cpu')])
def test_a_pool_that_would_deadlock_is_refused(env, devices, pool, platforms):
  env.update(JAX_NUM_CPU_DEVICES=devices, NPROC=pool)
  env['JAX_PLATFORMS'] = platforms
  with pytest.raises(UserError, match=(
      f'NPROC={pool} threads are too few for {devices} CPU devices, .*unset '
      f'NPROC, set it to at least {devices}, or set JAX_NUM_CPU_DEVICES='
      + pool)):
    environment.configure(128)
  env['NPROC'] = devices
  environment.configure(128)
  assert env['NPROC'] == devices


@pytest.mark.parametrize(('there', 'platforms', 'pool'), [
    ('', '', '8'), ('', 'cpu', '8'), ('libtpu', 'cpu', '8'),
    ('libtpu', '', '32'), ('jax_cuda12_plugin', 'cuda', '32')])
def test_an_accelerator_s_compilers_may_take_all_cores(
    env, monkeypatch, there, platforms, pool):
  _cores(monkeypatch, 32)
  monkeypatch.setattr(
      importlib.util, 'find_spec', lambda name: name == there or None)
  env['JAX_PLATFORMS'] = platforms
  environment.configure(128)
  assert (env['JAX_NUM_CPU_DEVICES'], env['NPROC']) == ('8', pool)


@pytest.mark.parametrize('change', [
    {'JAX_NUM_CPU_DEVICES': '1'}, {'JAX_PLATFORMS': 'cuda'}])
def test_a_small_pool_is_kept_where_no_cpu_devices_wait(env, change):
  env.update({'JAX_NUM_CPU_DEVICES': '2', 'NPROC': '1'} | change)
  environment.configure(128)
  assert env['NPROC'] == '1'


# Queued, as `pmap` by itself would have them, the steps abort at once.
_STEPS = '''
from flax_imdb import environment, main
environment.configure(128)
import jax
import numpy as np
from flax_imdb.cluster import devices

def step(total, batch, sum_over_devices):
  total += sum_over_devices(batch['x'].sum())
  return total, sum_over_devices(batch['x'].mean())  # two stall more than one

step = devices.data_parallel(step)
total = devices.replicate(np.float32(0))
batch = {{'x': np.ones((jax.device_count(), 64), np.float32) / 64}}
for _ in range({steps}):  # `data_parallel` alone keeps them from a queue
  total, _ = step(total, batch)
print(jax.device_count(), int(devices.to_host(total)))
'''


@pytest.mark.parametrize('steps', [
    1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_device_per_core_runs_without_a_stall(steps, env):
  devices = environment.available_cores()
  env.update(JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES=str(devices), XLA_FLAGS=(
      '--xla_cpu_collective_call_warn_stuck_timeout_seconds=2 '
      '--xla_cpu_collective_call_terminate_timeout_seconds=10'))
  process = subprocess.run(
      [sys.executable, '-c', _STEPS.format(steps=steps)], cwd=ROOT, env=env,
      capture_output=True, text=True, timeout=120, check=False)
  assert process.returncode == 0, process.stderr
  assert process.stdout.split() == [str(devices), str(steps * devices)]


@pytest.mark.parametrize(('error', 'kind'), [
    ("Backend 'cuda' is not in the list of known backends", UserError),
    ('Failed to open libtpu.so: cannot open shared object file', UserError),
    ('The TPU is already in use by process with pid 7', TransientError),
    ('CUDA_ERROR_OUT_OF_MEMORY: out of memory', TransientError),
    ('FAILED_PRECONDITION: No visible GPU devices.', TransientError),
    (AssertionError(), UserError)])
def test_devices_that_are_missing_are_a_mistake_and_held_ones_may_go_away(
    env, monkeypatch, error, kind):
  """The texts are those of jax 0.10, as its issues show them."""
  import jax
  def local_devices():
    raise error if isinstance(error, Exception) else RuntimeError(error)
  monkeypatch.setattr(jax, 'local_devices', local_devices)
  env['JAX_PLATFORMS'] = 'cuda'
  with pytest.raises(kind, match="no devices for JAX_PLATFORMS='cuda'"):
    main._start_jax(*cli.parse(['--mode=predict', 'good']))


def test_configure_twice_changes_nothing(env):
  environment.configure(128)
  first = dict(env)
  environment.configure(16)
  assert env == first


def test_cache_dir_follows_xdg_cache_home(env, monkeypatch, tmp_path):
  env['XDG_CACHE_HOME'] = str(tmp_path)
  assert cache.directory() == tmp_path / 'flax_imdb'
  monkeypatch.setattr(pathlib.Path, 'home', lambda: tmp_path / 'home')
  for value in ('', None):
    env.pop('XDG_CACHE_HOME')
    if value is not None:
      env['XDG_CACHE_HOME'] = value
    assert cache.directory() == tmp_path / 'home/.cache/flax_imdb'
    env['XDG_CACHE_HOME'] = 'again'


def test_jax_sees_what_configure_sets():
  code = ('from flax_imdb import environment\n'
          'environment.configure(48)\n'
          'import jax\n'
          'c = jax.config\n'
          'print(jax.local_device_count(), c.jax_compilation_cache_dir,'
          ' c.jax_persistent_cache_min_compile_time_secs)')
  env = {k: v for k, v in os.environ.items()
         if not k.startswith(('JAX_', 'XLA_', 'NPROC'))}
  env['JAX_PLATFORMS'] = 'cpu'
  env['JAX_NUM_CPU_DEVICES'] = '3'
  out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env,
                       capture_output=True, text=True, check=True).stdout
  assert out.split() == ['3', str(cache.directory() / 'xla'), '0.0']


@pytest.mark.parametrize('module', [
    'flax_imdb', 'flax_imdb.environment', 'flax_imdb.config', 'flax_imdb.main'])
def test_importing_starts_nothing_heavy(module):
  code = (f'import sys, os; before = dict(os.environ); import {module}\n'
          'heavy = {"jax", "flax", "orbax", "tensorflow_datasets", "optax"}\n'
          'assert os.environ == before\n'
          'print(sorted(heavy & set(sys.modules)))')
  out = subprocess.run([sys.executable, '-W', 'error', '-c', code], cwd=ROOT,
                       capture_output=True, text=True, check=True).stdout
  assert out == '[]\n'


def test_a_run_on_a_cpu_starts_without_what_it_may_never_need():
  code = ('import sys, flax_imdb.train.loop, flax_imdb.train.selftrain\n'
          'heavy = {"jax.experimental.pallas", "scipy.sparse", "pyarrow",\n'
          '         "scipy.special", "scipy.optimize", "tensorflow_datasets"}\n'
          'print(sorted(heavy & set(sys.modules)))')
  out = subprocess.run([sys.executable, '-c', code], cwd=ROOT,
                       capture_output=True, text=True, check=True).stdout
  assert out == '[]\n'


def test_a_jaxlib_that_computes_wrongly_is_refused(monkeypatch, capsys):
  """tests/model/test_compiler.py finds whether the one in use does."""
  monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.10.2')
  assert main.main(['--mode=eval']) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: jaxlib 0.10.2 computes wrongly (')
  assert error.count('\n') == 1 and 'pip install' in error


_ALLOCATE = '''
import ctypes, resource, sys
from flax_imdb import environment
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
if sys.argv[1] == 'keep':
  environment.configure(64)
for _ in range(3):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  scratch = libc.malloc(ctypes.c_size_t(48 << 20))
  libc.memset(ctypes.c_void_p(scratch), 1, ctypes.c_size_t(48 << 20))
  libc.free(ctypes.c_void_p(scratch))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='is about glibc')
def test_scratch_memory_is_not_asked_for_anew_each_time():
  def faults(how, **env):
    return int(subprocess.run(
        [sys.executable, '-c', _ALLOCATE, how], env=os.environ | env,
        capture_output=True, text=True, check=True).stdout)
  assert faults('keep') < 10
  if faults('leave') > 1000:  # unless the kernel gives huge pages
    # The user's own settings of malloc win.
    assert faults('keep', MALLOC_ARENA_TEST='8') > 1000


def test_several_runs_share_the_cores_unless_the_user_says_else(
    env, monkeypatch):
  _cores(monkeypatch, 6)
  assert environment.shares(1, 64) == [{}]
  assert environment.shares(3, 64) == 3 * [{'JAX_NUM_CPU_DEVICES': '2'}]
  assert environment.shares(6, 64) == 6 * [{'JAX_NUM_CPU_DEVICES': '1'}]
  with pytest.raises(UserError, match='--jobs=7: there are 6 cores'):
    environment.shares(7, 64)
  env['JAX_NUM_CPU_DEVICES'] = '4'
  assert environment.shares(2, 64) == [{}, {}]


def test_several_runs_have_a_gpu_each(env, monkeypatch, tmp_path):
  monkeypatch.setattr(importlib.util, 'find_spec',
                      lambda name: name == 'jax_cuda12_plugin' or None)
  del env['JAX_PLATFORMS']
  env['CUDA_VISIBLE_DEVICES'] = '4,6,7'
  assert environment.shares(2, 64) == [
      {'CUDA_VISIBLE_DEVICES': '4'}, {'CUDA_VISIBLE_DEVICES': '6'}]
  with pytest.raises(UserError, match='a GPU, and there are 3: give --jobs=3'):
    environment.shares(4, 64)
  del env['CUDA_VISIBLE_DEVICES']
  env['PATH'] = str(tmp_path)  # a driver's program is not there, then it is
  with pytest.raises(UserError, match='there are 0: give --jobs=1, or set JAX'):
    environment.shares(2, 64)
  (tmp_path / 'nvidia-smi').write_text('#!/bin/sh\necho GPU-a; echo GPU-b\n')
  (tmp_path / 'nvidia-smi').chmod(0o755)
  assert environment.shares(2, 64) == [
      {'CUDA_VISIBLE_DEVICES': 'GPU-a'}, {'CUDA_VISIBLE_DEVICES': 'GPU-b'}]


@pytest.mark.parametrize('argv', [
    ['--mode=sweep'], ['--mode=tune', '--minutes=1']])
def test_a_sweep_is_not_started_by_several_tasks(env, capsys, argv):
  env |= {'SLURM_STEP_NODELIST': 'a', 'SLURM_PROCID': '0', 'SLURM_NTASKS': '2'}
  assert main.main(argv) == 2
  assert 'runs in one process: start it with srun' in capsys.readouterr().err
