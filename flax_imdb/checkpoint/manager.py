"""orbax: save, restore, latest and best.

A checkpoint holds NumPy trees, so it restores on any number of devices, by the
names of its two items: model, and training, which only training needs.

Of several processes the first alone writes; the others only read. To orbax
each is alone: its own barriers would wait for ever for a process that is lost.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
import dataclasses
import pathlib
import time
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from flax_imdb.checkpoint import seal
from flax_imdb.cluster import devices, processes
from flax_imdb.errors import UserError
from flax_imdb.storage import bucket, files

# {'model': a tree of arrays or of their shapes, 'training': another}
Items = dict[str, Any]
# What is saved beside the progress, to know it again.
_SEAL = ('score', 'model', 'training', 'crc32')


@dataclasses.dataclass
class Progress:
  """What a run remembers beside its arrays; a part of every checkpoint."""
  reference: float | None = None  # the score to beat, None before the first
  waited: int = 0  # epochs since one did
  stopped: bool = False  # early stopping has ended the run
  seconds: float = 0.0  # of training and validation, over all resumes

  def __post_init__(self):
    """Raises ValueError if this is none that a run can have had."""
    for name, kinds in {'reference': (int, float, type(None)), 'waited': (int,),
                        'stopped': (bool,), 'seconds': (int, float)}.items():
      value = getattr(self, name)
      if type(value) not in kinds or not -1e15 < (value or 0) < 1e15:
        raise ValueError(f'its progress has {name}={value!r:.20}')


class DamagedError(UserError):
  """A checkpoint that can't be read."""


def _rank(metrics: dict[str, float]) -> tuple[float, float]:
  """Sorts the best checkpoint last; of equal ones the earliest."""
  return metrics['score'], -metrics['step']


