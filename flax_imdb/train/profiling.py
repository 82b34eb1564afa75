"""A trace of some steps, as XProf and TensorBoard's Profile tab read it."""

from collections.abc import Callable
import pathlib
import tempfile
from typing import Any

import jax
from ml_collections import ConfigDict

from flax_imdb.cluster import processes
from flax_imdb.fields import profiled_steps
from flax_imdb.storage import files

_FOLDER = 'plugins/profile'  # of a run directory, where both look


class Profile:
  """Traces the steps of config.profile, of several processes in the first.

  The trace becomes a directory of plugins/profile/, named by its time. What is
  traced is what is computed else: the steps before it are waited for, and so
  are its own, so it holds whole steps. Use it as a context: a trace that is
  under way when it ends is written.
  """

  def __init__(self, config: ConfigDict, workdir: str,
               announce: Callable[[str], None]):
    self._steps = range(0) if processes.index() else profiled_steps(config)
    self._workdir, self._announce = workdir, announce
    self._folder: tempfile.TemporaryDirectory | None = None
    self._traced: list[int] = []
    self._metrics: Any = None  # of the newest step of the trace

  def __enter__(self) -> 'Profile':
    return self

  def __exit__(self, *_: Any) -> None:
    self.stop()

  def traced(self, train_step: Callable, done: int) -> Callable:
    """The step, after so many were done, which traces itself in its turn."""
    if not self._steps:  # none, or of another process
      return train_step
    step = done

    def traced(state, batch):
      nonlocal step
      step += 1
      if step not in self._steps:
        return train_step(state, batch)
      if self._folder is None:
        jax.block_until_ready(state)
        self._folder = tempfile.TemporaryDirectory()
        jax.profiler.start_trace(self._folder.name)
      self._traced.append(step)
      with jax.profiler.StepTraceAnnotation('train', step_num=step):
        state, self._metrics = train_step(state, batch)
      if step == self._steps[-1]:
        self.stop()
      return state, self._metrics

    return traced

  def stop(self) -> None:
    """Writes the trace that is under way; raises as `files.write`.

    Says so where one was asked for in vain. There is no second one.
    """
    asked, self._steps = self._steps, range(0)
    if asked and not self._traced:
      self._announce(f'config.profile={asked[0]},{len(asked)}: no such step '
                     'was trained')
    if self._folder is None:
      return
    jax.block_until_ready(self._metrics)
    jax.profiler.stop_trace()
    with self._folder as folder:  # a bucket is not written to by XLA
      for path in sorted(pathlib.Path(folder, _FOLDER).rglob('*')):
        if path.is_file():
          files.write(
              files.as_path(self._workdir) / path.relative_to(folder),
              path.read_bytes())
    self._folder = None
    self._announce(
        f'traced steps {self._traced[0]} to {self._traced[-1]} into '
        f'{self._workdir}/{_FOLDER}: pip install xprof && xprof '
        f'--logdir={self._workdir}')
