"""Which systems peers.py has, what each is given, and their processes."""

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
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKER = ROOT / 'benchmarks' / 'peers_worker.py'
OURS = 'flax_imdb'
NEEDS = {OURS: ('jax', 'flax'), 'keras_jax': ('keras', 'jax'),
         'keras_tensorflow': ('keras', 'tensorflow'), 'torch': ('torch',)}
# What a system is given, by the name of the setting; '' is its own choice.
SETTINGS = {
    OURS: {'': 'its own choice: a CPU device a core',
           'one': 'one CPU device'},
    'keras_jax': {'': "jax' defaults: one CPU device",
                  'flags': 'one CPU device, our flags of XLA',
                  'parallel': 'DataParallel, a CPU device a core, our flags of '
                              'XLA'},
    'keras_tensorflow': {'': "jit_compile='auto', which is a graph",
                         'jit': 'jit_compile=True'},
    'torch': {'': 'eager, a thread a core', 'one': 'eager, one thread',
              'compiled': 'torch.compile, one thread'},
}
_ONE_THREAD = {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}
_VARIABLES = {
    (OURS, 'one'): {'JAX_NUM_CPU_DEVICES': '1'},
    ('keras_jax', 'flags'): {'JAX_NUM_CPU_DEVICES': '1'},
    ('torch', 'one'): _ONE_THREAD, ('torch', 'compiled'): _ONE_THREAD,
}
PADDING = {
    'plain': 'reads padding', 'padded': 'masks 500 tokens',
    'trimmed': "reads a batch's longest review", 'packed': 'packed sequences',
    'own': "its config's widths",
}


class Way(NamedTuple):
  """A system in one of the ways that it can be run: a row of a table.

  `padding` is a key of PADDING, or 'bucketed N': widths in steps of N tokens.
  """

  system: str
  setting: str
  padding: str
  eval_batch_size: int = 128

  def given(self, evaluating: bool = False) -> str:
    """What a row says that the system was given."""
    padding = PADDING.get(self.padding) or (
        f'widths of {self.padding.split()[1]}')
    size = f', batches of {self.eval_batch_size}' if evaluating else ''
    return f'{SETTINGS[self.system][self.setting]}; {padding}{size}'


def environment(system: str, setting: str, cache: str | None
                ) -> dict[str, str]:
  """A process' environment; what is ours in the user's is for us alone."""
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
            'TORCHINDUCTOR_CACHE_DIR': cache,
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
            'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
  return env | _VARIABLES.get((system, setting), {})


def fail(message: str) -> None:
  """Ends the program with status 1."""
  raise SystemExit(f'peers.py: {message}')


def tail(stderr) -> str:
  """The last lines that a process wrote to its standard error."""
  stderr.seek(0)
  return '\n'.join(stderr.read().decode(errors='replace').splitlines()[-20:])


class Worker:
  """The process of a system with a setting."""

  def __init__(self, system: str, setting: str, directory: str,
               cache: str | None = None):
    self._name = f'{system} {setting}'.strip()
    self.started = time.monotonic()
    self._stderr = tempfile.TemporaryFile()
    self._process = subprocess.Popen(
        [sys.executable, str(WORKER), system, setting, directory], cwd=ROOT,
        env=environment(system, setting, cache), stdin=subprocess.PIPE,
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
      fail(f'{self._name} died in {op} {request}:\n{tail(self._stderr)}')
    return json.loads(answer)

  def __enter__(self) -> 'Worker':
    return self

  def __exit__(self, *_: Any) -> None:
    self._process.kill()
    self._process.communicate()
    self._stderr.close()


def first_step(way: Way, directory: str, cache: str) -> float:
  """Seconds from the start of a process to its first finished step."""
  with (tempfile.TemporaryDirectory() as workdir,
        tempfile.TemporaryFile() as stderr):
    command = (
        ['-m', 'flax_imdb.main', '--config=configs/notebook.py',
         f'--workdir={workdir}/run'] if way.system == OURS
        else [str(WORKER), way.system, way.setting, directory, way.padding])
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT,
        env=environment(way.system, way.setting, cache),
        stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
      assert process.stdout
      for line in process.stdout:
        if line.startswith('first step done'):
          seconds = time.perf_counter() - start
          process.kill()
          return seconds
    fail(f'{way.system} ended before its first step:\n{tail(stderr)}')
  raise AssertionError


def installed() -> list[str]:
  """The systems whose packages are there; says which are not."""
  names = []
  for name, modules in NEEDS.items():
    missing = [m for m in modules if not importlib.util.find_spec(m)]
    if missing and name != OURS:
      print(f'{name}: skipped, {", ".join(missing)} not installed')
    else:
      names.append(name)
  return names


def machine(names: list[str]) -> str:
  """Cores, the processor's name and the versions, in a line."""
  owners = importlib.metadata.packages_distributions()
  modules = sorted({m for name in names for m in NEEDS[name]})
  cpu = pathlib.Path('/proc/cpuinfo')
  processor = next((line.partition(':')[2].strip()
                    for line in cpu.read_text().splitlines()
                    if line.startswith('model name')),
                   '') if cpu.exists() else ''
  return ', '.join([
      f'{os.cpu_count()} cores', *filter(None, [processor]),
      f'Python {sys.version.split()[0]}', *(
          f'{owners[m][0]} {importlib.metadata.version(owners[m][0])}'
          for m in modules if m in owners)])


def load() -> float:
  """The load average: what else the machine does is in every figure."""
  return round(os.getloadavg()[0], 1)
