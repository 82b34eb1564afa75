"""How the time of a train step grows, and whether memory does.

  pip install -e '.[report]'
  python benchmarks/scaling.py --csv=scaling.csv --png=scaling.png
  python benchmarks/scaling.py --rounds=2 --only=batch,memory

times the step of configs/notebook.py's model, with padding masked as in
configs/words.py, on random ids without padding. Each sweep changes one number
of the base point: batch 128, width 32, length 500, 1 layer, 2 CPU devices. The
points of a sweep are timed by turns, in a new order each round, and a ratio is
the median over the rounds of the ratios within a round: what else the machine
does meanwhile falls on all points alike. The exponent is the slope of log time
on log value over the upper half of a sweep, its last three points.

Memory is the resident size of `flax_imdb.main` at each epoch's line while it
trains, evaluates and saves 50 times on generated reviews. MALLOC_ARENA_MAX=1
gives all threads one heap: growth that then ends was no leak. Linux only.
"""

import argparse
from collections.abc import Callable
import contextlib
import csv
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

from flax_imdb import environment
from flax_imdb.config import packaged

BASE = {'batch': 128, 'width': 32, 'length': 500, 'layers': 1, 'devices': 2}
Columns = dict[str, np.ndarray]  # a table; its first column is the value
CORES = len(os.sched_getaffinity(0))
SWEEPS = {
    'batch': [32, 64, 128, 256, 512, 1024],
    'width': [16, 32, 64, 128, 256],
    'length': [64, 125, 250, 500, 1000, 2000],
    'layers': [1, 2, 3, 4],
    'devices': [n for n in (1, 2, 4, 8) if n <= max(2, CORES)],
}
NAMES = [*SWEEPS, 'memory']
MIN_MS = 200  # shorter steps are repeated for about this long, and averaged
EPOCHS = 50


def parse() -> argparse.Namespace:
  """Reads the flags; what would fail after the measurement fails here."""
  parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False)
  parser.add_argument('--rounds', type=int, default=12, help='default: 12')
  parser.add_argument('--csv', metavar='FILE', help='write all points')
  parser.add_argument('--png', metavar='FILE', help='draw all sweeps')
  parser.add_argument('--only', type=lambda names: names.split(','),
                      default=NAMES, help=f'default: {",".join(NAMES)}')
  parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.rounds < 1:
    parser.error(f'--rounds={args.rounds}: must be at least 1')
  if not set(args.only) <= set(NAMES):
    parser.error(f'--only: choose some of {",".join(NAMES)}')
  for file in filter(None, (args.csv, args.png)):
    parent = os.path.dirname(file) or '.'
    if os.path.isdir(file) or not os.access(parent, os.W_OK):
      parser.error(f'cannot write {file}: name a file in a writable directory')
  if args.png and not importlib.util.find_spec('matplotlib'):
    parser.error('--png needs matplotlib: pip install matplotlib')
  return args


def serve() -> None:
  """Answers each point, a line of standard input, with its step time in ms."""
  environment.configure(BASE['batch'])
  import jax  # only now: it reads the environment when it starts

  from flax_imdb.cluster import devices
  from flax_imdb.data.batches import pad
  from flax_imdb.data.reading import Reading
  from flax_imdb.data.reviews import Reviews
  from flax_imdb.model import classifier
  from flax_imdb.train.optimizer import build_optimizer
  from flax_imdb.train.step import init_state, make_train_step

  @functools.cache
  def runner(line: str) -> Callable[[], float]:
    point = json.loads(line)
    assert jax.local_device_count() == point['devices'], 'unset XLA_FLAGS'
    config = packaged('notebook')
    config.model.mask_padding = True
    config.model.width, config.model.layers = point['width'], point['layers']
    size, length = point['batch'], point['length']
    rng = np.random.default_rng(0)
    reviews = Reviews(
        rng.integers(4, config.data.vocab_size, size * length, np.uint16),
        np.arange(size + 1) * length, rng.integers(0, 2, size, np.int8))
    batch = pad(reviews, np.arange(size), size, Reading(length))
    model = classifier.build_model(config)
    optimizer = build_optimizer(config, 1)
    train_step = make_train_step(config, model, optimizer, 1)
    state = devices.replicate(init_state(config, model, optimizer))

    def run(steps: int) -> float:
      nonlocal state
      for step in range(steps + 1):
        state, sums = train_step(state, devices.shard(batch))
        if not step:  # compiles, or refills the caches after another point
          jax.block_until_ready((state, sums))
          start = time.perf_counter()
      jax.block_until_ready((state, sums))
      return 1000 * (time.perf_counter() - start) / steps

    return functools.partial(run, max(1, round(MIN_MS / run(1))))

  for line in sys.stdin:
    print(json.dumps(runner(line)()), flush=True)


