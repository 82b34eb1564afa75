"""Where more chips of a TPU v5e stop to pay, by estimates and without any.

  pip install -e '.[aot]'
  python benchmarks/chips.py [default|wide:kernel|scan ...]

is for configs/default.py, and the same with 128 units in bfloat16, each with
config.model.recurrence=kernel and =scan, on 1 to 256 chips: the default's batch
of 64 reviews over all of them, and 64 a chip. None runs. Compute is what the
compiler says, see flax_imdb/analysis/schedules.py. The all-reduce follows from
its bytes in the program and the published speed of the links.

To compile a step takes minutes, so that three are compiled of each (`POINTS`).
The others are on the plane through these: compute and bytes grow with the
segments of a chip, and with the pairs of words in the whole batch, of which
each chip adds up the gradients. The batch is as wide as can be: three segments
a review, ten a chip at least.
"""

import os
import re
import sys
from typing import NamedTuple

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

from ml_collections import ConfigDict  # noqa: E402
import numpy as np  # noqa: E402

from flax_imdb.analysis import ahead_of_time, schedules  # noqa: E402
from flax_imdb.config import load_config, override  # noqa: E402
from flax_imdb.data.batches import shapes  # noqa: E402
from flax_imdb.errors import UserError  # noqa: E402

# A step with 512 units takes libtpu more than 40 minutes on two cores.
CONFIGS = {'default': {}, 'wide': {'width': 128, 'dtype': 'bfloat16'}}
FORMS = 'kernel', 'scan'
SIDES = 1, 2, 4, 8, 16  # of a slice: its chips are the square
POINTS = (1, 64), (4, 64), (8, 1)  # side and reviews a chip
# Bytes a second: 400 Gbit each way, four links a chip, 1,600 Gbit together
# (cloud.google.com/tpu/docs/v5e).
LINK = 50e9
# Seconds, some 1 us (jax-ml.github.io/scaling-book/sharding, where three hops
# were measured to take 8 us).
HOP = 1e-6


class Row(NamedTuple):
  """A line of the table; times in ms."""
  chips: int
  rows: int  # reviews a chip
  compute: float
  kernels: float  # of compute
  megabytes: float  # of the all-reduce
  all_reduce: float

  @property
  def reviews(self) -> float:
    """Reviews a second: nothing is assumed to overlap."""
    return 1e3 * self.chips * self.rows / (self.compute + self.all_reduce)


def all_reduce_bytes(hlo: str) -> int:
  """Bytes that all-reduces of XLA's optimised instructions add up, a chip."""
  return int(sum(
      int(bits or 8) / 8 * np.prod([int(n) for n in shape.split(',') if n])
      for result in re.findall(r' = (.*) all-reduce\(', hlo)
      for bits, shape in re.findall(r'[a-z](\d*)\[([\d,]*)\]', result)))


def all_reduce_seconds(count: float, side: int) -> float:
  """A reduce-scatter and an all-gather of `count` bytes over side x side chips.

  Both go in rings over rows and columns at once, half the bytes each way:
  2 (n - 1) / n bytes over the links that can be used. All four have a ring in
  the torus of 16 x 16. Smaller slices are a mesh, without the links that close
  a ring, and have half of that; their ends are side - 1 hops apart.
  """
  chips, torus = side * side, side == 16
  hops = 2 * (side // 2 if torus else side - 1)
  return (2 * (chips - 1) / chips * count / (LINK * (4 if torus else 2))
          + 2 * hops * HOP)


def measure(config: ConfigDict, side: int, rows: int) -> list[float]:
  """Compiles a train step: cycles, cycles in kernels, all-reduced bytes."""
  devices = ahead_of_time.describe(f'v5e:{side}x{side}')
  program = ahead_of_time.compile_program(config, devices, rows, True)
  if not program:
    raise UserError(f'{rows} reviews a chip do not fit into v5e:{side}x{side}')
  found = schedules.estimate(program['hlo'], program['bundles'])
  assert not found.unread
  return [found.cycles, found.kernel_cycles, all_reduce_bytes(program['hlo'])]


def place(config: ConfigDict, side: int, rows: int) -> list[int]:
  """Where on the plane: 1, segments a chip, pairs of all chips."""
  batch = shapes(config, rows, side * side)
  return [1, batch['ids'][0][0], batch['bigram_rows'][0][0]]


def table(name: str, form: str) -> None:
  """Prints a line for each number of chips, and where they stop to pay."""
  config = load_config('configs/default.py')
  for field, value in (CONFIGS[name] | {'recurrence': form}).items():
    override(config, f'model.{field}', str(value))
  places = np.array([place(config, *point) for point in POINTS], float)
  measured = np.array([measure(config, *point) for point in POINTS])
  plane = np.linalg.solve(places, measured[:, :2])
  # One chip has nothing to reduce; and the segments of a chip add no bytes.
  line = np.linalg.solve(places[1:, [0, 2]], measured[1:, 2])
  for scaling, sizes in (
      ('64 reviews', [(side, 64 // side**2) for side in SIDES if side <= 8]),
      ('64 reviews a chip', [(side, 64) for side in SIDES])):
    print(f'\n{name}, {form}, {scaling} (* compiled)\n'
          f'{"chips":>5}{"a chip":>8}{"compute ms":>12}{"in kernels":>12}'
          f'{"MB":>8}{"all-reduce ms":>15}{"reviews/s":>12}{"a chip":>8}')
    found: list[Row] = []
    for side, rows in sizes:
      here = np.array(place(config, side, rows))
      cycles, in_kernels = here @ plane
      count = here[[0, 2]] @ line if side > 1 else 0
      hertz = schedules.CLOCK['v5e'] * 1e6  # cycles a ms
      found.append(row := Row(
          side * side, rows, cycles / hertz, in_kernels / hertz, count / 1e6,
          1e3 * all_reduce_seconds(count, side)))
      share = row.reviews / row.chips / found[0].reviews
      print(f'{row.chips:5}{row.rows:8}{row.compute:12.2f}{row.kernels:12.2f}'
            f'{row.megabytes:8.1f}{row.all_reduce:15.3f}{row.reviews:12,.0f}'
            f'{share:8.0%}{" *" if (side, rows) in POINTS else ""}')
    print(verdict(found), flush=True)


def verdict(found: list[Row]) -> str:
  """Up to where four times the chips bring at least twice the speed."""
  for few, many in zip(found, found[1:], strict=False):
    if many.reviews < 2 * few.reviews:
      return (f'Up to {few.chips} pay, with '
              f'{few.reviews / found[0].reviews:.1f} times the speed of one: '
              f'{many.chips} have {many.reviews / few.reviews:.2f} times that '
              f'of {few.chips}.')
  return (f'All {found[-1].chips} pay, with '
          f'{found[-1].reviews / found[0].reviews:.1f} times the speed of one.')


def main() -> None:
  """Prints the tables of all configs and forms, or of those given."""
  wanted = sys.argv[1:] or [f'{name}:{form}' for form in FORMS
                            for name in CONFIGS]
  for pair in wanted:
    name, _, form = pair.partition(':')
    if name not in CONFIGS or form not in FORMS:
      raise SystemExit(f'error: no {pair!r}: give one such as wide:kernel')
    try:
      table(name, form)
    except UserError as e:
      raise SystemExit(f'error: {e}') from e


if __name__ == '__main__':
  main()
