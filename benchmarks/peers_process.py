"""Which systems peers.py has, and the processes in which they live."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKER = ROOT / 'benchmarks' / 'peers_worker.py'
OURS = 'flax_imdb'
NEEDS = {OURS: ('jax', 'flax'), 'keras_jax': ('keras', 'jax'),
         'keras_tensorflow': ('keras', 'tensorflow'), 'torch': ('torch',)}


def environment(system: str, cache: str | None = None) -> dict[str, str]:
  """A process' environment; ours chooses its own, peers have their defaults."""
  ours = ('JAX_NUM_CPU_DEVICES', 'NPROC', 'XLA_FLAGS')
  env = {k: v for k, v in os.environ.items()
         if not k.startswith(('JAX_COMPILATION_CACHE', 'JAX_PERSISTENT', 'KERAS'
                             )) and (system == OURS or k not in ours)}
  # The tree that this file stands in is measured, not what is installed.
  env['PYTHONPATH'] = os.pathsep.join(
      [str(ROOT), *filter(None, [env.get('PYTHONPATH')])])
  env['KERAS_HOME'] = os.devnull  # nobody's keras.json
  if cache:
    env |= {'JAX_COMPILATION_CACHE_DIR': cache,
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
            'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
  return env


def fail(message: str) -> None:
  """Ends the program with status 1."""
  raise SystemExit(f'peers.py: {message}')


def tail(stderr) -> str:
  """The last lines that a process wrote to its standard error."""
  stderr.seek(0)
  return '\n'.join(stderr.read().decode(errors='replace').splitlines()[-20:])


class Worker:
  """A system's process."""

  def __init__(self, system: str, directory: str, cache: str | None = None):
    self.system = system
    self.started = time.monotonic()
    self._stderr = tempfile.TemporaryFile()
    self._process = subprocess.Popen(
        [sys.executable, str(WORKER), system, directory], cwd=ROOT,
        env=environment(system, cache), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=self._stderr, text=True)

  def ask(self, op: str, **request: Any) -> dict[str, Any]:
    """Waits for the answer; ends the program if the process died."""
    assert self._process.stdin and self._process.stdout
    answer = ''
    with contextlib.suppress(BrokenPipeError):
      print(json.dumps({'op': op} | request), file=self._process.stdin,
            flush=True)
      answer = self._process.stdout.readline()
    if not answer:
      self._process.wait()
      fail(f'{self.system} died in {op} {request}:\n{tail(self._stderr)}')
    return json.loads(answer)

  def __enter__(self) -> 'Worker':
    return self

  def __exit__(self, *_: Any) -> None:
    self._process.kill()
    self._process.communicate()
    self._stderr.close()


def first_step(system: str, way: str, directory: str, cache: str) -> float:
  """Seconds from the start of a process to its first finished step."""
  with (tempfile.TemporaryDirectory() as workdir,
        tempfile.TemporaryFile() as stderr):
    command = (
        ['-m', 'flax_imdb.main', '--config=configs/notebook.py',
         f'--workdir={workdir}/run'] if system == OURS
        else [str(WORKER), system, directory, way])
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment(system, cache),
        stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
      assert process.stdout
      for line in process.stdout:
        if line.startswith('first step done'):
          seconds = time.perf_counter() - start
          process.kill()
          return seconds
    fail(f'{system} ended before its first step:\n{tail(stderr)}')
  raise AssertionError


def installed() -> list[str]:
  """Prints the machine and the versions; returns the systems there are."""
  names = []
  for name, modules in NEEDS.items():
    missing = [m for m in modules if not importlib.util.find_spec(m)]
    if missing and name != OURS:
      print(f'{name}: skipped, {", ".join(missing)} not installed')
    else:
      names.append(name)
  owners = importlib.metadata.packages_distributions()
  modules = sorted({m for name in names for m in NEEDS[name]})
  versions = [f'{owners[m][0]} {importlib.metadata.version(owners[m][0])}'
              for m in modules if m in owners]
  print(f'{os.cpu_count()} cores, Python {sys.version.split()[0]}, '
        + ', '.join(versions))
  print_load()
  return names


def print_load() -> None:
  """The load average: what else the machine does is in every figure."""
  print(f'load average of the last minute: {os.getloadavg()[0]:.1f}',
        flush=True)
