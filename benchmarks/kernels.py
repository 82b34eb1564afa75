"""What the forms of the LSTM cost on a TPU or GPU, by compilers alone.

  pip install -e '.[aot]'
  python benchmarks/kernels.py --tpu

  pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12
  python benchmarks/kernels.py --gpu

compiles value and gradient of a layer, both directions under mean and max
pooling as in the classifier, for chips that are not there, a v5e and an H100:
some 10 s a row on 2 CPU cores, a minute at width 512. For a TPU `bundles` are
the instructions of the final schedules, of a time step: of a scan those of all
operations in the bodies of its loops, of kernels all there are; `m_cycles` are
millions of cycles of the whole, by the head of flax_imdb/analysis/schedules.py:
XLA charges some 1,800 for each small operation of a scan. For a GPU:
registers a thread, bytes spilled and KiB of shared memory a block, each the
larger of forward and backward kernel, as ptxas says. `kernels` are operations
that are started a batch, `peak_mib` memory. These are schedules, not times: no
bundle waits for memory, and nothing is said of going from one operation to the
next, of which a scan has more.
"""

from collections.abc import Iterator
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

from accelerators import count  # noqa: E402
import jax  # noqa: E402, it reads the environment when it starts
import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
import numpy as np  # noqa: E402

from flax_imdb.analysis import ahead_of_time, schedules  # noqa: E402
from flax_imdb.errors import UserError  # noqa: E402
from flax_imdb.model import forms, gpu_kernel  # noqa: E402
from flax_imdb.model.recurrent import RecurrentLayer  # noqa: E402

# [T, B, E], H: configs/default.py, configs/words.py, and wider.
SHAPES = ((500, 128, 35, 32), (100, 192, 32, 32), (100, 192, 32, 64),
          (100, 192, 32, 128))
DTYPES = ('float32', 'bfloat16')
# The same for a TPU, and what a time step may cost at most (the goals).
TPU_SHAPES = {
    (500, 128, 32, 32): 1000, (100, 192, 35, 32): None, (500, 16, 32, 32): 600,
    (500, 512, 32, 32): 2600, (500, 128, 128, 128): 3000,
    (100, 128, 512, 512): None}
COLUMNS = {
    'tpu': ('bundles', 'm_cycles', 'kernels', 'peak_mib', 'seconds'),
    'gpu': ('kernels', 'registers', 'spilled', 'shared_kib', 'peak_mib')}


def layers(form: str, weights: list, x_TBE: jax.Array, lengths_B: jax.Array,
           dtype: str) -> list[jax.Array]:
  """float32 [T, B, H] states; of two directions the second is reversed."""
  reverse = [d == 1 for d in range(len(weights))]
  if form != 'scan':
    return forms.recurrence(
        form, 'lstm', weights, x_TBE, lengths_B, reverse=reverse, dtype=dtype)
  width = weights[0]['recurrent_kernel'].shape[0]
  return [RecurrentLayer('lstm', width, jnp.dtype(dtype), reverse=r).apply(
      {'params': {'steps': {'cell': w}}}, x_TBE, lengths_B)[0]
          for w, r in zip(weights, reverse, strict=True)]


def compile_layer(topology: str, form: str, shape: tuple[int, ...], dtype: str,
                  directions: int, pooled: bool) -> dict[str, Any]:
  """Compiles value and gradient of a layer for a device of `topology`.

  Not `pooled`, the gradient with respect to the states is given. Returns
  kernels started a batch, peak_mib, seconds to compile, and hlo.
  """
  t, b, e, h = shape
  mesh = Mesh(np.array(ahead_of_time.describe(topology)[:1]), ('batch',))
  sharding = NamedSharding(mesh, PartitionSpec())
  def array(*shape, dtype='float32'):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def run(weights, x, lengths, given):
    def states(weights, x):
      return layers(form, weights, x, lengths, dtype)
    if not pooled:
      found, backward = jax.vjp(states, weights, x)
      return found, backward(given)
    inside_TB1 = (jnp.arange(t)[:, None] < lengths)[..., None]
    def loss(weights, x):
      return sum(jnp.vdot(of_mean, jnp.sum(h, axis=0, where=inside_TB1))
                 + jnp.vdot(of_max, jnp.max(
                     h, axis=0, where=inside_TB1, initial=-1))
                 for h, (of_mean, of_max) in zip(
                     states(weights, x), given, strict=True))
    return jax.value_and_grad(loss, argnums=(0, 1))(weights, x)

  weights = {'kernel': array(e, 4 * h), 'recurrent_kernel': array(h, 4 * h),
             'bias': array(4 * h)}
  given = array(2, b, h) if pooled else array(t, b, h)
  start = time.perf_counter()
  # Pallas asks it which device it lowers for.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(run).lower(
        directions * [weights], array(t, b, e), array(b, dtype='int32'),
        directions * [given]).compile()
  seconds, counted = time.perf_counter() - start, count(compiled.as_text())
  return {'kernels': counted['kernels'] + t * counted['loop_kernels'],
          'peak_mib': compiled.memory_analysis().peak_memory_in_bytes / 2**20,
          'seconds': seconds, 'hlo': compiled.as_text()}


