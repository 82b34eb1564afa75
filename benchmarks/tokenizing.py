"""The seconds from the prepared training reviews of IMDB to cached ids.

  TFDS_DATA_DIR=... python benchmarks/tokenizing.py [TREE=DIR ...]

In each checkout, in a process and with a cache of its own, it fits the default
config's tokenizer and encodes all 25,000 training reviews, `ROUNDS` times in
turns, and prints medians of wall and CPU seconds and of the ratios within a
round to the first one. The imports are not counted, the reading is.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROUNDS = 5
WORK = '''
import time
from flax_imdb.config import load_config
from flax_imdb.data import sources
from flax_imdb.data.reviews import load_splits, training_tokenizer

config = load_config('configs/default.py')
sources.read_texts(config.data, 'train[:1]')
wall, cpu = time.perf_counter(), time.process_time()
tokenizer = training_tokenizer(config, str)
reviews = load_splits(config, tokenizer, str, ['train'])['train']
print(time.perf_counter() - wall, time.process_time() - cpu)
'''


def seconds(tree: str) -> tuple[float, float]:
  """Wall and CPU seconds of a checkout."""
  with tempfile.TemporaryDirectory() as cache:
    output = subprocess.run(
        [sys.executable, '-c', WORK], cwd=tree, check=True, text=True,
        env=os.environ | {'PYTHONPATH': tree, 'XDG_CACHE_HOME': cache},
        stdout=subprocess.PIPE).stdout
  wall, cpu = map(float, output.split())
  return wall, cpu


def main() -> None:
  """Prints the figures."""
  trees = [str(pathlib.Path(word.removeprefix('TREE=')).resolve())
           for word in sys.argv[1:]]
  trees = trees or [str(pathlib.Path(__file__).resolve().parents[1])]
  rounds = [[seconds(tree) for tree in trees] for _ in range(ROUNDS)]
  for i, tree in enumerate(trees):
    for j, kind in enumerate(('wall', 'CPU')):
      taken = [row[i][j] for row in rounds]
      ratio = statistics.median(row[i][j] / row[0][j] for row in rounds)
      print(f'{tree}: {kind} median {statistics.median(taken):.2f} s, '
            f'{min(taken):.2f} to {max(taken):.2f} s; ratio {ratio:.3f}')


if __name__ == '__main__':
  main()