class Checkpoints:
  """The checkpoints of a run directory: the latest two and the best one."""

  def __init__(self, workdir: str, read_only: bool = False):
    """Opens `workdir`/checkpoints, which need not exist yet.

    Raises UserError if it can't be made. If a score can't be read,
    `restore_newest` tells; with `read_only` this raises DamagedError.
    """
    self._read_only = read_only = read_only or processes.index() > 0
    self._workdir = files.as_path(workdir)
    self._set_aside = self._set_broken_scores_aside(read_only)
    options = ocp.CheckpointManagerOptions(
        # Without it best_step() would silently be the latest step; without the
        # policies a worsening score would evict the latest step.
        best_fn=_rank, read_only=read_only, create=False,
        cleanup_tmp_directories=not read_only,
        multiprocessing_options=_alone(),
        # Or threads wait 5 minutes for one that can't be made, then exit.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        preservation_policy=policies.AnyPreservationPolicy([
            policies.LatestN(2), policies.BestN(
                get_metric_fn=_rank, n=1,
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
      self._manager.close()  # waits for the save in flight

  def _writing(self) -> AbstractContextManager[None]:
    return files.writing(self._workdir / 'checkpoints')

  def steps(self) -> list[int]:
    """The steps there are, ascending."""
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    """The last step saved, None if there is none."""
    return self._manager.latest_step()

  def wait(self) -> None:
    """Waits until what `save` began is on disk, for all processes to see.

    Raises as `files.writing` if it can't be written; the steps before stay.
    """
    with self._writing():
      self._manager.wait_until_finished()
    processes.gather('saved')
    if self._read_only:
      self._manager.reload()

  def best(self) -> int | None:
    """The step with the best score, None if there is none."""
    return self._manager.best_step()

  def save(self, step: int, items: Items, progress: Progress,
           score: float | None) -> None:
    """Starts to save; returns once the arrays may be changed again.

    All processes call this, and the first one saves. Raises as `wait`, also of
    the save before. `items` are replicated on the devices. The larger a score,
    the better; None, of weights that were not evaluated, is never the best.
    """
    if self._read_only:
      return
    items = devices.to_host(items)
    metrics = None if score is None else {'score': score, 'step': step}
    sealed = seal.sealed(dataclasses.asdict(progress) | {'score': score} | {
        name: seal.checksum(tree) for name, tree in items.items()})
    with self._writing():
      self._manager.save(step, metrics=metrics, args=ocp.args.Composite(
          progress=ocp.args.JsonSave(sealed),
          **{name: ocp.args.StandardSave(tree)
             for name, tree in items.items()}))

  def restore(self, step: int, shapes: Items) -> tuple[Items, Progress]:
    """Reads items and the progress, which a stranger may have written.

    `shapes` are of one item or both, as of `jax.eval_shape`: sizes are compared
    before anything is allocated. Returns the items asked for, replicated on
    today's devices, and the progress. Raises DamagedError if the step is none
    or damaged, UserError if it has another shape, TransientError as `wait`.
    """
    folder = self._manager.directory / str(step)
    stored = ocp.StandardCheckpointHandler(multiprocessing_options=_alone())
    try:
      seal.check_files(folder)
      for name, tree in shapes.items():
        seal.check_stored(
            f'checkpoint {step}', tree, stored.metadata(folder / name).tree)
      # NumPy's arrays leave the placement to `replicate`.
      templates = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
      found = self._manager.restore(step, args=ocp.args.Composite(
          progress=ocp.args.JsonRestore(),
          **{k: ocp.args.StandardRestore(v) for k, v in templates.items()}))
      items, sealed = {name: found[name] for name in shapes}, found.progress
      if sealed != seal.sealed(sealed) or any(
          sealed[name] != seal.checksum(tree) for name, tree in items.items()):
        raise ValueError('its progress or arrays were changed')
      progress = Progress(
          **{k: v for k, v in sealed.items() if k not in _SEAL})
      score = (self._manager.metrics(step) or {}).get('score')
      if sealed['score'] != score or (
          'training' in items and items['training']['step'] != step):
        raise ValueError('its score or step was changed')
    except UserError:  # of other arrays or shapes: not damaged
      raise
    except Exception as e:  # orbax raises all kinds, JSON's and TensorStore's
      bucket.raise_failure(e, f'cannot read checkpoint {step}')
      reason = str(e).strip().split('\n')[0][:200]
      raise DamagedError(
          f'checkpoint {step} cannot be restored ({reason}); the steps found '
          f'are {self.steps()}: choose another with --step, or delete it'
      ) from e
    return devices.replicate(items), progress

  def _set_broken_scores_aside(self, read_only: bool) -> list[str]:
    """Makes way for orbax, which opens no directory with such a file in it."""
    messages = []
    for file in sorted(self._workdir.glob('checkpoints/*/metrics/metrics')):
      name = file.parents[1].name
      if not name.isdecimal():  # of a save that was killed, or no step's at all
        continue
      if name != str(step := int(name)):  # orbax would take 07 for 7
        raise UserError(f'{file.parents[1]} is none that a run makes: move it')
      try:
        seal.check_score(file, step)
      except ValueError:
        if read_only:
          raise DamagedError(f'checkpoint {step} has a damaged score: delete '
                             f'{file.parents[1]}, or train again, which sets '
                             'it aside') from None
        messages.append(f'checkpoint {step} cannot be restored (its score is '
                        f'damaged); it is set aside as {self._aside(step)}')
    return messages

  def _aside(self, step: int) -> pathlib.Path:
    """Moves a step out of the way; it is soon saved again."""
    path = self._workdir / 'damaged' / f'{step}-{time.time_ns()}'
    files.move(self._workdir / 'checkpoints' / str(step), path)
    return path

  def restore_newest(self, shapes: Items, announce: Callable[[str], None]
                     ) -> tuple[Items, Progress] | None:
    """Reads the newest step that is whole; moves others to workdir/damaged.

    The first process chooses, and the others follow. `announce` is told which
    are set aside, and why. Returns and raises as `restore`; None if none is.
    """
    found, chosen = None, ''
    if processes.index() == 0:
      for message in self._set_aside:
        announce(message)
      for step in reversed(self.steps()):
        try:
          found, chosen = self.restore(step, shapes), str(step)
          break
        except DamagedError as e:
          announce(f'{e}; it is set aside as {self._aside(step)}')
          self._manager.reload()
    chosen = processes.gather(chosen)[0]
    if chosen and processes.index() > 0:
      self._manager.reload()
      found = self.restore(int(chosen), shapes)
    return found


def _alone() -> ocp.options.MultiprocessingOptions:
  """Tells orbax that there is no other process."""
  this = jax.process_index()
  return ocp.options.MultiprocessingOptions(
      primary_host=this, active_processes={this},
      barrier_sync_key_prefix=f'process{this}')
