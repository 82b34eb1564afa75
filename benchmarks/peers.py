"""Our training against Keras on JAX, Keras on TensorFlow and PyTorch, on a CPU.

  pip install -e '.[bench]'
  TFDS_DATA_DIR=... python benchmarks/peers.py
  python benchmarks/peers.py --only=step,epoch --rounds=12 --json=FILE
  python benchmarks/peers.py --json=FILE --picture=FILE
  python benchmarks/peers.py --check

prints a table for each of these; a peer that is not installed is left out:

  step              one step on padded batches of 500 tokens; padding is read
  epoch             an epoch of the notebook's 17,500 reviews; it is not read
  evaluate          validation reviews a second; padding is not read
  startup           process start to first finished step, cold and warm cache
  time_to_accuracy  start to an accuracy on validation, configs/words.py
  memory            peak resident memory of a fresh process after some steps

Each peer gets the best way it has, and so it gets several; a row is a way, and
says what was given. Keras has train_on_batch, compiled: on JAX as it is, with
our flags of XLA, and DataParallel over a CPU device a core with those flags; on
TensorFlow the graph that jit_compile='auto' chooses, and XLA. PyTorch is its
fused nn.LSTM, time first, with a thread a core and with one (its threads spin
while they wait for each other, which costs where another process wants a
core), under torch.compile, which leaves nn.LSTM as it is, with its optimizer's
fused or foreach form, and in inference mode. About padding a peer masks 500
tokens, gets batches in steps of some tokens, as wide as their longest review,
or packed. The fastest row of a peer is the peer.

A system with what it is given lives in a process of its own (peers_worker.py),
warmed up, and sleeps until it is its turn; a round asks each once, and each
round begins with another. The ratio is the median over the rounds of peer's
time / our time in that round, so that a machine that is slow for a while is
slow for both. A quarter and three quarters of the rounds' ratios stand beside
it. The load average is printed first and last; a run beside other work says
little about anyone.

All read the same IMDB reviews, batch by batch, and begin with the same weights
in float32; the loss of the first step, or of all reviews evaluated, must agree
to a relative 1e-4, or the program says which does not and exits with 1 before
it prints a time; --check ends after these comparisons. After that losses part
where libraries do: PyTorch's RMSprop has epsilon beside the root, which Keras
and we have in it.

An epoch is measured on --epoch_steps of its batches, every k-th of those sorted
by their longest review, and scaled to all steps. Startup is ours with all that
a run does, of peers building the model, loading the batch and a step. The clock
of time_to_accuracy starts with the process, with empty caches, and never stands
still: compiling and the evaluations, one each quarter epoch, are in it.
"""

import argparse
import contextlib
import functools
import json
import math
import pathlib
import statistics
import tempfile
import time
from typing import Any

from peers_process import (
  OURS,
  Way,
  Worker,
  fail,
  first_step,
  installed,
  load,
  machine,
)

TARGETS = (0.78, 0.87)
TOLERANCE = 1e-4  # relative, of a loss
SETTLE = 0.05  # seconds; idle threads spin for a moment before they sleep

