"""The same train step under pmap, as trained with, and under jit + shard_map.

  python benchmarks/shard_map.py
  python benchmarks/shard_map.py --processes=2 --rounds=20

trains both from the same state on the same random reviews, with two CPU devices
in one process or one in each of two, and compares all bits of the state. Then
it times them by turns, STEPS steps a round, from NumPy batches to the end of
the last step. Printed for each size: the median time of a step, and the median
of the ratios within a round. The small step is one in which there is little but
the dispatch to be timed.
"""

import argparse
from collections.abc import Callable
import functools
import os
import socket
import statistics
import subprocess
import sys
import time
from unittest import mock

import numpy as np

from flax_imdb import environment
from flax_imdb.config import override, packaged

STEPS = 8
SIZES = {  # of a batch; the small one has a model of width 8
    'configs/words.py, 128 x 500': {},
    'small, 16 x 20': {'global_batch_size': '16', 'data.max_length': '20',
                       'model.width': '8', 'model.embedding_dim': '8'}}


def shard_map_step(train_step: Callable) -> tuple[Callable, Callable]:
  """Returns a compiled step(state, batch), and what makes its arguments global.

  `train_step(state, batch, sum_over_devices)` is what `devices.data_parallel`
  compiles. Each process passes `place` its own rows, int or float [b, ...].
  """
  import jax
  from jax.flatten_util import ravel_pytree
  from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

  from flax_imdb.cluster.devices import AXIS
  mesh = Mesh(np.array(jax.devices()), (AXIS,))

  def sum_over_devices(tree):
    vector, unravel = ravel_pytree(tree)
    return unravel(jax.lax.psum(vector, AXIS))

  def place(tree, spec):
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(
        NamedSharding(mesh, spec), np.asarray(x)), tree)

  compiled = jax.jit(jax.shard_map(
      lambda state, batch: train_step(state, batch, sum_over_devices),
      mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=(P(), P()),
      check_vma=False), donate_argnums=0)
  # One thread a device on a CPU, as in `devices.data_parallel`.
  return (lambda state, rows: compiled(
      jax.block_until_ready(state), place(rows, P(AXIS))),
          lambda state: place(state, P()))


def compare(fields: dict[str, str], rounds: int) -> str:
  """Trains and times both forms of a size; returns a line."""
  import jax

  from flax_imdb.cluster import devices
  from flax_imdb.data.reading import Share
  from flax_imdb.model import classifier
  from flax_imdb.train import step
  from flax_imdb.train.optimizer import build_optimizer

  config = packaged('words')
  for field, text in fields.items():
    override(config, field, text)
  model = classifier.build_model(config)
  optimizer = build_optimizer(config, 100)
  make = functools.partial(
      step.make_train_step, config, model, optimizer, 100)
  with mock.patch.object(step, 'data_parallel', lambda body, _: body):
    sharded_step, make_global = shard_map_step(make())
  rng = np.random.default_rng(0)
  shape = config.global_batch_size, config.data.max_length
  batch = {'ids': rng.integers(4, config.data.vocab_size, shape, np.int32),
           'lengths': rng.integers(1, shape[1] + 1, shape[0], np.int32),
           'labels': rng.integers(0, 2, shape[0]).astype(np.float32),
           'weights': np.ones(shape[0], np.float32),
           'places': np.arange(shape[0], dtype=np.int32)}
  own = Share(*devices.share()).rows(config.global_batch_size)
  rows = {k: v[own] for k, v in batch.items()}
  first = devices.to_host(devices.replicate(
      step.init_state(config, model, optimizer)))
  forms = {  # the step, what it makes of a batch of rows, its state
      'pmap': [make(), devices.shard, devices.replicate(first)],
      'shard_map': [sharded_step, lambda rows: rows, make_global(first)]}

  def run(name: str) -> float:
    train_step, to_batch, state = forms[name]
    start = time.perf_counter()
    for _ in range(STEPS):
      state, metrics = train_step(state, to_batch(rows))
    jax.block_until_ready(metrics)
    forms[name][2] = state
    return 1000 * (time.perf_counter() - start) / STEPS

  times: dict[str, list[float]] = {name: [] for name in forms}
  for i in range(rounds + 1):  # the first one compiles
    for name in forms if i % 2 else reversed(forms):
      times[name].append(run(name))
  states = [jax.tree.leaves(devices.to_host(state))
            for _, _, state in forms.values()]
  equal = all(a.tobytes() == b.tobytes()
              for a, b in zip(*states, strict=True))
  pmap, sharded = times['pmap'][1:], times['shard_map'][1:]
  ratio = statistics.median(b / a for a, b in zip(pmap, sharded, strict=True))
  return (f'pmap {statistics.median(pmap):.2f} ms, shard_map '
          f'{statistics.median(sharded):.2f} ms, ratio {ratio:.3f}; '
          f'{len(states[0])} arrays after {STEPS * (rounds + 1)} steps: '
          + ('the same bits' if equal else 'DIFFERENT BITS'))


def main() -> None:
  """Starts the processes, or is one of them."""
  parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False)
  parser.add_argument('--processes', type=int, choices=(1, 2), default=1)
  parser.add_argument('--rounds', type=int, default=12, help='default: 12')
  parser.add_argument('--worker', nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  os.environ.update(JAX_PLATFORMS='cpu',
                    JAX_NUM_CPU_DEVICES=str(2 // args.processes))
  if args.processes == 2 and not args.worker:
    with socket.create_server(('127.0.0.1', 0)) as server:
      address = f'127.0.0.1:{server.getsockname()[1]}'
    workers = [subprocess.Popen([sys.executable, *sys.argv, '--worker', address,
                                 str(i)]) for i in range(2)]
    sys.exit(max(worker.wait() for worker in workers))
  environment.configure(128 // args.processes)
  import jax

  from flax_imdb.cluster import processes
  if args.worker:
    processes.initialize(args.worker[0], 2, int(args.worker[1]))
  if processes.index() == 0:
    print(f'jax {jax.__version__}, {args.processes} processes, '
          f'{jax.device_count()} devices, {args.rounds} rounds', flush=True)
  for name, fields in SIZES.items():
    line = compare(fields, args.rounds)
    if processes.index() == 0:
      print(f'{name}: {line}', flush=True)
  processes.shut_down()


if __name__ == '__main__':
  main()
