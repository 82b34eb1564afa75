r"""Times variants of the train step against each other, interleaved.

  python benchmarks/variants.py VARIANT [VARIANT ...]
  python benchmarks/variants.py '' '--config.model.remat=false' \
      'XLA_FLAGS=--xla_cpu_prefer_vector_width=256' 'TREE=../before'

A variant is a string of words: NAME=VALUE for its environment, a config's
--config=FILE and --config.FIELD=VALUE; TREE=DIR takes another checkout and the
worker in its own benchmarks/variants.py. The first is what the others are
compared with. Each lives
in a process of its own, warmed up, and sleeps until it is its turn; ROUNDS
times each takes STEPS steps on one batch of 128 full-length random reviews.
Printed: median and minimum of the rounds' medians, and the median of the ratios
within a round.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROUNDS = 12
STEPS = 8
ROOT = pathlib.Path(__file__).resolve().parent.parent


def work(words: list[str]) -> None:
  """Answers each line of standard input with the seconds of `STEPS` steps."""
  from flax_imdb import environment
  from flax_imdb.config import load_config, override
  file = 'configs/notebook.py'
  if words and words[0].startswith('--config='):
    file = words.pop(0).removeprefix('--config=')
  config = load_config(file)
  for word in words:
    override(config, *word.removeprefix('--config.').split('=', 1))
  environment.configure(config.global_batch_size)
  import jax
  import numpy as np

  from flax_imdb.cluster import devices
  from flax_imdb.model import classifier
  from flax_imdb.train.optimizer import build_optimizer
  from flax_imdb.train.step import init_state, make_train_step
  rng = np.random.default_rng(0)
  shape = config.global_batch_size, config.data.max_length
  batch = devices.shard({
      'ids': rng.integers(4, config.data.vocab_size, shape).astype(np.int32),
      'lengths': np.full(shape[0], shape[1], np.int32),
      'labels': rng.integers(0, 2, shape[0]).astype(np.float32),
      'weights': np.ones(shape[0], np.float32),
      'places': np.arange(shape[0], dtype=np.int32)})
  model = classifier.build_model(config)
  optimizer = build_optimizer(config, 100)
  state = devices.replicate(init_state(config, model, optimizer))
  step = make_train_step(config, model, optimizer, 100)
  for _ in range(5):
    state, sums = step(state, batch)
  jax.block_until_ready(sums)
  print('ready', flush=True)
  for _ in sys.stdin:
    seconds = []
    for _ in range(STEPS):
      start = time.perf_counter()
      state, sums = step(state, batch)
      jax.block_until_ready(sums)
      seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds), flush=True)


def start(variant: str) -> subprocess.Popen:
  """The process of a variant, ready to work."""
  words = variant.split()
  names = [word for word in words if not word.startswith('--')]
  env = os.environ | dict(word.split('=', 1) for word in names)
  tree = pathlib.Path(env.pop('TREE', ROOT)).resolve()
  env['PYTHONPATH'] = str(tree)
  process = subprocess.Popen(
      [sys.executable, str(tree / 'benchmarks/variants.py'), '--work',
       *(word for word in words if word.startswith('--'))], cwd=tree, env=env,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
  assert process.stdout
  if process.stdout.readline() != 'ready\n':
    raise SystemExit(f'{variant!r} ended before its first step')
  return process


def main() -> None:
  """Prints the table."""
  if sys.argv[1:2] == ['--work']:
    work(sys.argv[2:])
    return
  if not sys.argv[1:] or sys.argv[1] in ('-h', '--help'):
    raise SystemExit(__doc__)
  processes = [(variant, start(variant)) for variant in sys.argv[1:]]
  times: dict[str, list[float]] = {variant: [] for variant in sys.argv[1:]}
  for _ in range(ROUNDS):
    for variant, process in processes:
      assert process.stdin and process.stdout
      print(file=process.stdin, flush=True)
      times[variant].append(
          statistics.median(json.loads(process.stdout.readline())))
  base = times[sys.argv[1]]
  print(f'{"median ms":>10}{"min ms":>9}{"ratio":>8}')
  for variant, process in processes:
    process.kill()
    ratio = statistics.median(
        a / b for a, b in zip(times[variant], base, strict=True))
    print(f'{statistics.median(times[variant]) * 1e3:10.1f}'
          f'{min(times[variant]) * 1e3:9.1f}{ratio:8.3f}  {variant}')


if __name__ == '__main__':
  main()
