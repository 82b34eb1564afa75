"""The programs of a run, compiled side by side before its first step."""

from collections.abc import Callable, Iterator
from concurrent import futures
import time
from typing import Any

import jax
import numpy as np

from flax_imdb import environment
from flax_imdb.cluster import devices, processes
from flax_imdb.cluster.preemption import Stop
from flax_imdb.data.batches import eval_sizes, shapes
from flax_imdb.inference import evaluate
from flax_imdb.model import classifier
from flax_imdb.train.step import TrainState
from flax_imdb.train.task import Task


def compile_ahead(
    task: Task, state: TrainState, steps: range, stop: Stop) -> None:
  """Compiles all that these steps and the evaluation call, where that pays.

  Elsewhere, for what was not foreseen, and if the run is asked to stop
  meanwhile, each is compiled by its first call, as `threads` says. Of several
  processes all must call this. Raises what the first call would.
  """
  if (most := threads()) == 1:
    return
  processes.report_alive('compile')
  start = time.perf_counter()
  programs = list(_programs(task, state, steps, stop))
  under_way: dict[futures.Future, tuple[Callable, dict]] = {}
  pool = futures.ThreadPoolExecutor(most)
  try:
    # To lower holds Python's lock, to compile does not. jit keeps what is
    # compiled so: the call finds it, and is that of a run without this.
    for function, values, batch in programs:
      if stop.agreed():
        return
      lowered = function.lower(values, batch)
      under_way[pool.submit(lowered.compile)] = function, batch
      _show(task, under_way, len(programs))
    for future in futures.as_completed(under_way):
      future.result()
      task.compiled.note(*under_way[future])
      _show(task, under_way, len(programs))
      if stop.agreed():
        return
  finally:
    pool.shutdown(cancel_futures=True)  # what has begun can't be ended
  task.terminal.announce(
      f'{len(programs)} programs compiled, up to {most} at a time, in '
      f'{time.perf_counter() - start:.1f} s')


def threads() -> int:
  """How many programs compile at a time, the same in all processes.

  1 stands for each by its first call. So it is on a CPU, whose compiler takes
  all cores for one program: on 2, eight widths side by side took as long as one
  after another (RESULTS.md), and a short run need not wait for all.
  """
  if devices.debugging() or jax.default_backend() == 'cpu':
    return 1
  # The watchdog counts on all doing the same.
  return min(map(int, processes.gather(str(environment.available_cores()))))


def _programs(task: Task, state: TrainState, steps: range,
              stop: Stop) -> Iterator[tuple[Any, Any, dict]]:
  """Functions of `CompileClock.wrap`, and for each shape what to call it with.

  The batches are of `devices.shard`; those to evaluate have but zeros, for the
  n-grams of their reviews are not looked up yet.
  """
  config, share = task.config, task.batches.share
  for step in task.batches.first_of_each_shape(steps):
    yield task.train_step, state, stop.with_vote(
        devices.shard(task.batches(step)))
  own = len(range(share.devices)[share.own])
  size = evaluate.batch_size(config)
  for ids in sorted(set().union(*(
      eval_sizes(split, size, task.batches.reading, share)
      for split in task.splits.values()))):
    batch = {name: np.zeros((own, *shape), dtype)
             for name, (shape, dtype) in shapes(
                 config, size // share.devices, share.devices, ids,
                 len(task.labels)).items()}
    yield task.forward, state.eval_params(), (
        batch if config.objective == 'language_model' else
        classifier.inputs(batch))


def _show(task: Task, under_way: dict[futures.Future, Any], total: int) -> None:
  done = sum(future.done() for future in under_way)
  task.terminal.progress('compiling programs', done, total)
