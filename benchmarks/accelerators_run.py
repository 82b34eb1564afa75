"""What `accelerators.py --run` does: the forms of the LSTM, timed on a device.

  python benchmarks/accelerators.py --run --batches=128 --length=500
  python benchmarks/accelerators.py --run --batches=192 --length=100
  python benchmarks/accelerators.py --run --json=FILE --picture=FILE.png

runs on the first device that jax finds. So far these were CPUs, to test it.
Forms: scan, joint and kernel are config.model.recurrence; interpret is the
TPU's kernel on a CPU; cudnn, on a GPU, is jax.experimental.rnn in our model;
torch, and keras on JAX, are taken where they are installed. All train the model
of configs/words.py in float32, without dropout, which no two libraries draw
alike, on one batch of random words: 1 to --length of them a review, padded to
that. It comes from the host, as in training.

A form is timed only if its losses are those of the scan to a relative
TOLERANCE: of three steps, and of an evaluation after them. Of float32 operands
TPUs read bfloat16, which moved these losses by up to 5e-4 on a CPU, and GPUs
TF32 with three bits more; a gradient without the bias, or without the recurrent
kernel, moved them by 1.1e-3 or more.

The forms of a batch and width are timed by turns, so that drift hits all alike;
a time is the median of the rounds. Columns: a train step; an epoch of 22,500
reviews at that pace, which nobody ran; an evaluation of the batch; the first
step, which compiles it; MiB of a step, ours by the compiler; and, on a chip of
PEAKS, TFLOP/s and the share of what the roofline allows; see `roofline`.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
import traceback
from typing import Any

os.environ.setdefault('JAX_NUM_CPU_DEVICES', '1')
# PyTorch wants some of the memory, too.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
from flax_imdb import environment  # noqa: E402

environment.configure(global_batch_size=128)

import accelerators_forms as forms  # noqa: E402, jax reads the environment
import jax  # noqa: E402
import numpy as np  # noqa: E402

from flax_imdb.config import packaged  # noqa: E402
from flax_imdb.errors import UserError  # noqa: E402
from flax_imdb.fields import check_fields  # noqa: E402
from flax_imdb.inference.evaluate import score  # noqa: E402
from flax_imdb.model import classifier  # noqa: E402
from flax_imdb.train.optimizer import build_optimizer  # noqa: E402
from flax_imdb.train.step import init_state  # noqa: E402

# TFLOP/s of products of float32, as a chip rounds them by itself (bfloat16; or
# TF32, dense), and GB/s. Sources: docs.cloud.google.com/tpu/docs, a page each;
# of H100 and H200, SXM, pages that quote NVIDIA's data sheets.
PEAKS = {
    'TPU v4': (275, 1228), 'TPU v5 lite': (197, 819), 'TPU v5e': (197, 819),
    'TPU v5': (459, 2765), 'TPU v5p': (459, 2765), 'TPU v6 lite': (918, 1638),
    'TPU v6e': (918, 1638), 'NVIDIA H100 80GB HBM3': (494, 3350),
    'NVIDIA H200': (494, 4800)}
TOLERANCE = {'cpu': 1e-4, 'gpu': 3e-4, 'tpu': 1e-3}
REVIEWS = 22_500  # of an epoch of configs/words.py
MIN_SECONDS = 0.05  # shorter steps are repeated for about this long in a round
COLUMNS = {'step_ms': 'step ms', 'epoch_s': '(epoch s)',
           'evaluate_ms': 'eval ms', 'first_step_s': 'first s',
           'peak_mib': 'MiB', 'tflops': 'TFLOP/s', 'roofline': 'roofline %'}


def roofline(row: dict) -> tuple[float, float]:
  """FLOPs and bytes of a train step's recurrent layer, E = 32, in float32.

  Of FLOPs 2 a weight and token forward and twice that backward, for two
  directions of 4H (E + H) weights; gates computed again do not count, padding
  does. Of bytes the fewest: x read twice and its gradient written; h and c
  written and read, and h's gradient read. Source of the roofline: Williams,
  Waterman & Patterson 2009.
  """
  tokens, width, features = 2 * row['batch'] * row['length'], row['width'], 32
  return (3 * 2 * tokens * 4 * width * (features + width),
          4 * tokens * (3 * features + 5 * width))


def config_of(width: int, batch: int, length: int):
  """What all train; UserError if it can't be.

  At a rate that every library can hold, and at which a wide model does not jump
  (Yang et al. 2021: Adam's goes with 1 / width) and part from its like.
  """
  config = packaged('words')
  config.num_epochs, config.warmup_epochs = 50_000, 0.0  # of a step each
  config.global_batch_size, config.data.max_length = batch, length
  config.model.width, config.learning_rate = width, 0.16 / max(width, 1)
  config.adam_epsilon = 1e-12  # Keras adds it before the correction of v
  for what in ('word', 'embedding', 'pooled'):
    config.model[f'{what}_dropout'] = 0.0
  check_fields(config)
  return config


def random_batch(config) -> dict:
  """A batch as of `batches.pad`; its reviews have 1 to max_length tokens."""
  rng = np.random.default_rng(0)
  rows, length = config.global_batch_size, config.data.max_length
  lengths = rng.integers(1, length + 1, rows, np.int32)
  ids = rng.integers(4, config.data.vocab_size, (rows, length), np.int32)
  return {'ids': np.where(np.arange(length) < lengths[:, None], ids, 0),
          'lengths': lengths, 'weights': np.ones(rows, np.float32),
          'labels': rng.integers(0, 2, rows).astype(np.float32),
          'places': np.arange(rows, dtype=np.int32)}


def attempt(row: dict, function) -> Any:
  """What function() returns; or None, and the row says why it did not.

  What a device refuses or can't hold is an answer, else it is a failure.
  """
  try:
    return function()
  except (UserError, RuntimeError) as e:  # XLA's and PyTorch's are the latter
    memory = 'RESOURCE_EXHAUSTED' in str(e) or 'out of memory' in str(e)
    row['failed'] = not memory and not isinstance(e, UserError)
    if row['failed']:
      traceback.print_exc()
    row['why'] = ('does not fit: ' if memory else '') + (
        str(e).splitlines()[0][:200])
    return None


def begin(row: dict, config, device, state, batch: dict, scan: dict):
  """Makes a form and compares its losses; None if they are not the scan's."""
  start = time.perf_counter()
  system = forms.make(row['form'], config, device, state)
  losses = []
  for _ in range(3):
    system.step(batch)
    losses.append(system.wait())
    row.setdefault('first_step_s', time.perf_counter() - start)
  row['losses'] = [
      *losses, score(system.logits(batch), batch['labels'])['loss']]
  error = float(np.max(np.abs(np.divide(
      row['losses'], scan.get('losses', np.nan)) - 1)))
  if not error <= TOLERANCE[device.platform]:  # NaN is not, either
    row['failed'], row['why'] = True, (
        f'losses {" ".join(f"{x:.6f}" for x in row["losses"])} are not the '
        f"scan's to {TOLERANCE[device.platform]:g}: off by {error:.1e}")
    return None
  row['peak_mib'] = system.peak_mib(batch)
  return system


def timed(system, batch: dict, steps: int) -> tuple[float, float]:
  """Seconds of a train step, and of an evaluation: means of `steps` each."""
  start = time.perf_counter()
  for _ in range(steps):
    system.step(batch)
  system.wait()
  between = time.perf_counter()
  for _ in range(steps):
    system.logits(batch)
  return (between - start) / steps, (time.perf_counter() - between) / steps


def measure(names: list[str], config, device: jax.Device,
            rounds: int) -> list[dict]:
  """The rows of one width and batch, of which the first is the scan's."""
  rows = [{'device': device.device_kind, 'form': name,
           'width': config.model.width, 'batch': config.global_batch_size,
           'length': config.data.max_length} for name in names]
  batch, running = random_batch(config), []
  state = attempt(rows[0], lambda: jax.device_get(init_state(
      config, classifier.build_model(config), build_optimizer(config, 1))))
  for row in rows if state else []:
    system = attempt(row, lambda row=row: begin(
        row, config, device, state, batch, rows[0]))
    once = system and attempt(row, lambda s=system: timed(s, batch, 1))
    if once:
      steps = max(1, round(MIN_SECONDS / once[0]))
      running.append((row, [], lambda s=system, n=steps: timed(s, batch, n)))
  for turn in range(rounds):
    by = turn % max(1, len(running))
    for row, times, again in running[by:] + running[:by]:
      if 'why' not in row and (seconds := attempt(row, again)):
        times.append(seconds)
  for row, times, _ in running:
    if 'why' in row:
      continue
    step, evaluation = map(statistics.median, zip(*times, strict=True))
    row |= {'step_ms': 1e3 * step, 'evaluate_ms': 1e3 * evaluation,
            'epoch_s': step * -(-REVIEWS // row['batch'])}
    if row['device'] in PEAKS:
      flops, moved = roofline(row)
      peak, bandwidth = PEAKS[row['device']]
      least = max(flops / (peak * 1e12), moved / (bandwidth * 1e9))
      row |= {'tflops': flops / step / 1e12, 'roofline': 100 * least / step}
  return rows


def line(row: dict) -> str:
  """A row as it is printed."""
  return f'{row["form"]:10}{row["width"]:>6}{row["batch"]:>7}' + (
      f'  {row["why"]}' if 'why' in row else ''.join(
          f'{"":>11}' if row.get(name) is None else f'{row[name]:11.2f}'
          for name in COLUMNS))


def draw(rows: list[dict], file: str) -> None:
  """Writes a PNG: TFLOP/s by FLOPs a byte, under the roof where it is known."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 6), layout='constrained')
  axes = figure.add_subplot(
      xlabel="FLOPs a byte, of the recurrent layer's train step", xscale='log',
      ylabel='TFLOP/s; larger dots are larger batches', yscale='log',
      title=f'{rows[0]["device"]}, {rows[0]["length"]} tokens')
  for form in dict.fromkeys(row['form'] for row in rows):
    some = [row for row in rows if row['form'] == form and 'why' not in row]
    flops, moved = np.array([roofline(row) for row in some] or [(1, 1)]).T
    axes.scatter((flops / moved)[:len(some)], [
        f / row['step_ms'] / 1e9 for f, row in zip(flops, some, strict=False)],
        [10 * np.log2(row['batch'] + 1) for row in some], alpha=0.7, label=form)
  if rows[0]['device'] in PEAKS:
    peak, bandwidth = PEAKS[rows[0]['device']]
    places = np.geomspace(1, 2000)
    axes.plot(places, np.minimum(peak, places * bandwidth / 1e3), 'k-',
              label='roofline')
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(file, format='png', dpi=120)


def parse(argv: list[str]) -> argparse.Namespace:
  """Reads the flags; what would fail after the measurement fails here."""
  def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(',')]
  parser = argparse.ArgumentParser(
      prog='accelerators.py --run', allow_abbrev=False)
  for flag, kind, default, text in (
      ('batches', numbers, '128,1024,4096,16384', 'reviews, or segments'),
      ('widths', numbers, '32,128,1024', 'of each direction'),
      ('length', int, 100, 'tokens'), ('rounds', int, 12, 'of timing'),
      ('forms', str, '', f'of {",".join(forms.FORMS | forms.PEERS)}; all')):
    parser.add_argument(f'--{flag}', type=kind, default=default,
                        help=f'{text}; default: {default}')
  parser.add_argument('--json', metavar='FILE', help='write all rows')
  parser.add_argument('--picture', metavar='FILE.png', help='draw a roofline')
  args = parser.parse_args(argv)
  args.forms = args.forms.split(',') if args.forms else None
  if not set(args.forms or []) <= {*forms.FORMS, *forms.PEERS}:
    parser.error(f'--forms: choose of {",".join(forms.FORMS | forms.PEERS)}')
  if args.rounds < 1:
    parser.error(f'--rounds={args.rounds}: must be at least 1')
  try:
    args.configs = [config_of(width, batch, args.length)
                    for width in args.widths for batch in args.batches]
  except UserError as e:
    parser.error(str(e))
  for file in filter(None, (args.json, args.picture)):
    if os.path.isdir(file) or not os.access(
        os.path.dirname(file) or '.', os.W_OK):
      parser.error(f'cannot write {file}: name a file in a writable directory')
  if args.picture and not importlib.util.find_spec('matplotlib'):
    parser.error('--picture needs matplotlib: pip install matplotlib')
  return args


def main(argv: list[str]) -> int:
  """Prints the table, writes what is asked for; 1 if a form failed."""
  args = parse(argv)
  # What the cache holds would take no time to compile.
  jax.config.update('jax_enable_compilation_cache', False)
  device = jax.local_devices()[0]
  names = dict.fromkeys(['scan', *(args.forms or forms.available(device))])
  print(f'{device.device_kind}, jax {jax.__version__}, {args.length} tokens, '
        f'losses equal to {TOLERANCE[device.platform]:g}; (epoch) of '
        f'{REVIEWS:,} reviews is the step times its steps, not run\n'
        f'{"form":10}{"width":>6}{"batch":>7}'
        + ''.join(f'{title:>11}' for title in COLUMNS.values()))
  rows: list[dict] = []
  for config in args.configs:
    some = measure([*names], config, device, args.rounds)
    rows += some
    print('\n'.join(map(line, some)), flush=True)
    if args.json:  # each time: a device may be taken back
      with open(args.json, 'w') as f:
        json.dump(rows, f, indent=1)
  if args.picture:
    draw(rows, args.picture)
  return int(any(row.get('failed') for row in rows))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
