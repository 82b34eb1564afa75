"""Several processes: how they meet, what they agree on and how they part.

jax is imported only where it is needed: it must come after
`environment.configure`. With one process nothing here costs anything but a look
at it each second.
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import hashlib
import itertools
import secrets
import socket
import sys
import time

from flax_imdb.cluster import discovery
from flax_imdb.cluster.watchdog import Watchdog
from flax_imdb.errors import TransientError, UserError
from flax_imdb.storage import cache, files

MEET_SECONDS = 120  # that the processes wait for one another at the start
_DAY_MS = 24 * 3600 * 1000  # the watchdog ends what would wait for ever
_SEE_SECONDS = 3  # that a file of another host may take to be seen

_watchdog: Watchdog | None = None
_rounds = itertools.count()


def index() -> int:
  """Which process this is; process 0 writes the files."""
  return _watchdog.index if _watchdog else 0


def count() -> int:
  """How many processes take part in this run."""
  return _watchdog.count if _watchdog else 1


def initialize(coordinator_address: str | None, num_processes: int | None,
               process_id: int | None) -> None:
  """Meets the other processes, before anything touches a device.

  The arguments are the flags, which `discovery.check_flags` has seen; without
  them SLURM or the Cloud TPU is asked, and elsewhere there is one process.
  Raises TransientError if the others, or the cluster, can't be reached in time
  or the port is held, UserError if process 0 may not listen there.
  """
  global _watchdog
  devices = None
  if num_processes is None:
    if not (found := discovery.ask_cluster(MEET_SECONDS)):
      return
    coordinator_address, num_processes, process_id, devices = found
  if num_processes == 1:
    return
  import jax
  from jax._src import distributed

  assert coordinator_address and num_processes and process_id is not None
  if process_id == 0:
    _check_free(coordinator_address)
  else:
    _reach(coordinator_address)
  watchdog = Watchdog(process_id, num_processes)
  watchdog.catch_abort(
      f'the {num_processes} processes did not all meet at '
      f'{coordinator_address} within {MEET_SECONDS} s: start each of them '
      'once, with its own --process_id')
  # jax would take SIGTERM for itself; `preemption` handles it.
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(
      coordinator_address, num_processes, process_id, local_device_ids=devices,
      initialization_timeout=MEET_SECONDS)
  watchdog.start(distributed.global_state.client)
  _watchdog = watchdog


def _check_free(address: str) -> None:
  """Raises as `initialize` if this process can't listen there; jax crashes."""
  port, both = int(address.rpartition(':')[2]), socket.has_dualstack_ipv6()
  try:
    socket.create_server(
        ('', port), family=socket.AF_INET6 if both else socket.AF_INET,
        dualstack_ipv6=both).close()
  except OSError as e:
    # An old process may hold it; a port that is not allowed stays so.
    held = e.errno == errno.EADDRINUSE
    raise (TransientError if held else UserError)(
        f'process 0 cannot listen on port {port} ({e.strerror}): '
        + ('end what holds it and start again, or ' if held else '')
        + 'give another --coordinator_address to all') from e


def _reach(address: str) -> None:
  """Raises TransientError if process 0 does not listen in time; jax aborts."""
  host, _, port = address.rpartition(':')
  end = time.monotonic() + MEET_SECONDS
  while True:
    try:
      return socket.create_connection((host.strip('[]'), int(port)), 2).close()
    except OSError as e:
      if time.monotonic() > end:
        raise TransientError(
            f'cannot reach process 0 at {address} within {MEET_SECONDS} s '
            f'({e}): start all again, with its address') from e
    time.sleep(0.1)


def gather(value: str) -> list[str]:
  """The values of all processes, by their index; all must call this."""
  if _watchdog is None or _watchdog.count == 1:
    return [value]
  report_alive()  # who is not here yet is the one that is waited for
  client, place = _watchdog.client, f'gather/{next(_rounds)}'
  client.key_value_set(f'{place}/{index()}', value)
  return [client.blocking_key_value_get(f'{place}/{i}', _DAY_MS)
          for i in range(count())]


def check_shared(directory: str) -> None:
  """Raises UserError in all if some don't see the directory of process 0."""
  if count() == 1:
    return
  token = files.as_path(directory) / f'.{gather(secrets.token_hex(16))[0]}'
  if index() == 0:
    token.touch()
  gather('')  # it is there
  end = time.monotonic() + _SEE_SECONDS
  while not token.exists() and time.monotonic() < end:
    time.sleep(0.1)
  seen = gather('yes' if token.exists() else '')
  if index() == 0:
    token.unlink()
  if not all(seen):
    blind = ', '.join(str(i) for i, yes in enumerate(seen) if not yes)
    raise UserError(f'the workdir is not shared: process {blind} does not see '
                    'what process 0 writes: give all the same --workdir, on a '
                    'file system that all hosts mount')


def check_same(what: str, text: Callable[[], str]) -> None:
  """Raises UserError in all if `what`, which this tells in any length, differs.

  `text` is asked where there are several processes alone.
  """
  if count() == 1:
    return
  digests = gather(hashlib.sha256(text().encode()).hexdigest())
  if others := [str(i) for i, d in enumerate(digests) if d != digests[0]]:
    raise UserError(f'process {", ".join(others)} has another {what} than '
                    'process 0: start all with the same flags and data')


def one_at_a_time() -> contextlib.AbstractContextManager[None]:
  """Lets processes that share a cache through one after another."""
  return cache.lock() if count() > 1 else contextlib.nullcontext()


@contextlib.contextmanager
def watched() -> Iterator[None]:
  """Watches over the main thread of a lone process, while the context lasts.

  If it stands still, the process ends as one of several would. Those are
  watched from `initialize` on.
  """
  global _watchdog
  if _watchdog:
    yield
    return
  _watchdog = Watchdog(0, 1)
  _watchdog.start(None)
  try:
    yield
  finally:
    _watchdog.stop()
    _watchdog = None


def report_alive(phase: str | None = None, step: int | None = None) -> None:
  """Tells the watchdog which phase begins: load, restore, compile, step, ...

  Without one, that the same goes on; `step` is the number of a step that
  begins. All processes must call this at the same places, and before what they
  do together: the one that has done so least often is waited for.
  """
  if _watchdog:
    _watchdog.report_alive(phase, step, time.monotonic())


def shut_down() -> None:
  """Waits until all processes are done, and parts from them."""
  global _watchdog
  if _watchdog is None or _watchdog.count == 1:
    return
  import jax
  gather('done')
  _watchdog.stop()
  jax.distributed.shutdown()
  _watchdog = None


def end_all(message: str, status: int) -> None:
  """Ends all processes, each with one line; returns if there is but one."""
  if _watchdog and _watchdog.count > 1:
    _watchdog.end(message, status, f'process {index()}: {message}')


def end_all_after(error: Exception) -> None:
  """`end_all`, after an error that a lost process may have caused."""
  if _watchdog is None or _watchdog.count == 1:
    return
  _watchdog.wait_for_the_lost()
  sys.excepthook(type(error), error, error.__traceback__)
  end_all(f'{type(error).__name__}: {error}', 1)
