"""Our training against Keras on JAX, Keras on TensorFlow and PyTorch, on a CPU.

  pip install -e '.[bench]'
  TFDS_DATA_DIR=... python benchmarks/peers.py
  python benchmarks/peers.py --only=step,epoch --rounds=12 --json=FILE

prints a table for each of these; a peer that is not installed is left out:

  step              one step on padded batches of 500 tokens; padding is read
  epoch             an epoch of the notebook's 17,500 reviews; it is not read
  startup           process start to first finished step, cold and warm cache
  evaluate          validation reviews a second; padding is not read
  time_to_accuracy  start to an accuracy on validation, configs/words.py
  memory            peak resident memory of a fresh process after some steps

Each system lives in a process of its own (peers_worker.py), warmed up, and
sleeps until it is its turn; a round asks each once, and each round begins with
another. The ratio is the median over the rounds of peer's time / our time in
that round, so that a machine that is slow for a while is slow for both.

All read the same IMDB batches and begin with the same weights in float32; the
loss of the first step, or of all reviews evaluated, must agree to a relative
1e-4, or the program says which does not and exits with 1. After that losses
part where libraries do: PyTorch's RMSprop has epsilon beside the root, which
Keras and we have in it.

Each peer does what is ordinary and fast there: Keras train_on_batch, compiled
(jit_compile='auto', which on TensorFlow is a graph without XLA); PyTorch its
eager nn.LSTM, time first. About padding each peer has two ways, and the faster
is the peer: Keras mask_zero on batches of 500 or on our bucketed batches;
PyTorch packed sequences or the state at the last word of bucketed batches.
PyTorch also runs with one thread ("/1"), and again the faster is the peer: its
default threads spin while they wait for each other, and a step then takes up to
a hundred times as long wherever another process wants a core. The load average
is printed first and last; a run beside other work says little about anyone.

An epoch is measured on --epoch_steps of its batches, every k-th of those sorted
by width, and scaled to all steps. Startup is ours with all that a run does,
of peers building the model, loading the batch and a step. The clock of
time_to_accuracy starts with the process, with empty caches, and stands still
while accuracy is measured, every quarter epoch; this table is not interleaved.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

from peers_process import OURS, Worker, fail, first_step, installed, print_load

TABLES = ('step', 'epoch', 'startup', 'evaluate', 'time_to_accuracy', 'memory')
TARGETS = (0.78, 0.87)
TOLERANCE = 1e-4  # relative, of a loss
SETTLE = 0.05  # seconds; idle threads spin for a moment before they sleep

# How padding is dealt with, and after a slash PyTorch's threads if not default.
_KERAS = ('padded', 'bucketed')
WAYS = {
    'step': {'torch': ('plain', 'plain/1')},
    'epoch': {OURS: ('bucketed',), 'keras_jax': _KERAS,
              'keras_tensorflow': _KERAS,
              'torch': ('padded', 'bucketed', 'bucketed/1')},
    'evaluate': {OURS: ('bucketed',), 'keras_jax': _KERAS,
                 'keras_tensorflow': _KERAS,
                 'torch': ('bucketed', 'bucketed/1')},
    'startup': {'torch': ('plain', 'plain/1')},
    'time_to_accuracy': {'torch': ('accuracy', 'accuracy/1')},
}

Seconds = dict[tuple[str, str], list[float]]  # by system and way, a round each


def check_losses(what: str, losses: dict[tuple[str, str], float]) -> None:
  """Ends the program if a loss differs from ours."""
  ours = next(loss for (name, _), loss in losses.items() if name == OURS)
  for (name, way), loss in losses.items():
    if not abs(loss - ours) <= TOLERANCE * abs(ours):
      fail(f'{what}: {name} ({way}) has loss {loss:.7f}, {OURS} {ours:.7f}')
  print(f'\n{what}: losses agree with {ours:.6f}', flush=True)


def ways(table: str, names: list[str], default: str = 'plain'
         ) -> list[tuple[str, str]]:
  """(system, way) of all that a table measures."""
  return [(name, way) for name in names
          for way in WAYS[table].get(name, (default,))]


def rotated(pairs: list, by: int) -> list:
  """The same, another first each round."""
  by %= len(pairs)
  return pairs[by:] + pairs[:by]


def show(title: str, unit: str, seconds: Seconds, convert, best: str = 'minimum'
         ) -> dict[str, float]:
  """Prints a table; returns each system's median, of its faster way.

  Args:
    title: what was timed.
    unit: of what `convert` returns.
    seconds: of each round.
    convert: seconds to what is printed.
    best: what the shortest time is called.
  """
  print(f'{title}, {unit}\n{"":32}{"median":>10}{best:>10}{"ratio":>9}')
  medians: dict[str, float] = {}
  ours = next(times for (name, _), times in seconds.items() if name == OURS)
  for (name, way), times in seconds.items():
    median = statistics.median(times)
    ratio = statistics.median(t / o for t, o in zip(times, ours, strict=True))
    medians[name] = min(medians.get(name, median), median)
    print(f'{name:18}{way:14}{convert(median):10.2f}'
          f'{convert(min(times)):10.2f}{ratio:9.2f}', flush=True)
  return {name: convert(median) for name, median in medians.items()}


def compare(op: str, table: str, workers: dict[str, Worker], rounds: int
            ) -> Seconds:
  """Builds and checks what a table needs, warms it up, and times it."""
  pairs = ways(table, list(workers))
  losses = {}
  for name, way in pairs:
    workers[name].ask('build', way=way)
    losses[name, way] = workers[name].ask(
        op, way=way, **{'count': 1} if op == 'train' else {})['loss']
  check_losses(f'{table}: first {op}', losses)
  for _ in range(2):  # every width is compiled, then all runs once as later
    for name, way in pairs:
      workers[name].ask(op, way=way)
  seconds: Seconds = {pair: [] for pair in pairs}
  for i in range(rounds):
    for name, way in rotated(pairs, i):
      time.sleep(SETTLE)
      seconds[name, way].append(workers[name].ask(op, way=way)['seconds'])
  return seconds


def startup(names: list[str], directory: str, rounds: int) -> dict[str, Any]:
  """Times first steps, the warm one right after the cold one."""
  pairs = ways('startup', names)
  times: dict[str, Seconds] = {
      kind: {pair: [] for pair in pairs} for kind in ('cold', 'warm')}
  for i in range(-1, rounds):
    for name, way in rotated(pairs, i):
      with tempfile.TemporaryDirectory() as cache:
        for kind in times:
          seconds = first_step(name, way, directory, cache)
          if i >= 0:  # the first of all only brings the files into memory
            times[kind][name, way].append(seconds)
  print()
  return {kind: show(f'startup, {kind} compile cache', 's', some, lambda s: s)
          for kind, some in times.items()}


def time_to_accuracy(names: list[str], directory: str, repeats: int,
                     limit: float) -> dict[str, dict[str, float | None]]:
  """One system after the other."""
  pairs = ways('time_to_accuracy', names, 'accuracy')
  reached: dict[tuple[str, str], list] = {pair: [] for pair in pairs}
  for seed in range(repeats):
    losses = {}
    for name, way in pairs:
      with (tempfile.TemporaryDirectory() as cache,
            Worker(name, directory, cache) as worker):
        answer = worker.ask('time_to_accuracy', way=way, seed=seed,
                            limit=limit, started=worker.started,
                            targets=TARGETS)
      losses[name, way] = answer['loss']
      reached[name, way].append(
          [float('inf') if s is None else s for s in answer['seconds']])
      print(f'{name} {way}, seed {seed}: accuracy each quarter epoch '
            + ' '.join(f'{a:.3f}' for a in answer['accuracies']), flush=True)
    check_losses('time_to_accuracy: initial weights', losses)
  print(f'time to accuracy, s, median of {repeats}\n{"":32}'
        + ''.join(f'{target:>13}' for target in TARGETS))
  result: dict[str, dict[str, float | None]] = {str(t): {} for t in TARGETS}
  for name, way in pairs:
    text = f'{name:18}{way:14}'
    for i, target in enumerate(TARGETS):
      # The higher of the two middle ones: of inf and a number there is no mean.
      median = statistics.median_high(run[i] for run in reached[name, way])
      there = median < float('inf')
      known = result[str(target)].get(name)
      if there and (known is None or median < known):
        result[str(target)][name] = median
      result[str(target)].setdefault(name, None)
      text += f'{median:13.1f}' if there else f'{"not reached":>13}'
    print(text, flush=True)
  return result


def memory(names: list[str], directory: str) -> dict[str, float]:
  """Takes steps in fresh processes."""
  print('\nmemory, MiB')
  result = {}
  for name in names:
    with Worker(name, directory) as worker:
      worker.ask('build', way='plain')
      worker.ask('train', way='plain')
      result[name] = worker.ask('memory')['mib']
    print(f'{name:18}{result[name]:10.0f}', flush=True)
  return result


def arguments() -> argparse.Namespace:
  """The command line."""
  def tables(text: str) -> list[str]:
    unknown = [t for t in text.split(',') if t not in TABLES]
    if unknown:
      raise argparse.ArgumentTypeError(
          f'{unknown[0]!r} is no table; there are {", ".join(TABLES)}')
    return text.split(',')

  def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
      raise argparse.ArgumentTypeError(f'{text!r} is not a positive number')
    return int(text)

  class Parser(argparse.ArgumentParser):
    def error(self, message: str):
      self.exit(2, f'peers.py: {message}\n')

  parser = Parser(description=(__doc__ or '').splitlines()[0])
  parser.add_argument('--only', type=tables, default=list(TABLES),
                      help='tables, with commas in between')
  for name, default, text in (
      ('rounds', 12, 'times that each system is asked; startup: at most 5'),
      ('steps', 8, 'steps a round of the table step'),
      ('epoch_steps', 24, 'batches that stand for an epoch'),
      ('reviews', 2560, 'validation reviews to evaluate'),
      ('repeats', 1, 'seeds of time_to_accuracy'),
      ('limit', 900, 'seconds that a system may take to an accuracy')):
    parser.add_argument(f'--{name}', type=positive, default=default, help=text)
  parser.add_argument('--json', help='file to write the medians to')
  return parser.parse_args()


def main() -> None:
  """Prints the tables asked for, and writes them."""
  args = arguments()
  names = installed()
  results: dict[str, Any] = {}
  with (tempfile.TemporaryDirectory() as directory,
        contextlib.ExitStack() as stack):
    with Worker(OURS, directory) as worker:
      sizes = worker.ask('prepare', steps=args.steps, reviews=args.reviews,
                         epoch_steps=args.epoch_steps, repeats=args.repeats)
    steps = sizes['steps_per_epoch']
    workers = {}
    if {'step', 'epoch', 'evaluate'} & set(args.only):
      workers = {name: stack.enter_context(Worker(name, directory))
                 for name in names}
    if 'step' in args.only:
      results['step'] = show(
          'one train step, padding read', 'ms',
          compare('train', 'step', workers, args.rounds),
          lambda s: s / args.steps * 1e3)
    if 'epoch' in args.only:
      results['epoch'] = show(
          f'an epoch of {steps} steps, padding not read, scaled from '
          f'{args.epoch_steps} of them\n(mean padded length '
          f'{sizes["sample_width"]:.0f} tokens, of the epoch '
          f'{sizes["epoch_width"]:.0f})', 's',
          compare('train', 'epoch', workers, args.rounds),
          lambda s: s / args.epoch_steps * steps)
    if 'evaluate' in args.only:
      results['evaluate'] = show(
          f'evaluate {args.reviews:,} reviews', 'reviews/s',
          compare('evaluate', 'evaluate', workers, args.rounds),
          lambda s: args.reviews / s, 'maximum')
    stack.close()  # the others' memory and threads are not in the way
    if 'startup' in args.only:
      results['startup'] = startup(names, directory, min(args.rounds, 5))
    if 'time_to_accuracy' in args.only:
      print()
      results['time_to_accuracy'] = time_to_accuracy(
          names, directory, args.repeats, args.limit)
    if 'memory' in args.only:
      results['memory'] = memory(names, directory)
  print()
  print_load()
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(results, indent=2) + '\n')


if __name__ == '__main__':
  main()