def tpu_row(form: str, shape: tuple[int, ...], dtype: str = 'float32',
            topology: str = 'v5e:1x1') -> dict[str, Any]:
  """`compile_layer`, and bundles a time step, of both directions and passes."""
  row = compile_layer(topology, form, shape, dtype, 2, True)
  folder, hlo = schedules.dump_folder(), row.pop('hlo')
  assert folder, 'LIBTPU_INIT_ARGS names a folder of its own'
  operations = {
      match[1]: sum(schedules.bundles_by_depth(file).values())
      for file in folder.iterdir()
      if (match := schedules.FILE.fullmatch(file.name))}
  found = schedules.estimate(hlo, schedules.kernel_bundles(folder))
  return row | {'m_cycles': found.cycles / 1e6, 'bundles': (
      found.kernel_cycles / shape[0] if form == 'tpu' else
      loop_bundles(hlo, operations))}


def loop_bundles(hlo: str, operations: dict[str, int]) -> float:
  """Bundles in the bodies of all loops, by those of each operation's schedule.

  Of equal operations libtpu writes one down; the others count as the largest
  of their kind.
  """
  parts = dict(re.findall(
      r'^(?:ENTRY )?(%\S+) .*\{\n((?:  .*\n)*)', hlo, re.MULTILINE))
  names = [name for body in re.findall(r' while\(.*body=(%[\w.-]+)', hlo)
           for name in re.findall(
               r'^ +(?:ROOT )?%([\w.-]+) = .*"estimated_cycles"', parts[body],
               re.MULTILINE)]
  def kind(name: str) -> str:
    return re.sub(r'[.\d]+$', '', name)
  of_kind: dict[str, int] = {}
  for name in names:
    of_kind[kind(name)] = max(
        operations.get(name, 0), of_kind.get(kind(name), 0))
  return float(sum(
      operations.get(name, of_kind[kind(name)]) for name in names))


def gpu_row(form: str, shape: tuple[int, ...], dtype: str, directions: int = 2,
            pooled: bool = True) -> dict[str, Any]:
  """`compile_layer` in a process of its own, whose log has ptxas' words.

  Returns what it does and, of the form gpu, also registers a thread, bytes
  spilled and shared_kib a block.
  """
  arguments = ['cuda:h100', form, list(shape), dtype, directions, pooled]
  with tempfile.TemporaryDirectory() as folder:
    process = subprocess.run(
        [sys.executable, __file__, '--row', json.dumps(arguments)],
        env=os.environ | {
            'TF_CPP_MIN_LOG_LEVEL': '0',
            'TF_CPP_VMODULE': 'subprocess_compilation=5',
            'XLA_FLAGS': f'--xla_dump_to={folder}'},
        capture_output=True, encoding='utf-8', check=False)
    if process.returncode:
      raise RuntimeError(process.stderr)
    thunks = ''.join(file.read_text('utf-8') for file in pathlib.Path(
        folder).glob('*.thunk_sequence.txt'))
  row = json.loads(process.stdout.splitlines()[-1])
  del row['hlo']
  said = re.findall(
      r"entry function 'lstm_\w+'.*\n.*\n.* (\d+) bytes spill stores, (\d+) .*"
      r'\n.*Used (\d+) registers', process.stderr)
  if form == 'gpu':
    shared = re.findall(r'lstm_\w+ grid.*shared_memory: (\d+) bytes', thunks)
    row |= {'registers': max(int(r) for *_, r in said),
            'spilled': max(int(a) + int(b) for a, b, _ in said),
            'shared_kib': max(map(int, shared)) / 1024}
  return row


def gpu_rows() -> Iterator[tuple[str, dict[str, Any] | str]]:
  """Yields (name, row), or for a row why there is none."""
  for shape, dtype in itertools.product(SHAPES, DTYPES):
    for form in ('scan', 'gpu'):
      refused = form == 'gpu' and gpu_kernel.refusal(shape[-1], dtype)
      yield _name(shape, dtype, form), refused or gpu_row(form, shape, dtype)


def tpu_rows() -> Iterator[tuple[str, dict[str, Any] | str]]:
  """As `gpu_rows`; of kernels also the row of bfloat16."""
  for shape, goal in TPU_SHAPES.items():
    for form, dtype in (('scan', 'float32'), ('joint', 'float32'),
                        ('tpu', 'float32'), ('tpu', 'bfloat16')):
      yield _name(shape, dtype, form) + (
          f', goal {goal}' if goal and form == 'tpu' else ''), tpu_row(
              form, shape, dtype)


def _name(shape: tuple[int, ...], dtype: str, form: str) -> str:
  return '{} x {} x {}, width {} {} {}'.format(*shape, dtype, form)


def main() -> None:
  """Prints the table."""
  if sys.argv[1:2] == ['--row']:
    topology, form, shape, *rest = json.loads(sys.argv[2])
    print(json.dumps(compile_layer(topology, form, tuple(shape), *rest)))
    return
  if sys.argv[1:] not in (['--gpu'], ['--tpu']):
    raise SystemExit('error: give --gpu or --tpu')
  chip = sys.argv[1][2:]
  print(f'{"T x B x E, width":56}' + ''.join(f'{c:>12}' for c in COLUMNS[chip]))
  try:
    for name, row in tpu_rows() if chip == 'tpu' else gpu_rows():
      print(f'{name:56}' + (f'  {row}' if isinstance(row, str) else ''.join(
          f'{row.get(c, ""):12.1f}' if isinstance(row.get(c), float) else
          f'{row.get(c, ""):>12}' for c in COLUMNS[chip])), flush=True)
  except UserError as e:
    raise SystemExit(f'error: {e}') from e


if __name__ == '__main__':
  main()
