"""orbax: save, restore, latest and best.

A checkpoint holds NumPy trees, so it restores on any number of devices, by the
names of its two items: model, and training, which only training needs.

Of several processes the first alone writes; the others only read. To orbax
each is alone: its own barriers would wait for ever for a process that is lost.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import pathlib
import time
from typing import Any, NoReturn, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from flax_imdb.checkpoint import seal
from flax_imdb.cluster import devices, processes
from flax_imdb.errors import TransientError, UserError
from flax_imdb.storage import files

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

    Without `read_only` all processes call this, and the first one sets aside
    what has a damaged score, before the others look; `restore_newest` tells.
    Raises TransientError if they still see it, with `read_only` DamagedError if
    there is one; as `files.writing` if the directory can't be made, and as
    `restore` if it can't be read.
    """
    self._workdir = files.as_path(workdir)
    self._set_aside: list[str] = []
    writes = not read_only and processes.index() == 0
    if writes:
      self._set_broken_scores_aside()
    if not read_only:
      processes.gather('the broken scores are gone')
    if not writes:
      self._refuse_broken_scores(mended=not read_only)
    self._read_only = read_only = not writes
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

  def _writing(self) -> contextlib.AbstractContextManager[None]:
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
      self._reload()

  def _reload(self) -> None:
    with self._reading('which checkpoints there are'):
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
    or damaged, UserError if it has another shape, and where it can't be read
    as `files.raise_failure`.
    """
    with self._reading(f'checkpoint {step}'):
      try:
        return self._restore(step, shapes)
      except seal.Damage as e:
        raise DamagedError(
            f'checkpoint {step} cannot be restored ({e}); the steps found are '
            f'{self.steps()}: choose another with --step, or delete it') from e

  @contextlib.contextmanager
  def _reading(self, what: str) -> Iterator[None]:
    """Tells the errors of disk and store from a fault of the program."""
    try:
      yield
    except (UserError, TransientError, seal.Damage):
      raise
    except Exception as e:
      files.raise_failure(
          e, f'cannot read {what}',
          f'see that {self._workdir}/checkpoints is to be read, and started '
          'again it goes on')
      raise

  def _restore(self, step: int, shapes: Items) -> tuple[Items, Progress]:
    """As `restore`, but raises Damage, or what orbax could not read."""
    folder = self._manager.directory / str(step)
    stored = ocp.StandardCheckpointHandler(multiprocessing_options=_alone())
    seal.check_files(folder)
    for name, tree in shapes.items():
      seal.check_stored(f'checkpoint {step}', tree, seal.read(
          functools.partial(stored.metadata, folder / name)).tree)
    # NumPy's arrays leave the placement to `replicate`.
    templates = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
    found = seal.read(lambda: self._manager.restore(
        step, args=ocp.args.Composite(
            progress=ocp.args.JsonRestore(),
            **{k: ocp.args.StandardRestore(v) for k, v in templates.items()})))
    items, sealed = {name: found[name] for name in shapes}, found.progress
    if not isinstance(sealed, dict) or sealed != seal.sealed(sealed) or any(
        sealed.get(name) != seal.checksum(tree)
        for name, tree in items.items()):
      raise seal.Damage('its progress or arrays were changed')
    progress = seal.read(lambda: Progress(
        **{k: v for k, v in sealed.items() if k not in _SEAL}))
    score = seal.read(
        lambda: (self._manager.metrics(step) or {}).get('score'))
    if sealed.get('score') != score or (
        'training' in items and items['training']['step'] != step):
      raise seal.Damage('its score or step was changed')
    return devices.replicate(items), progress

  def _broken_scores(self) -> Iterator[tuple[int, seal.Damage]]:
    """The steps with which orbax opens no directory, and what is wrong.

    Raises as `restore` where that can't be read.
    """
    with self._reading('the scores of checkpoints'):
      found = sorted(self._workdir.glob('checkpoints/*/metrics/metrics'))
    for file in found:
      name = file.parents[1].name
      if not name.isdecimal():  # of a save that was killed, or no step's at all
        continue
      if name != str(step := int(name)):  # orbax would take 07 for 7
        raise UserError(f'{file.parents[1]} is none that a run makes: move it')
      try:
        with self._reading(f'the score of checkpoint {step}'):
          seal.check_score(file, step)
      except seal.Damage as e:
        if file.exists():  # or the run beside this one has just deleted it
          yield step, e

  def _refuse_broken_scores(self, mended: bool) -> None:
    for step, _ in self._broken_scores():
      folder = self._workdir / 'checkpoints' / str(step)
      if mended:
        raise TransientError(
            f'process {processes.index()} sees {folder}, which process 0 has '
            'set aside: see that both see the same files, and start again')
      raise DamagedError(f'checkpoint {step} has a damaged score: delete '
                         f'{folder}, or train again, which sets it aside')

  def _set_broken_scores_aside(self) -> None:
    """Makes way for orbax, unless no other checkpoint is left."""
    broken = dict(self._broken_scores())
    others = {path.name for path in self._workdir.glob('checkpoints/*')
              if path.name.isdecimal()} - {str(step) for step in broken}
    if broken and not others:
      self._stop_without_a_whole_one(max(broken), 'its score is damaged')
    for step in broken:
      self._set_aside.append(
          f'checkpoint {step} cannot be restored (its score is damaged); it is '
          f'set aside as {self._aside(step)}')

  def _stop_without_a_whole_one(self, newest: int, why: str) -> NoReturn:
    raise UserError(
        f'no checkpoint of {self._workdir} is whole (of the newest, {newest}: '
        f'{why}): copy the run directory again, or move '
        f'{self._workdir}/checkpoints away to begin anew')

  def _aside(self, step: int) -> pathlib.Path:
    """Moves a step out of the way; it is soon saved again."""
    path = self._workdir / 'damaged' / f'{step}-{time.time_ns()}'
    files.move(self._workdir / 'checkpoints' / str(step), path)
    return path

  def restore_newest(self, shapes: Items, announce: Callable[[str], None]
                     ) -> tuple[Items, Progress] | None:
    """Reads the newest step that is whole; moves others to workdir/damaged.

    The first process chooses, and the others follow. `announce` is told which
    are set aside, and why. None if there is no step at all. Raises UserError if
    there are some and none is whole, with all in its place, else as `_follow`.
    """
    found, chosen = None, None
    if processes.index() == 0:
      for message in self._set_aside:
        announce(message)
      damaged: dict[int, seal.Damage] = {}
      for step in reversed(self.steps()):
        try:
          with self._reading(f'checkpoint {step}'):
            found, chosen = self._restore(step, shapes), step
          break
        except seal.Damage as e:
          damaged[step] = e
      if damaged and found is None:
        self._stop_without_a_whole_one(
            max(damaged), str(damaged[max(damaged)]))
      for step, why in damaged.items():
        announce(f'checkpoint {step} cannot be restored ({why}); it is set '
                 f'aside as {self._aside(step)}')
      if damaged:
        self._reload()
    return self._follow(chosen, found, shapes)[1]

  def restore_chosen(
      self, choose: Callable[[], int], shapes: Items) -> tuple[int, Items]:
    """The step that the first process chooses, and its items; all call this.

    Raises as `choose` and `restore` there, and as `_follow` in the others.
    """
    found, chosen = None, None
    if processes.index() == 0:
      chosen = choose()
      found = self.restore(chosen, shapes)
    chosen, found = self._follow(chosen, found, shapes)
    assert chosen is not None and found is not None
    return chosen, found[0]

  def _follow(
      self, chosen: int | None, found: tuple[Items, Progress] | None,
      shapes: Items) -> tuple[int | None, tuple[Items, Progress] | None]:
    """Hands on what the first process chose and has read; others read it now.

    Raises TransientError in one that can't read what the first one could, for
    that is not the checkpoint's fault.
    """
    told = processes.gather('' if chosen is None else str(chosen))[0]
    if processes.index() == 0 or not told:
      return chosen, found
    self._reload()
    try:
      return int(told), self.restore(int(told), shapes)
    except DamagedError as e:
      raise TransientError(
          f'process {processes.index()} cannot read checkpoint {told}, which '
          f'process 0 can ({e.__cause__}): see that both see the same files, '
          'and started again it goes on') from e


def _alone() -> ocp.options.MultiprocessingOptions:
  """Tells orbax that there is no other process."""
  this = jax.process_index()
  return ocp.options.MultiprocessingOptions(
      primary_host=this, active_processes={this},
      barrier_sync_key_prefix=f'process{this}')