# The ways of each table, of which the first is ours.
WAYS = {
    'step': [
        Way(OURS, '', 'plain'), Way(OURS, 'one', 'plain'),
        Way('keras_jax', '', 'plain'), Way('keras_jax', 'flags', 'plain'),
        Way('keras_jax', 'parallel', 'plain'),
        Way('keras_tensorflow', '', 'plain'),
        Way('keras_tensorflow', 'jit', 'plain'),
        Way('torch', '', 'plain'), Way('torch', 'one', 'plain'),
        Way('torch', 'compiled', 'plain')],
    'epoch': [
        Way(OURS, '', 'own'), Way(OURS, 'one', 'own'),
        Way('keras_jax', '', 'padded'), Way('keras_jax', '', 'bucketed 64'),
        Way('keras_jax', 'parallel', 'bucketed 64'),
        Way('keras_tensorflow', '', 'padded'),
        Way('keras_tensorflow', '', 'trimmed'),
        Way('keras_tensorflow', 'jit', 'bucketed 64'),
        Way('torch', 'one', 'packed'), Way('torch', '', 'trimmed'),
        Way('torch', 'one', 'trimmed'), Way('torch', 'compiled', 'trimmed')],
    'evaluate': [
        Way(OURS, '', 'own'), Way(OURS, 'one', 'own'),
        Way('keras_jax', '', 'padded'), *(
            Way(system, setting, padding, size)
            for system, setting, padding in (
                ('keras_jax', '', 'bucketed 64'),
                ('keras_jax', 'parallel', 'bucketed 64'),
                ('keras_tensorflow', '', 'trimmed'),
                ('keras_tensorflow', 'jit', 'bucketed 64'),
                ('torch', '', 'trimmed'), ('torch', 'one', 'trimmed'))
            for size in (128, 256))],
    'startup': [
        Way(OURS, '', 'plain'), Way('keras_jax', '', 'plain'),
        Way('keras_tensorflow', '', 'plain'), Way('torch', '', 'plain'),
        Way('torch', 'one', 'plain')],
    'time_to_accuracy': [
        Way(OURS, '', 'own', 256), Way('keras_jax', '', 'bucketed 128', 256),
        Way('keras_jax', 'parallel', 'bucketed 128', 256),
        Way('keras_tensorflow', '', 'trimmed', 256),
        Way('keras_tensorflow', 'jit', 'bucketed 128', 256),
        Way('torch', '', 'trimmed', 256), Way('torch', 'one', 'trimmed', 256)],
    'memory': [
        Way(OURS, '', 'plain'), Way('keras_jax', '', 'plain'),
        Way('keras_tensorflow', '', 'plain'), Way('torch', '', 'plain')],
}

Seconds = dict[Way, list[float]]  # a round each


def check_losses(what: str, losses: dict[Way, float]) -> None:
  """Ends the program if a loss differs from ours."""
  ours = next(iter(losses.values()))
  for way, loss in losses.items():
    if not abs(loss - ours) <= TOLERANCE * abs(ours):
      fail(f'{what}: {way.system} ({way.given()}) has loss {loss:.7f}, '
           f'{OURS} {ours:.7f}')
  print(f'\n{what}: losses agree with {ours:.6f}', flush=True)


def rotated(ways: list[Way], by: int) -> list[Way]:
  """The same, another first each round."""
  by %= len(ways)
  return ways[by:] + ways[:by]


def table(title: str, unit: str, seconds: Seconds, convert=lambda s: s,
          evaluating: bool = False) -> dict[str, Any]:
  """Prints a table, whose ratios are to its first way; returns it for JSON.

  Args:
    title: what was timed.
    unit: of what `convert` returns.
    seconds: of each way and round; inf if an accuracy was never reached.
    convert: seconds to what is printed.
    evaluating: whether the size of batches evaluated is told.
  """
  print(f'\n{title}\n\n| | given | {unit}: median | best | ratio '
        '| quartiles |\n|---|---|---|---|---|---|')
  rows = []
  ours = next(iter(seconds.values()))
  for way, times in seconds.items():
    low, ratio, high = quartiles(
        [t / o for t, o in zip(times, ours, strict=True)])
    row = {'system': way.system,
           'given': way.given(evaluating and way.system != OURS),
           'median': convert(quartiles(times)[1]), 'best': convert(min(times)),
           'ratio': ratio, 'quartiles': [low, high],
           'each': [convert(s) for s in times]}
    rows.append(row)
    print(f'| {way.system} | {row["given"]} | {text(row["median"], ".4g")} '
          f'| {text(row["best"], ".4g")} | {text(ratio, ".2f")} '
          f'| {text(low, ".2f")}, {text(high, ".2f")} |', flush=True)
  return {'title': title, 'unit': unit, 'rounds': len(ours), 'rows': rows}


def text(value: float, form: str) -> str:
  """A number; an accuracy that was not reached has none."""
  return format(value, form) if math.isfinite(value) else 'never'


def finite(results: Any) -> Any:
  """The same with None for what JSON has no number for."""
  if isinstance(results, dict):
    return {key: finite(value) for key, value in results.items()}
  if isinstance(results, list):
    return [finite(value) for value in results]
  infinite = isinstance(results, float) and not math.isfinite(results)
  return None if infinite else results


