"""What the train step becomes on TPUs and GPUs, without any of them.

  pip install -e '.[aot]'
  python benchmarks/accelerators.py [TOPOLOGY ...]

compiles the widest batch of configs/words.py in each variant for each
topology (named as for --topology; by default one and four chips of a TPU v5e
and, where the CUDA plugin is installed, an H100) and prints a table; some
seconds a row on 2 CPU cores. Columns: peak and temporary memory a device,
temporaries without what a TPU keeps on its chip; all-reduces; kernels a step
outside the loops over time; in the loops, kernels a time step, its cycles by
the TPU compiler's estimate, and what the loops hold; seconds to compile.
JAX_DEFAULT_MATMUL_PRECISION, jax' own variable, changes what float32 means:
highest, or bfloat16, which on a TPU is the default.

  python benchmarks/accelerators.py --lower

needs no extra package: it lowers the train step for one device, without the
compilers behind, to one module for cuda and tpu, and prints the module's size.

  python benchmarks/accelerators.py --run

runs on the device there is: accelerators_run.py.
"""

import functools
import importlib.util
import itertools
import os
import re
import sys

if __name__ == '__main__' and sys.argv[1:2] == ['--run']:
  import accelerators_run  # before jax, for which what follows names the CPU
  sys.exit(accelerators_run.main(sys.argv[2:]))

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import jax  # noqa: E402, it reads the environment when it starts
from jax import export  # noqa: E402
import numpy as np  # noqa: E402

from flax_imdb.analysis import ahead_of_time  # noqa: E402
from flax_imdb.config import (
  load_config,  # noqa: E402
  override,  # noqa: E402
)
from flax_imdb.errors import UserError  # noqa: E402
from flax_imdb.model import classifier  # noqa: E402
from flax_imdb.train.optimizer import build_optimizer  # noqa: E402
from flax_imdb.train.step import (
  init_state,  # noqa: E402
  make_train_step,  # noqa: E402
)

VARIANTS = {
    'model.width': (32, 256),
    'model.dtype': ('float32', 'bfloat16'),
    'model.remat': (True, False),
}
COLUMNS = {'peak_mib': 'peak MiB', 'temp_mib': 'temp MiB',
           'all_reduces': 'all-reduces', 'kernels': 'kernels',
           'loop_kernels': 'in loops', 'loop_cycles': 'loop cycles',
           'loop_mib': 'loop MiB',
           'compile_seconds': 'seconds'}
PLATFORMS = ('cuda', 'tpu')


def variants():
  """Yields (names of the values, config) for all combinations."""
  for values in itertools.product(*VARIANTS.values()):
    config = load_config('configs/words.py')
    for field, value in zip(VARIANTS, values, strict=True):
      override(config, field, str(value))
    yield ' '.join(map(str, values)), config


def count(hlo: str) -> dict[str, int | float]:
  """Counts in XLA's optimised instructions.

  Returns:
    loops; kernels (run once), loop_kernels (run each time step), loop_mib
    (arrays that loops hold), loop_cycles (of a time step, by the TPU compiler's
    estimate; 0 on GPUs).
  """
  parts = re.findall(r'^(ENTRY|%\S+) .*\{\n((?:  .*\n)*)', hlo, re.MULTILINE)
  kernel = re.compile(r' (?:fusion|dot|convolution|custom-call|copy)\(')
  kernels = {name: len(kernel.findall(part)) for name, part in parts}
  cycles = {name: sum(map(int, re.findall(r'"estimated_cycles":"(\d+)', part)))
            for name, part in parts}
  loops = re.findall(r' = (.*) while\(.*body=(%[\w.-]+)', hlo)
  held = re.findall(r'[a-z](\d*)\[([\d,]+)\]', ' '.join(a for a, _ in loops))
  return {
      'loops': len(loops), 'kernels': kernels['ENTRY'],
      'loop_kernels': sum(kernels[body] for _, body in loops),
      'loop_cycles': sum(cycles[body] for _, body in loops),
      'loop_mib': float(sum(
          int(bits or 8) / 2**23 * np.prod([int(n) for n in shape.split(',')])
          for bits, shape in held))}


def table(topologies: list[str]) -> None:
  """Prints a line for each topology and variant."""
  print(f'{"topology":10}{"variant":24}'
        + ''.join(f'{title:>13}' for title in COLUMNS.values()))
  for topology in topologies:
    devices = ahead_of_time.describe(topology)
    for name, config in variants():
      rows = config.global_batch_size // len(devices)
      program = ahead_of_time.compile_program(config, devices, rows, True)
      if program:
        program |= count(program['hlo'])
      values = [program.get(column, 'too large') for column in COLUMNS]
      print(f'{topology:10}{name:24}' + ''.join(
          f'{v:13.1f}' if isinstance(v, float) else f'{v:>13}'
          for v in values), flush=True)


def lower() -> None:
  """Prints the size of each variant's step, lowered for all `PLATFORMS`."""
  for name, config in variants():
    model = classifier.build_model(config)
    optimizer = build_optimizer(config, 1)
    state = jax.eval_shape(
        functools.partial(init_state, config, model, optimizer))
    step = make_train_step(
        config, model, optimizer, 1, jax.local_devices()[:1])
    size = config.global_batch_size
    batch = {k: jax.ShapeDtypeStruct((1, size), dtype) for k, dtype in (
        ('lengths', 'i4'), ('labels', 'f4'), ('weights', 'f4'))}
    batch['ids'] = jax.ShapeDtypeStruct(
        (1, size, config.data.max_length), 'i4')

    # Flat, for `export` knows only the containers that are registered with it.
    leaves, tree = jax.tree.flatten(state)
    def flat(leaves, batch, step=step, tree=tree):
      return jax.tree.leaves(step(jax.tree.unflatten(tree, leaves), batch))
    module = export.export(jax.jit(flat), platforms=PLATFORMS)(leaves, batch)
    print(f'{name:24}lowered for {" and ".join(module.platforms)}: '
          f'{len(module.mlir_module_serialized) / 1e3:.0f} kB', flush=True)


def main() -> None:
  """Prints the table, or with --lower the sizes."""
  topologies = sys.argv[1:]
  if topologies == ['--lower']:
    lower()
    return
  if not topologies:
    topologies = ['v5e:1x1', 'v5e:2x2']
    if importlib.util.find_spec('jax_cuda12_plugin'):
      topologies.append('cuda:h100')
  try:
    table(topologies)
  except UserError as e:
    raise SystemExit(f'error: {e}') from e


if __name__ == '__main__':
  main()
