"""orbax: save, restore, latest and best.

A checkpoint holds NumPy trees. The same code so serves one host or many, and
what two devices saved restores on any number of them.
"""

import sys
from typing import Any
from typing import Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy
from orbax.checkpoint.checkpoint_managers import BestN
from orbax.checkpoint.checkpoint_managers import LatestN

from flax_imdb import parallel
from flax_imdb.errors import UserError
from flax_imdb.step import TrainState

# What orbax raises for a step that is missing, damaged or of another shape.
_DAMAGE = (OSError, ValueError, KeyError, TypeError)


def _rank(metrics: dict[str, float]) -> tuple[float, float]:
  """Sorts the best checkpoint last; of equal ones the earliest."""
  return metrics['score'], -metrics['step']


class Checkpoints:
  """The checkpoints of a run directory: the latest two and the best one.

  A context manager: leaving it waits for the save in flight.
  """

  def __init__(self, workdir: str, read_only: bool = False):
    """Opens `workdir`/checkpoints, which need not exist yet."""
    # Without `best_fn` best_step() would silently be the latest step; without
    # the policies a worsening score would evict the latest step.
    self._manager = ocp.CheckpointManager(
        f'{workdir}/checkpoints',
        options=ocp.CheckpointManagerOptions(
            best_fn=_rank, read_only=read_only, create=not read_only,
            preservation_policy=AnyPreservationPolicy([
                LatestN(2),
                BestN(get_metric_fn=_rank, n=1,
                      keep_checkpoints_without_metrics=False)])))

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error) -> None:
    self._manager.close()

  def steps(self) -> list[int]:
    """The steps there are, ascending."""
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    """The last step saved, None if there is none."""
    return self._manager.latest_step()

  def wait(self) -> None:
    """Waits until what `save` began is on disk.

    Raises whatever made a save fail.
    """
    self._manager.wait_until_finished()

  def best(self) -> int | None:
    """The step with the best score, None if there is none."""
    return self._manager.best_step()

  def save(self, state: TrainState, progress: dict[str, Any],
           score: float) -> None:
    """Starts to save; returns once `state` may be changed again.

    Args:
      state: replicated on the devices.
      progress: what else a run remembers, as JSON can hold it.
      score: the larger, the better.
    """
    model, training = _items(parallel.to_host(state))
    step = int(training['step'])
    self._manager.save(
        step, metrics={'score': score, 'step': step},
        args=ocp.args.Composite(
            model=ocp.args.StandardSave(model),
            training=ocp.args.StandardSave(training),
            progress=ocp.args.JsonSave(progress)))

  def restore(
      self, step: int, template: TrainState) -> tuple[TrainState, dict]:
    """Reads a whole state.

    Args:
      step: one of `steps()`.
      template: a state, or its shapes as of `jax.eval_shape`.

    Returns:
      The state, replicated on today's devices, and the progress.

    Raises:
      UserError: the step is missing, damaged, or of another shape.
    """
    model, training = _items(template)
    items = self._read(
        step, model=ocp.args.StandardRestore(_numpy(model)),
        training=ocp.args.StandardRestore(_numpy(training)),
        progress=ocp.args.JsonRestore())
    check_shapes(f'checkpoint {step}', model | training,
                 items.model | items.training)
    return (parallel.replicate(TrainState(**items.model, **items.training)),
            items.progress)

  def restore_eval_params(self, step: int, template: TrainState) -> Any:
    """Reads only the parameters to evaluate with; otherwise as `restore`."""
    model, _ = _items(template)
    items = self._read(
        step, model=ocp.args.StandardRestore(_numpy(model)))
    check_shapes(f'checkpoint {step}', model, items.model)
    return parallel.replicate(items.model['ema'] or items.model['params'])

  def _read(self, step: int, **items: Any) -> Any:
    _drop_late_reads()
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except _DAMAGE as e:
      reason = str(e).strip().split('\n')[0][:200]
      raise UserError(
          f'checkpoint {step} cannot be restored ({reason}); the steps found '
          f'are {self.steps()}: choose another with --step, or delete it'
      ) from e


def _drop_late_reads() -> None:
  """Keeps a failed restore from printing dozens of tracebacks.

  When one array cannot be read orbax raises and closes its event loop; the
  reads of the other arrays still end, and each complains that it is closed.
  """
  if getattr(sys.unraisablehook, '__name__', '') == 'drop':
    return
  hook = sys.unraisablehook
  def drop(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      hook(unraisable)
  sys.unraisablehook = drop


def _items(state: TrainState) -> tuple[dict, dict]:
  """Splits a state into what evaluation needs and what only training does."""
  return ({'params': state.params, 'ema': state.ema},
          {'step': state.step, 'opt_state': state.opt_state,
           'sums': state.sums})


def _numpy(tree: Any) -> Any:
  """A template for orbax that leaves the placement to `replicate`."""
  return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), tree)


def check_shapes(source: str, expected: Any, found: Any) -> None:
  """Compares two trees of arrays by name; with a template orbax does not.

  Raises:
    UserError: they differ; says where `source` does.
  """
  a, b = (
      {jax.tree_util.keystr(path, simple=True, separator='/'): list(x.shape)
       for path, x in jax.tree_util.tree_leaves_with_path(tree)}
      for tree in (expected, found))
  for name in sorted(a | b):
    if a.get(name) != b.get(name):
      raise UserError(
          f'{source} has {name} of shape {b.get(name)}, the config asks for '
          f'{a.get(name)}: use the config it was made with')
