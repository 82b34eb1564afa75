"""Runs in processes of their own, each by the program's own command line.

They need the devices, which the process that starts them must not look for:
to import jax does not, to ask it for anything would.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

from ml_collections import ConfigDict

from flax_imdb.checkpoint import run
from flax_imdb.cluster import preemption
from flax_imdb.config import differences, load_config
from flax_imdb.errors import ChildError, Preempted, UserError
from flax_imdb.fields import validates
from flax_imdb.storage import files

_LOOK_SECONDS = 0.1
_MOST_BYTES = 1 << 24  # of summary.json


@dataclasses.dataclass(frozen=True, eq=False)
class Child:
  """A process that trains in a run directory; what it prints is in log.txt."""
  workdir: pathlib.Path
  process: subprocess.Popen

  def end(self) -> None:
    """Asks it to save and to end, which `Children.ended` will tell."""
    self.process.send_signal(signal.SIGTERM)

  def said(self) -> str:
    """The last line that it printed: where it failed, what failed."""
    lines = (self.workdir / 'log.txt').read_bytes()[-4096:].decode(
        errors='replace').splitlines()
    return (lines or ['it printed nothing'])[-1].removeprefix('error: ')

  def check(self) -> None:
    """Raises ChildError, or Preempted, if it did not end well."""
    status, where = self.process.returncode, f'{self.workdir}'
    if status < 0:
      raise ChildError(f'{where}: its process was ended by '
                       f'{signal.Signals(-status).name}', 128 - status)
    if status == Preempted.status:
      raise Preempted(f'{where}: {self.said()}')
    if status:
      raise ChildError(f'{where}: {self.said()}', status)


class Children:
  """The runs that this process has started; `tended` makes them."""

  def __init__(self, stop: preemption.Stop):
    self._stop = stop
    self._running: list[Child] = []

  def start(self, config: ConfigDict, config_file: str, workdir: pathlib.Path,
            variables: dict[str, str]) -> Child:
    """Trains, or goes on, with this config, which is near that of the file.

    `variables` are added to the environment. Raises as `files.raise_failure`.
    """
    fields = differences(load_config(config_file), config)
    argv = [sys.executable, '-m', 'flax_imdb.main', f'--config={config_file}',
            f'--workdir={workdir}', *(f'--config.{field}={value}' for
                                      field, (_, value) in fields.items())]
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      with open(workdir / 'log.txt', 'ab') as log:
        # A group of its own: else Ctrl-C would reach it beside the SIGTERM from
        # here, and the second signal ends a run at once.
        process = subprocess.Popen(
            argv, env=os.environ | variables, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, process_group=0)
    except OSError as e:
      files.raise_failure(e, f'cannot start a run in {workdir}',
                          'make room, or choose another --workdir')
      raise
    child = Child(workdir, process)
    self._running.append(child)
    return child

  def ended(self) -> list[Child]:
    """Waits a moment; those that have ended since the last call.

    Raises Preempted if this process was asked to stop.
    """
    if self._stop.signal:
      raise Preempted(
          f'stopped by {self._stop.signal}; what was trained is saved: the '
          'same command goes on from there')
    time.sleep(_LOOK_SECONDS)
    ended = [child for child in self._running
             if child.process.poll() is not None]
    self._running = [child for child in self._running if child not in ended]
    return ended

  def end_all(self) -> None:
    """Ends those that still run, saved, and waits for it."""
    for child in self._running:
      child.end()
    for child in self._running:
      child.process.wait()


@contextlib.contextmanager
def tended() -> Iterator[Children]:
  """None of the children outlives the context, unless this process is killed.

  SIGTERM and SIGINT are held back as in `preemption.deferred`.
  """
  with preemption.deferred(look_every=1) as stop:
    children = Children(stop)
    try:
      yield children
    finally:
      children.end_all()


def check_parent(config: ConfigDict, workdir: str) -> None:
  """Raises UserError if no runs to compare on validation can be made here."""
  if not validates(config.data):
    raise UserError('config.data.validation_fraction=0 leaves nothing to '
                    'choose by: give it a value such as 0.1')
  if run.is_run(workdir):
    raise UserError(f'{workdir} is itself a run directory: give another '
                    '--workdir for several')


def summary(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any] | None:
  """What summary.json holds; None if a run with this config did not finish.

  Raises UserError if it is damaged.
  """
  path = workdir / 'summary.json'
  if not path.exists():
    return None
  try:
    found = json.loads(files.read_bytes(path, _MOST_BYTES))
    float(found['validation']['loss']), float(found['validation']['accuracy'])
    float(found['seconds'])
    return found if found['config'] == config.to_dict() else None
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(f'{path} is damaged ({type(e).__name__}: {e}): delete it, '
                    'and start again') from e
