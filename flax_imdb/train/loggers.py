"""Services that are told of a run as well: each may fail, and the run goes on.

What they are told waits in a queue for a thread: training waits for none of
them, for theirs is the time of a network. What is kept of a run is
metrics.jsonl and TensorBoard's events, which `writers` has on disk first.
"""

from collections.abc import Callable, Iterator
import contextlib
import importlib.util
import json
import queue
import re
import threading
from typing import Any

from ml_collections import ConfigDict

from flax_imdb.cluster import processes
from flax_imdb.errors import UserError
from flax_imdb.storage import files
from flax_imdb.train import mlflow_runs, weights_and_biases

_FILE = 'loggers.json'  # the id of the run at each service
_MOST_BYTES = 1 << 10
_ID = re.compile(r'[\w-]{1,64}', re.ASCII)
# That the end waits for what is under way at each: a pod is killed 30 s after
# it was asked to stop.
_SECONDS = 20.0


def check(config: ConfigDict) -> None:
  """Raises UserError if a package is not there that this process needs."""
  for name in _names(config):
    if not importlib.util.find_spec(name):
      raise UserError(f'config.loggers={config.loggers} needs {name}: pip '
                      f'install {name}, or leave it out')


def _names(config: ConfigDict) -> list[str]:
  """The services that this process tells: those of others tell none."""
  if processes.index() > 0 or not config.loggers:
    return []
  return config.loggers.split(',')


@contextlib.contextmanager
def told(config: ConfigDict, workdir: str,
         announce: Callable[[str], None]) -> Iterator['Loggers']:
  """`Loggers` that are closed when the context ends; see there."""
  loggers, done = Loggers(config, workdir, announce), False
  try:
    yield loggers
    done = True
  finally:
    loggers.close(done)


class Loggers:
  """The services of config.loggers, of several processes told by the first.

  A run that is started again goes on as the same one there: its ids are kept in
  the run directory. Raises UserError if a service can't be reached at first,
  and announces later, also of a run that goes on, in one line that one has
  failed and is told no more.
  """

  def __init__(self, config: ConfigDict, workdir: str,
               announce: Callable[[str], None]):
    self._announce = announce
    self._services: list[_Queue] = []
    if not (names := _names(config)):
      return
    known = _read_ids(workdir)
    for name in names:
      module: Any = {'wandb': weights_and_biases, 'mlflow': mlflow_runs}[name]
      try:
        opened = module.Service(config, workdir, known.get(name))
      except Exception as e:  # whatever a library or its server can raise
        if name in known:  # it was reached once: there is nothing to mend
          self._tell_of_failure(name, _reason(e))
          continue
        raise UserError(f'config.loggers={name} cannot start ({_reason(e)}): '
                        f'{module.FIX}, or leave it out') from e
      known[name] = opened.id
      self._services.append(_Queue(name, opened))
    files.write(f'{workdir}/{_FILE}', json.dumps(known, indent=2) + '\n')

  def log(self, step: int, scalars: dict[str, float]) -> None:
    """Tells of numbers by their tags, such as train/loss, after a step."""
    for service in self._services:
      service.put(lambda x: x.log(step, scalars))
    self._tell_of_failures()

  def log_results(self, step: int, scalars: dict[str, float]) -> None:
    """Tells of those that a run has once, of the weights of this step.

    Told again, they take the place of what was there.
    """
    for service in self._services:
      service.put(lambda x: x.log_results(step, scalars))
    self._tell_of_failures()

  def close(self, done: bool) -> None:
    """Says that the run is `done`, or stopped, and waits for a while."""
    for service in self._services:
      service.put(lambda x: x.close(done))
    for service in self._services:
      service.wait()
    self._tell_of_failures()
    self._services = []

  def _tell_of_failures(self) -> None:
    for service in [x for x in self._services if x.failure]:
      self._tell_of_failure(service.name, service.failure)
      self._services.remove(service)

  def _tell_of_failure(self, name: str, reason: str) -> None:
    self._announce(f'warning: {name} is told no more of this run ({reason}), '
                   'which goes on')


class _Queue:
  """Calls to a service, done one after another by a thread of its own."""

  def __init__(self, name: str, service: Any):
    self.name, self.failure = name, ''
    self._service = service
    self._calls: queue.SimpleQueue = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._work, daemon=True)
    self._thread.start()

  def put(self, call: Callable[[Any], None]) -> None:
    self._calls.put(call)

  def wait(self) -> None:
    """Waits until all is done, or for too long."""
    self._calls.put(None)
    self._thread.join(_SECONDS)
    if self._thread.is_alive():
      self.failure = f'it took more than {_SECONDS:.0f} s to answer'

  def _work(self) -> None:
    while (call := self._calls.get()) is not None:
      try:
        call(self._service)
      except Exception as e:  # whatever a library or its server can raise
        self.failure = _reason(e)
        return


def _reason(error: Exception) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split()):.200}'


def _read_ids(workdir: str) -> dict[str, str]:
  """What was kept; UserError if the file, maybe a stranger's, is damaged."""
  path = files.as_path(workdir) / _FILE
  if not path.exists():
    return {}
  content = files.read_bytes(path, _MOST_BYTES)
  try:
    ids = json.loads(content)
    for name, own in ids.items():
      if not (isinstance(own, str) and _ID.fullmatch(own)):
        raise ValueError(f'the id of {name:.20} is none')
  except (ValueError, AttributeError, RecursionError) as e:
    raise UserError(f'{path} holds no ids of runs ({e}): delete it, and the '
                    'services begin another run') from e
  return ids