def start(n: int) -> subprocess.Popen:
  """A process for `serve`; jax reads the number of devices when it starts."""
  # Unbuffered: to close a buffer that a dead process did not read raises.
  return subprocess.Popen(
      [sys.executable, __file__, '--worker'], bufsize=0,
      env=os.environ | dict(JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES=str(n)),
      stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def measure(sweep: str, rounds: int, workers: dict) -> Columns:
  """Times a sweep; the columns after the times are ratios to the base."""
  def ask(point: dict[str, int]) -> float:
    worker = workers[point['devices']]
    with contextlib.suppress(BrokenPipeError):  # then it doesn't answer either
      worker.stdin.write(json.dumps(point).encode() + b'\n')
    answer = worker.stdout.readline()
    if not answer:
      raise SystemExit(f'error: worker ended with {worker.wait()} at {point}')
    return json.loads(answer)

  points = [BASE | {sweep: value} for value in SWEEPS[sweep]]
  for point in points:
    ask(point)  # compiles
  ms = np.zeros((rounds, len(points)))
  for row in ms:
    for i in np.random.permutation(len(points)):
      row[i] = ask(points[i])
  values, base = np.array(SWEEPS[sweep]), SWEEPS[sweep].index(BASE[sweep])
  linear = 1 / values if sweep == 'devices' else values
  columns = {
      sweep: values, 'median ms': np.median(ms, axis=0),
      'min ms': ms.min(axis=0), 'ratio': np.median(ms / ms[:, [base]], axis=0),
      'linear': linear / linear[base]}
  if sweep == 'width':  # of the LSTM's matrix products, 4 H (E + H) a token
    flops = values * (packaged('notebook').model.embedding_dim + values)
    columns['flops'] = flops / flops[base]
  return columns


def memory() -> Columns:
  """MiB resident at the end of each epoch of a training run."""
  mib = []
  with tempfile.TemporaryDirectory() as workdir, subprocess.Popen(
      [sys.executable, '-m', 'flax_imdb.main', f'--workdir={workdir}',
       '--config=configs/quickstart.py', f'--config.num_epochs={EPOCHS}',
       '--config.data.train_split=train[:1000]'],
      stdout=subprocess.PIPE, text=True) as process:
    for line in process.stdout:
      if line.startswith('epoch '):
        with open(f'/proc/{process.pid}/status') as f:
          mib.append(int(f.read().split('VmRSS:')[1].split()[0]) / 1024)
  if process.returncode or len(mib) != EPOCHS:
    raise SystemExit(
        f'error: training ended with {process.returncode}, {len(mib)} epochs')
  return {'epoch': np.arange(1, EPOCHS + 1), 'MiB': np.array(mib)}


def show(sweep: str, columns: Columns) -> None:
  """Prints a table and what follows from it."""
  print(f'\n{sweep}: ' + (
      'configs/quickstart.py, 900 reviews' if sweep == 'memory' else
      ', '.join(f'{k} {v}' for k, v in BASE.items() if k != sweep)))
  print(''.join(f'{name:>10}' for name in columns))
  values, *rest = columns.values()
  for value, *row in zip(values, *rest, strict=True):
    if sweep != 'memory' or value in (5, 10, 20, 30, 40, 50):
      print(f'{value:10}' + ''.join(f'{x:10.2f}' for x in row))
  if sweep == 'memory':
    slope = np.polyfit(values[10:], columns['MiB'][10:], 1)[0]
    print(f'growth after epoch 10, fitted: {slope:+.2f} MiB an epoch')
  elif sweep == 'devices':
    for value, ratio in zip(values[1:], columns['ratio'][1:], strict=True):
      print(f'speed-up 1 -> {value}: {columns["ratio"][0] / ratio:.2f}')
  else:
    for name in [*columns][4:]:
      logs = np.log([columns[name], columns['ratio']])[:, -3:]
      print(f'exponent ({name} is 1): {np.polyfit(*logs, 1)[0]:.2f}')


def draw(measured: dict[str, Columns], file: str) -> None:
  """Writes a PNG: a panel a sweep, dashed what linear growth would be."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(12, 7.2), layout='constrained')
  for place, (sweep, columns) in enumerate(measured.items(), 1):
    panel = figure.add_subplot(2, 3, place)
    (xlabel, values), (ylabel, data), *_ = columns.items()
    panel.set(title=sweep, xlabel=xlabel, ylabel=ylabel)
    panel.grid(alpha=0.3)
    if sweep == 'memory':
      panel.plot(values, data)
      panel.set_ylim(0, 1.1 * data.max())
      continue
    panel.loglog(values, data, 'o-', label='median')
    panel.loglog(values, columns['min ms'], 'C0x', label='fastest')
    base = data[SWEEPS[sweep].index(BASE[sweep])]
    for name, line in {'linear': 'k--', 'flops': 'k:'}.items():
      if name in columns:
        panel.loglog(values, base * columns[name], line, label=name)
    panel.set_xticks(values, values)
    panel.set_xticks([], minor=True)
    panel.legend()
  figure.savefig(file, format='png', dpi=120)


def main() -> None:
  """Prints the figures and writes the files."""
  args = parse()
  if args.worker:
    return serve()
  measured = {}
  rows = [['sweep', 'value', 'median', 'min', 'ratio', 'linear', 'flops']]
  with contextlib.ExitStack() as stack:
    workers = {n: stack.enter_context(start(n)) for n in SWEEPS['devices']}
    for sweep in args.only:
      measured[sweep] = columns = (memory() if sweep == 'memory' else
                                   measure(sweep, args.rounds, workers))
      show(sweep, columns)
      rows += [[sweep, value, *(f'{x:.5g}' for x in row)]
               for value, *row in zip(*columns.values(), strict=True)]
  if args.csv:
    with open(args.csv, 'w', newline='') as f:
      csv.writer(f).writerows(rows)
  if args.png:
    draw(measured, args.png)


if __name__ == '__main__':
  main()
