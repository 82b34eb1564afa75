"""The time from start to the first finished train step.

  python benchmarks/startup.py [ARGS of flax_imdb.main]

starts the program `ROUNDS` times in a new run directory each, stops each at the
line that says that the first step is done, and prints the seconds from the
start of the process to that line: the first with an empty cache of compiled
programs, then median and range with a warm one.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = 7


def first_step(argv: list[str], compile_cache: str) -> float:
  """Seconds from the start of a process to its first finished step."""
  env = os.environ | {'JAX_COMPILATION_CACHE_DIR': compile_cache}
  with tempfile.TemporaryDirectory() as workdir:
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, '-m', 'flax_imdb.main', *argv, f'--workdir={workdir}'],
        env=env, stdout=subprocess.PIPE, text=True) as process:
      assert process.stdout
      for line in process.stdout:
        if line.startswith('first step done'):
          seconds = time.perf_counter() - start
          process.kill()
          return seconds
  raise SystemExit('the run ended before its first step')


def main() -> None:
  """Prints the figures."""
  argv = sys.argv[1:]
  with tempfile.TemporaryDirectory() as unused:  # token ids are cached by now
    first_step(argv, unused)
  with tempfile.TemporaryDirectory() as cache:
    print(f'empty compile cache: {first_step(argv, cache):.2f} s')
    warm = [first_step(argv, cache) for _ in range(ROUNDS)]
  print(f'warm: median {statistics.median(warm):.2f} s, '
        f'{min(warm):.2f} to {max(warm):.2f} s, {ROUNDS} starts')


if __name__ == '__main__':
  main()