def quartiles(values: list[float]) -> list[float]:
  """The values at a quarter, a half and three quarters, of any number of them.

  Only the half is a mean of two, which is inf if one is: never reached.
  """
  ordered = sorted(values)
  n = len(ordered)
  return [ordered[(n - 1) // 4], statistics.median(ordered),
          ordered[-1 - (n - 1) // 4]]


def compare(op: str, name: str, ways: list[Way], workers: dict[Any, Worker],
            rounds: int) -> Seconds:
  """Builds and checks what a table needs, warms it up, and times it."""
  def ask(way: Way, **request: Any) -> dict[str, Any]:
    if op == 'evaluate':
      request['eval_batch_size'] = way.eval_batch_size
    return workers[way.system, way.setting].ask(
        op, padding=way.padding, **request)

  for system, setting, padding in dict.fromkeys(way[:3] for way in ways):
    workers[system, setting].ask('build', padding=padding)
  first = {'count': 1} if op == 'train' else {}
  check_losses(f'{name}: first {op}', {
      way: ask(way, **first)['loss'] for way in ways})
  if rounds:
    for _ in range(2):  # every width is compiled, then all runs once as later
      for way in ways:
        ask(way)
  seconds: Seconds = {way: [] for way in ways}
  for i in range(rounds):
    for way in rotated(ways, i):
      time.sleep(SETTLE)
      seconds[way].append(ask(way)['seconds'])
  return seconds


def startup(ways: list[Way], directory: str, rounds: int
            ) -> dict[str, Seconds]:
  """Times first steps, the warm one right after the cold one."""
  times: dict[str, Seconds] = {
      kind: {way: [] for way in ways} for kind in ('cold', 'warm')}
  for i in range(-1, rounds):
    for way in rotated(ways, i):
      with tempfile.TemporaryDirectory() as cache:
        for kind in times:
          seconds = first_step(way, directory, cache)
          if i >= 0:  # the first of all only brings the files into memory
            times[kind][way].append(seconds)
  return times


def time_to_accuracy(ways: list[Way], directory: str, seeds: int, limit: float
                     ) -> dict[float, Seconds]:
  """One process after the other, all ways of a seed before the next seed."""
  reached: dict[float, Seconds] = {
      target: {way: [] for way in ways} for target in TARGETS}
  for seed in range(seeds):
    losses = {}
    for way in rotated(ways, seed):
      with (tempfile.TemporaryDirectory() as cache,
            Worker(way.system, way.setting, directory, cache) as worker):
        answer = worker.ask(
            'time_to_accuracy', padding=way.padding, seed=seed, limit=limit,
            eval_batch_size=way.eval_batch_size, started=worker.started,
            targets=TARGETS)
      losses[way] = answer['loss']
      for target, s in zip(TARGETS, answer['seconds'], strict=True):
        reached[target][way].append(float('inf') if s is None else s)
      print(f'{way.system} ({way.given()}), seed {seed}: accuracy each quarter '
            'epoch ' + ' '.join(f'{a:.3f}' for a in answer['accuracies']),
            flush=True)
    check_losses('time_to_accuracy: initial weights',
                 {way: losses[way] for way in ways})
  return reached


def memory(ways: list[Way], directory: str) -> dict[str, Any]:
  """Takes steps in fresh processes."""
  print('\nmemory, MiB')
  result = {}
  for way in ways:
    with Worker(way.system, way.setting, directory) as worker:
      worker.ask('build', padding=way.padding)
      worker.ask('train', padding=way.padding)
      result[way.system] = worker.ask('memory')['mib']
    print(f'{way.system:18}{result[way.system]:10.0f}', flush=True)
  return result


def arguments() -> argparse.Namespace:
  """The command line."""
  def tables(text: str) -> list[str]:
    unknown = [t for t in text.split(',') if t not in WAYS]
    if unknown:
      raise argparse.ArgumentTypeError(
          f'{unknown[0]!r} is no table; there are {", ".join(WAYS)}')
    return text.split(',')

  def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
      raise argparse.ArgumentTypeError(f'{text!r} is not a positive number')
    return int(text)

  class Parser(argparse.ArgumentParser):
    def error(self, message: str):
      self.exit(2, f'peers.py: {message}\n')

  parser = Parser(description=(__doc__ or '').splitlines()[0])
  parser.add_argument('--only', type=tables, default=list(WAYS),
                      help='tables, with commas in between')
  for name, default, text in (
      ('rounds', 12, 'times that each way is asked'),
      ('steps', 8, 'steps a round of the table step'),
      ('epoch_steps', 12, 'batches that stand for an epoch'),
      ('reviews', 2560, 'validation reviews to evaluate'),
      ('seeds', 3, 'of time_to_accuracy'),
      ('limit', 300, 'seconds that a way may take to an accuracy')):
    parser.add_argument(f'--{name}', type=positive, default=default, help=text)
  parser.add_argument('--check', action='store_true',
                      help='compare losses of step, epoch, evaluate; no times')
  parser.add_argument('--json', help='file to write all times to')
  parser.add_argument('--picture', help='file to draw the ratios in')
  return parser.parse_args()


def main() -> None:
  """Prints the tables asked for, and writes them."""
  args = arguments()
  names = installed()
  results: dict[str, Any] = {'machine': machine(names), 'load': [load()]}
  print(f'{results["machine"]}\nload average of the last minute: {load()}',
        flush=True)
  ways = {name: [way for way in some if way.system in names]
          for name, some in WAYS.items() if name in args.only}
  with (tempfile.TemporaryDirectory() as directory,
        contextlib.ExitStack() as stack):
    with Worker(OURS, '', directory) as worker:
      sizes = worker.ask('prepare', steps=args.steps, reviews=args.reviews,
                         epoch_steps=args.epoch_steps, seeds=args.seeds)
    steps = sizes['steps_per_epoch']
    timed = {name: ways[name] for name in ('step', 'epoch', 'evaluate')
             if name in ways}
    workers = {
        key: stack.enter_context(Worker(*key, directory))
        for key in dict.fromkeys(
            (way.system, way.setting) for some in timed.values()
            for way in some)}
    shown = {
        'step': functools.partial(
            table, 'one train step of configs/notebook.py, 128 x 500 tokens, '
            'padding read', 'ms', convert=lambda s: s / args.steps * 1e3),
        'epoch': functools.partial(
            table, f'an epoch of {steps} steps of configs/notebook.py, padding '
            f'not read, scaled from {args.epoch_steps} of them\n(a batch\'s '
            f'longest review: {sizes["sample_longest"]:.0f} tokens on average, '
            f'{sizes["epoch_longest"]:.0f} in all the epoch)', 's',
            convert=lambda s: s / args.epoch_steps * steps),
        'evaluate': functools.partial(
            table, f'{args.reviews:,} reviews evaluated, configs/notebook.py, '
            'padding not read', 'reviews/s',
            convert=lambda s: args.reviews / s, evaluating=True)}
    for name, some in timed.items():
      seconds = compare('evaluate' if name == 'evaluate' else 'train', name,
                        some, workers, 0 if args.check else args.rounds)
      if not args.check:
        results[name] = shown[name](seconds=seconds)
    stack.close()  # the others' memory and threads are not in the way
    if args.check:
      return
    if 'startup' in ways:
      for kind, seconds in startup(
          ways['startup'], directory, args.rounds).items():
        results[f'startup_{kind}'] = table(
            'start to the first finished step of configs/notebook.py, '
            f'{kind} compile cache', 's', seconds)
    if 'time_to_accuracy' in ways:
      print()
      for target, seconds in time_to_accuracy(
          ways['time_to_accuracy'], directory, args.seeds, args.limit).items():
        results[f'time_to_{target}'] = table(
            f'start to an accuracy of {target} on validation, '
            'configs/words.py, nothing compiled; a round is a seed', 's',
            seconds, evaluating=True)
    if 'memory' in ways:
      results['memory'] = memory(ways['memory'], directory)
  results['load'].append(load())
  print(f'\nload average of the last minute: {load()}')
  if args.json:
    pathlib.Path(args.json).write_text(
        json.dumps(finite(results), indent=2) + '\n')
  if args.picture:
    from peers_picture import draw
    draw(finite(results), args.picture)


if __name__ == '__main__':
  main()
