"""orbax: save, restore, latest and best.

A checkpoint holds NumPy trees. The same code so serves one host or many, and
what two devices saved restores on any number of them.

Of several processes the first alone writes; the others only read. To orbax
each is alone: its own barriers would wait for ever for a process that is lost.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
import pathlib
import time
from typing import Any
from typing import Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy
from orbax.checkpoint.checkpoint_managers import BestN
from orbax.checkpoint.checkpoint_managers import LatestN

from flax_imdb import files
from flax_imdb import late_errors
from flax_imdb import parallel
from flax_imdb import processes
from flax_imdb import progress as progress_lib
from flax_imdb import remote
from flax_imdb import seal
from flax_imdb.errors import UserError
from flax_imdb.step import TrainState

# What the progress holds beside what it was given.
_SEAL = ('score', 'model', 'training', 'crc32')


class DamagedError(UserError):
  """A checkpoint that can't be read."""


def _rank(metrics: dict[str, float]) -> tuple[float, float]:
  """Sorts the best checkpoint last; of equal ones the earliest."""
  return metrics['score'], -metrics['step']


class Checkpoints:
  """The checkpoints of a run directory: the latest two and the best one.

  A context manager: leaving it waits for the save in flight.
  """

  def __init__(self, workdir: str, read_only: bool = False):
    """Opens `workdir`/checkpoints, which need not exist yet.

    Raises:
      DamagedError: a score can't be read; unless `read_only`, `restore_newest`
        will tell instead.
      UserError: the directory can't be made.
    """
    late_errors.drop()
    read_only = read_only or processes.index() > 0
    self._read_only = read_only
    self._workdir = files.path(workdir)
    self._set_aside = self._set_broken_scores_aside(read_only)
    options = ocp.CheckpointManagerOptions(
        # Without it best_step() would silently be the latest step; without the
        # policies a worsening score would evict the latest step.
        best_fn=_rank, read_only=read_only, create=False,
        cleanup_tmp_directories=not read_only,
        multiprocessing_options=_alone(),
        # Or threads wait 5 minutes for one that can't be made, then exit.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        preservation_policy=AnyPreservationPolicy([
            LatestN(2), BestN(get_metric_fn=_rank, n=1,
                              keep_checkpoints_without_metrics=False)]))
    with self._writing():
      if not read_only:  # what `create` of orbax does, but not if `_alone`
        (self._workdir / 'checkpoints').mkdir(exist_ok=True)
      self._manager = ocp.CheckpointManager(
          f'{workdir}/checkpoints', options=options)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error) -> None:
    with self._writing():
      self._manager.close()

  def steps(self) -> list[int]:
    """The steps there are, ascending."""
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    """The last step saved, None if there is none."""
    return self._manager.latest_step()

  def wait(self) -> None:
    """Waits until what `save` began is on disk, for all processes to see.

    Raises:
      UserError: the disk is full or can't be written; the steps before stay.
    """
    with self._writing():
      self._manager.wait_until_finished()
    processes.gather('saved')
    if self._read_only:
      self._manager.reload()

  def _writing(self) -> AbstractContextManager[None]:
    return files.writing(self._workdir / 'checkpoints')

  def best(self) -> int | None:
    """The step with the best score, None if there is none."""
    return self._manager.best_step()

  def save(self, state: TrainState, progress: dict[str, Any],
           score: float | None) -> None:
    """Starts to save; returns once `state` may be changed again.

    All processes call this, and the first one saves. Raises as `wait`, also of
    the save before.

    Args:
      state: replicated on the devices.
      progress: what else a run remembers, as JSON can hold it.
      score: the larger, the better; None, of a state that was not evaluated,
        is never the best.
    """
    if self._read_only:
      return
    model, training = _items(parallel.to_host(state))
    step = int(training['step'])
    metrics = None if score is None else {'score': score, 'step': step}
    with self._writing():
      self._manager.save(step, metrics=metrics, args=ocp.args.Composite(
          model=ocp.args.StandardSave(model),
          training=ocp.args.StandardSave(training),
          progress=ocp.args.JsonSave(seal.sealed(progress | {
              'score': score, 'model': seal.checksum(model),
              'training': seal.checksum(training)}))))

  def restore(
      self, step: int, template: TrainState) -> tuple[TrainState, dict]:
    """Reads a whole state.

    Args:
      step: one of `steps()`.
      template: a state, or its shapes as of `jax.eval_shape`.

    Returns:
      The state, replicated on today's devices, and the progress.

    Raises:
      DamagedError: the step is missing or damaged.
      UserError: it is of another shape.
    """
    items, progress = self._read(step, *_items(template))
    return (parallel.replicate(TrainState(**items.model, **items.training)),
            progress)

  def _set_broken_scores_aside(self, read_only: bool) -> list[str]:
    """Makes way for orbax, which opens no directory with such a file in it."""
    messages = []
    for file in sorted(self._workdir.glob('checkpoints/*/metrics/metrics')):
      name = file.parents[1].name
      if not name.isdecimal():  # of a save that was killed, or no step's at all
        continue
      step = int(name)
      if name != str(step):  # orbax would take 07 for 7
        raise UserError(f'{file.parents[1]} is none that a run makes: move it')
      try:
        seal.check_score(file, step)
      except ValueError:
        if read_only:
          raise DamagedError(
              f'checkpoint {step} has a damaged score: delete '
              f'{file.parents[1]}, or train again, which sets it aside'
          ) from None
        messages.append(f'checkpoint {step} cannot be restored (its score is '
                        f'damaged); it is set aside as {self._aside(step)}')
    return messages

  def _aside(self, step: int) -> pathlib.Path:
    """Moves a step out of the way; it is soon saved again."""
    path = self._workdir / 'damaged' / f'{step}-{time.time_ns()}'
    files.move(self._workdir / 'checkpoints' / str(step), path)
    return path

  def restore_newest(
      self, template: TrainState, announce: Callable[[str], None],
  ) -> tuple[TrainState, dict] | None:
    """Reads the newest state that is whole; moves others to workdir/damaged.

    The first process chooses, and the others read what it has chosen.

    Args:
      template: as for `restore`.
      announce: told which steps are set aside, and why.

    Returns:
      As `restore`; None if there is no whole one.

    Raises:
      UserError: a checkpoint is of another shape.
    """
    found, chosen = None, ''
    if processes.index() == 0:
      for message in self._set_aside:
        announce(message)
      for step in reversed(self.steps()):
        try:
          found, chosen = self.restore(step, template), str(step)
          break
        except DamagedError as e:
          announce(f'{e}; it is set aside as {self._aside(step)}')
          self._manager.reload()
    chosen = processes.gather(chosen)[0]
    if chosen and processes.index() > 0:
      self._manager.reload()
      found = self.restore(int(chosen), template)
    return found

  def restore_eval_params(self, step: int, template: TrainState) -> Any:
    """Reads only the parameters to evaluate with; otherwise as `restore`."""
    model, _ = _items(template)
    items, _ = self._read(step, model)
    return parallel.replicate(items.model['ema'] or items.model['params'])

  def _read(self, step: int, model: dict,
            training: dict | None = None) -> tuple[Any, dict[str, Any]]:
    """Reads items and the progress, which a stranger may have written.

    The progress is as it was given to `save`, without its seal. Sizes are
    compared with those of the templates before they are allocated.
    """
    folder = self._manager.directory / str(step)
    arrays = {'model': model} | ({'training': training} if training else {})
    stored = ocp.StandardCheckpointHandler(multiprocessing_options=_alone())
    try:
      seal.check_files(folder)
      for name, tree in arrays.items():
        seal.check_stored(
            f'checkpoint {step}', tree, stored.metadata(folder / name).tree)
      items = self._manager.restore(step, args=ocp.args.Composite(
          progress=ocp.args.JsonRestore(),
          **{name: ocp.args.StandardRestore(_numpy(tree))
             for name, tree in arrays.items()}))
      sealed = items.progress
      if sealed != seal.sealed(sealed) or any(
          sealed[name] != seal.checksum(items[name]) for name in arrays):
        raise ValueError('its progress or arrays were changed')
      progress = {k: v for k, v in sealed.items() if k not in _SEAL}
      progress_lib.check(progress)
      score = (self._manager.metrics(step) or {}).get('score')
      if sealed['score'] != score or (
          training and items.training['step'] != step):
        raise ValueError('its score or step was changed')
      return items, progress
    except UserError:  # of other arrays or shapes: not damaged
      raise
    except Exception as e:  # orbax raises all kinds, JSON's and TensorStore's
      remote.raise_failure(e, f'cannot read checkpoint {step}')
      raise self._damaged(step, str(e).strip().split('\n')[0][:200]) from e

  def _damaged(self, step: int, reason: str) -> DamagedError:
    return DamagedError(
        f'checkpoint {step} cannot be restored ({reason}); the steps found '
        f'are {self.steps()}: choose another with --step, or delete it')


def _alone() -> ocp.options.MultiprocessingOptions:
  """Tells orbax that there is no other process."""
  this = jax.process_index()
  return ocp.options.MultiprocessingOptions(
      primary_host=this, active_processes={this},
      barrier_sync_key_prefix=f'process{this}')


def _items(state: TrainState) -> tuple[dict, dict]:
  """Splits a state into what evaluation needs and what only training does."""
  return ({'params': state.params, 'ema': state.ema},
          {'step': state.step, 'opt_state': state.opt_state,
           'sums': state.sums})


def _numpy(tree: Any) -> Any:
  """A template for orbax that leaves the placement to `replicate`."""
  return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), tree)
