"""What the kernels of the LSTM cost beside the scan, by compilers alone.

  pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12
  python benchmarks/kernels.py --gpu

compiles value and gradient of a layer, both directions under mean and max
pooling as in the classifier, for an H100 that is not there: some 10 s a row on
2 CPU cores. Columns: kernels started a batch; registers a thread, bytes spilled
and KiB of shared memory a block, each the larger of forward and backward
kernel, as ptxas says; peak memory.
"""

from collections.abc import Iterator
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

from accelerators import count  # noqa: E402
import jax  # noqa: E402, it reads the environment when it starts
import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
import numpy as np  # noqa: E402

from flax_imdb.analysis import ahead_of_time  # noqa: E402
from flax_imdb.errors import UserError  # noqa: E402
from flax_imdb.model import gpu_kernel  # noqa: E402
from flax_imdb.model.recurrent import RecurrentLayer  # noqa: E402

# [T, B, E], H: configs/default.py, configs/words.py, and wider.
SHAPES = ((500, 128, 35, 32), (100, 192, 32, 32), (100, 192, 32, 64),
          (100, 192, 32, 128))
DTYPES = ('float32', 'bfloat16')
COLUMNS = ('kernels', 'registers', 'spilled', 'shared_kib', 'peak_mib')


def layers(form: str, weights: list, x_TBE: jax.Array, lengths_B: jax.Array,
           dtype: str) -> list[jax.Array]:
  """float32 [T, B, H] states; of two directions the second is reversed."""
  reverse = [d == 1 for d in range(len(weights))]
  if form == 'gpu':
    return gpu_kernel.lstm(
        weights, x_TBE, lengths_B, reverse=reverse, dtype=dtype)
  width = weights[0]['recurrent_kernel'].shape[0]
  return [RecurrentLayer('lstm', width, jnp.dtype(dtype), reverse=r).apply(
      {'params': {'steps': {'cell': w}}}, x_TBE, lengths_B)[0]
          for w, r in zip(weights, reverse, strict=True)]


def compile_layer(topology: str, form: str, shape: tuple[int, ...], dtype: str,
                  directions: int, pooled: bool) -> dict[str, Any]:
  """Compiles value and gradient of a layer for a device of `topology`.

  Not `pooled`, the gradient with respect to the states is given. Returns
  kernels started a batch, and peak_mib.
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
  # Pallas asks it which device it lowers for.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(run).lower(
        directions * [weights], array(t, b, e), array(b, dtype='int32'),
        directions * [given]).compile()
  counted = count(compiled.as_text())
  return {'kernels': counted['kernels'] + t * counted['loop_kernels'],
          'peak_mib': compiled.memory_analysis().peak_memory_in_bytes / 2**20}


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
  for shape in SHAPES:
    for dtype in DTYPES:
      for form in ('scan', 'gpu'):
        name = '{} x {} x {}, width {} {} {}'.format(*shape, dtype, form)
        refused = form == 'gpu' and gpu_kernel.refusal(shape[-1], dtype)
        yield name, refused or gpu_row(form, shape, dtype)


def main() -> None:
  """Prints the table."""
  if sys.argv[1:2] == ['--row']:
    topology, form, shape, *rest = json.loads(sys.argv[2])
    print(json.dumps(compile_layer(topology, form, tuple(shape), *rest)))
    return
  if sys.argv[1:] != ['--gpu']:
    raise SystemExit('error: give --gpu')
  print(f'{"T x B x E, width":48}' + ''.join(f'{c:>12}' for c in COLUMNS))
  try:
    for name, row in gpu_rows():
      print(f'{name:48}' + (f'  {row}' if isinstance(row, str) else ''.join(
          f'{row.get(c, ""):12.1f}' if isinstance(row.get(c), float) else
          f'{row.get(c, ""):>12}' for c in COLUMNS)), flush=True)
  except UserError as e:
    raise SystemExit(f'error: {e}') from e


if __name__ == '__main__':
  main()
