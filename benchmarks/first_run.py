"""Where the time of a first run goes, from the start to the test score.

  TFDS_DATA_DIR=... python benchmarks/first_run.py
  python benchmarks/first_run.py TREE=DIR TREE=. PICTURE=FILE [ARGS]

runs `python -m flax_imdb.main ARGS` to its end with an empty cache, and again
with the cache that it left, each into a new run directory, and prints a table:
the seconds of each stage, by when the program said that it was done. With
several checkouts there are two columns for each. The data set is prepared
before; nothing else may run beside it, and each number is of one run.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

# What a stage is called, and the lines of which the last one ends it.
STAGES = [
    ('Python, imports, config', r'\d+ x '),
    ('tokenizer fitted, reviews encoded', r'(?!)'),  # where the next begins
    ('n-grams counted, linear model fitted',
     r'(?:counted|read) n-grams in ([\d.]+) s'),
    ('parameters', r'parameters '),
    ('train step compiled, first step', r'first step done'),
    ('steps and validation', r'epoch \d+/\d+ '),
    ('best step restored, test evaluated, all written', r'')]
TO_COUNT = 2  # the stage that says itself how long it took
COLOURS = ['#888888', '#d4a24c', '#c1666b', '#bbbbbb', '#7d5ba6', '#0b6e4f',
           '#48639c']


def stages(tree: str, argv: list[str], caches: str) -> list[float]:
  """Seconds of each stage of a run of a checkout."""
  ends: list[float | None] = [None] * len(STAGES)
  env = os.environ | {'XDG_CACHE_HOME': caches, 'PYTHONPATH': tree}
  env.pop('JAX_COMPILATION_CACHE_DIR', None)
  with tempfile.TemporaryDirectory() as workdir:
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, '-m', 'flax_imdb.main', f'--workdir={workdir}/run',
         *argv], cwd=tree, env=env, stdout=subprocess.PIPE, text=True
        ) as process:
      assert process.stdout
      for line in process.stdout:
        now = time.perf_counter() - start
        for i, (_, pattern) in enumerate(STAGES):
          if found := re.match(pattern, line):
            ends[i] = now
            if i == TO_COUNT:
              ends[i - 1] = now - float(found[1])
            break
    if process.returncode:
      raise SystemExit(f'{tree}: the run ended with {process.returncode}')
    ends[-1] = time.perf_counter() - start
  durations, last = [], 0.0
  for end in ends:
    durations.append(0.0 if end is None else end - last)
    last = last if end is None else end
  return durations


def draw(columns: dict[str, list[float]], path: str) -> None:
  """Draws a bar a run, of its stages one after another."""
  import matplotlib.pyplot as plt
  figure, axis = plt.subplots(
      figsize=(8, 1.6 + 0.5 * len(columns)), layout='constrained')
  left = [0.0] * len(columns)
  for i, (name, _) in enumerate(STAGES):
    widths = [durations[i] for durations in columns.values()]
    bars = axis.barh(list(columns), widths, left=left, label=name,
                     color=COLOURS[i])
    axis.bar_label(bars, [f'{w:.0f}' if w >= 2 else '' for w in widths],
                   label_type='center', color='white', fontsize=8)
    left = [a + b for a, b in zip(left, widths, strict=True)]
  axis.invert_yaxis()
  axis.set_xlabel('seconds from the start of the process')
  axis.spines[['top', 'right']].set_visible(False)
  figure.legend(loc='outside lower center', ncols=2, fontsize=8, frameon=False)
  figure.savefig(path, dpi=150)


def main() -> None:
  """Prints the table."""
  trees, argv, picture = [], [], ''
  for word in sys.argv[1:]:
    if word.startswith('TREE='):
      trees.append(str(pathlib.Path(word.removeprefix('TREE=')).resolve()))
    elif word.startswith('PICTURE='):
      picture = word.removeprefix('PICTURE=')
    else:
      argv.append(word)
  trees = trees or [str(pathlib.Path(__file__).resolve().parents[1])]
  columns = {}
  for tree in trees:
    name = f'{pathlib.Path(tree).name}, ' if len(trees) > 1 else ''
    with tempfile.TemporaryDirectory() as caches:
      for which in ('first', 'second'):
        columns[f'{name}{which}'] = stages(tree, argv, caches)
  print(f'| seconds | {" | ".join(columns)} |\n|---|{"---|" * len(columns)}')
  for i, (name, _) in enumerate(STAGES):
    print(f'| {name} | '
          + ' | '.join(f'{column[i]:.1f}' for column in columns.values())
          + ' |')
  print('| **all** | ' + ' | '.join(
      f'**{sum(column):.1f}**' for column in columns.values()) + ' |')
  if picture:
    draw(columns, picture)


if __name__ == '__main__':
  main()
