"""The time from the start of the program to one of its lines.

  python benchmarks/startup.py [TREE=DIR ...] [UNTIL=TEXT] [ARGS]

starts `python -m flax_imdb.main ARGS`, in a new run directory unless ARGS names
one, stops it at the first line that begins with TEXT, by default the one that
says that the first step is done, and prints the seconds to that line: first
with an empty cache of compiled programs, then median and range with a warm one,
of `ROUNDS` starts. With several checkouts they take turns, and the median of
the ratios within a round to the first one is printed.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = 9


def seconds_to_line(tree: str, until: str, argv: list[str],
                    compile_cache: str) -> float:
  """Seconds from the start of a process in a checkout to its line."""
  env = os.environ | {
      'JAX_COMPILATION_CACHE_DIR': compile_cache, 'PYTHONPATH': tree}
  with tempfile.TemporaryDirectory() as workdir:
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, '-m', 'flax_imdb.main', f'--workdir={workdir}', *argv],
        cwd=tree, env=env, stdout=subprocess.PIPE, text=True) as process:
      assert process.stdout
      for line in process.stdout:
        if line.startswith(until):
          seconds = time.perf_counter() - start
          process.kill()
          return seconds
  raise SystemExit(f'no line of {tree} begins with {until!r}')


def main() -> None:
  """Prints the figures."""
  trees, until, argv = [], 'first step done', []
  for word in sys.argv[1:]:
    if word.startswith('TREE='):
      trees.append(str(pathlib.Path(word.removeprefix('TREE=')).resolve()))
    elif word.startswith('UNTIL='):
      until = word.removeprefix('UNTIL=')
    else:
      argv.append(word)
  trees = trees or [str(pathlib.Path(__file__).resolve().parents[1])]
  for tree in trees:  # token ids are cached from here on
    with tempfile.TemporaryDirectory() as unused:
      seconds_to_line(tree, until, argv, unused)
  with tempfile.TemporaryDirectory() as folder:
    caches = [f'{folder}/{i}' for i in range(len(trees))]
    for tree, cache in zip(trees, caches, strict=True):
      print(f'{tree}: empty compile cache '
            f'{seconds_to_line(tree, until, argv, cache):.2f} s')
    warm = [[seconds_to_line(tree, until, argv, cache)
             for tree, cache in zip(trees, caches, strict=True)]
            for _ in range(ROUNDS)]
  for i, tree in enumerate(trees):
    seconds = [row[i] for row in warm]
    ratio = statistics.median(row[i] / row[0] for row in warm)
    print(f'{tree}: warm, median {statistics.median(seconds):.2f} s, '
          f'{min(seconds):.2f} to {max(seconds):.2f} s, {ROUNDS} starts; '
          f'ratio {ratio:.3f}')


if __name__ == '__main__':
  main()
