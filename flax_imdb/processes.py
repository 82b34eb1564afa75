"""Several processes: how they find each other and what they agree on.

jax is imported only where it is needed: it must come after
`environment.configure`. With one process nothing here costs anything.
"""

from collections.abc import Iterator
import contextlib
import fcntl
import glob
import itertools
import os
import secrets
import socket
import sys
import time
import urllib.request

from flax_imdb import files
from flax_imdb.environment import cache_dir
from flax_imdb.errors import UserError
from flax_imdb.watchdog import Watchdog

# How long the processes wait for one another at the start, in seconds.
MEET_SECONDS = 120
_DAY_MS = 24 * 3600 * 1000  # the watchdog ends what would wait for ever
# How long a file that another host made may take to be seen.
_SEE_SECONDS = 3

_watchdog: Watchdog | None = None
_rounds = itertools.count()


def index() -> int:
  """Which process this is; process 0 writes the files."""
  return _watchdog.index if _watchdog else 0


def count() -> int:
  """How many processes take part in this run."""
  return _watchdog.count if _watchdog else 1


def check(coordinator_address: str | None, num_processes: int | None,
          process_id: int | None) -> None:
  """Checks the three flags; without any of them there is nothing to check.

  Raises:
    UserError: some are missing or out of range.
  """
  flags = {'coordinator_address': coordinator_address,
           'num_processes': num_processes, 'process_id': process_id}
  missing = [f'--{name}' for name, value in flags.items() if value is None]
  if len(missing) == 3:
    return
  if missing:
    raise UserError(f'several processes also need {" and ".join(missing)}')
  assert coordinator_address and num_processes is not None
  assert process_id is not None
  if not 1 <= num_processes < 1 << 16:
    raise UserError(f'--num_processes={num_processes}: must be at least 1, and '
                    f'under {1 << 16}')
  if not 0 <= process_id < num_processes:
    raise UserError(f'--process_id={process_id}: must be 0 to '
                    f'{num_processes - 1}, one less than --num_processes')
  host, _, port = coordinator_address.rpartition(':')
  if not host or not (port.isascii() and port.isdigit()
                      and 0 < int(port) < 65536):
    raise UserError(f'--coordinator_address={coordinator_address}: write it as '
                    'HOST:PORT, such as 10.0.0.1:8476, the same everywhere')


def initialize(coordinator_address: str | None, num_processes: int | None,
               process_id: int | None) -> None:
  """Meets the other processes, before anything touches a device.

  The arguments are the flags, which `check` has seen; without them jax asks
  SLURM or the Cloud TPU where it runs, and elsewhere there is one process.

  Raises:
    UserError: process 0 can't listen, or is not to be reached.
  """
  global _watchdog
  devices = None
  if num_processes is None:
    method = _cluster()
    if method is None:
      return
    from jax._src import clusters  # jax has no public name for it
    coordinator_address, num_processes, process_id, devices = (
        clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, method, MEET_SECONDS))
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
  # jax would take SIGTERM for itself; flax_imdb.preemption handles it.
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(
      coordinator_address, num_processes, process_id, local_device_ids=devices,
      initialization_timeout=MEET_SECONDS)
  watchdog.start(distributed.global_state.client)
  _watchdog = watchdog


def _cluster() -> str | None:
  """The cluster, as jax names it; None if this is the only process."""
  env = os.environ
  if 'SLURM_STEP_NODELIST' in env and 'SLURM_PROCID' in env:
    return 'slurm' if int(env.get('SLURM_NTASKS', '1')) > 1 else None
  if (env.get('JAX_PLATFORMS', 'tpu').split(',')[0] != 'tpu'
      or not (glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*'))):
    return None
  slices = int(env.get('MEGASCALE_NUM_SLICES') or 1)
  hosts = env.get('TPU_PROCESS_ADDRESSES') or env.get('TPU_WORKER_HOSTNAMES')
  if hosts:
    return 'gketpu' if ',' in hosts or slices > 1 else None
  request = urllib.request.Request(
      'http://metadata.google.internal/computeMetadata/v1/instance/attributes/'
      'worker-network-endpoints', headers={'Metadata-Flavor': 'Google'})
  try:
    with urllib.request.urlopen(request, timeout=2) as response:
      hosts = response.read().decode()
  except OSError:  # no Cloud TPU VM
    return None
  return 'gcetpu' if ',' in hosts or slices > 1 else None


def _check_free(address: str) -> None:
  """Raises a UserError if this process can't listen there; jax crashes."""
  port = int(address.rpartition(':')[2])
  try:
    if socket.has_dualstack_ipv6():
      socket.create_server(
          ('', port), family=socket.AF_INET6, dualstack_ipv6=True).close()
    else:
      socket.create_server(('', port)).close()
  except OSError as e:
    raise UserError(f'process 0 cannot listen on port {port} ({e.strerror}): '
                    'give another --coordinator_address to all') from e


def _reach(address: str) -> None:
  """Waits until process 0 listens; jax aborts if it never does.

  Raises:
    UserError: it does not within `MEET_SECONDS`.
  """
  host, _, port = address.rpartition(':')
  end = time.monotonic() + MEET_SECONDS
  while True:
    try:
      socket.create_connection((host.strip('[]'), int(port)), 2).close()
      return
    except OSError as e:
      if time.monotonic() > end:
        raise UserError(
            f'cannot reach process 0 at {address} within {MEET_SECONDS} s '
            f'({e}): is it started, and --coordinator_address right?') from e
    time.sleep(0.1)


def gather(value: str) -> list[str]:
  """The values of all processes, by their index; all must call this."""
  if _watchdog is None:
    return [value]
  client, place = _watchdog.client, f'gather/{next(_rounds)}'
  client.key_value_set(f'{place}/{index()}', value)
  return [client.blocking_key_value_get(f'{place}/{i}', _DAY_MS)
          for i in range(count())]


def check_shared(directory: str) -> None:
  """Checks that all processes see the directory of process 0.

  Raises:
    UserError: some do not; in all processes.
  """
  if count() == 1:
    return
  token = files.path(directory) / f'.{gather(secrets.token_hex(16))[0]}'
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


def check_same(what: str, digest: str) -> None:
  """Checks that something is the same in all processes.

  Raises:
    UserError: it is not; in all processes.
  """
  digests = gather(digest)
  others = [str(i) for i, d in enumerate(digests) if d != digests[0]]
  if others:
    raise UserError(f'process {", ".join(others)} has another {what} than '
                    'process 0: start all with the same flags and data')


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
  """Lets processes that share a cache through one after another."""
  if count() == 1:
    yield
    return
  cache_dir().mkdir(parents=True, exist_ok=True)
  with open(cache_dir() / 'lock', 'w') as f:
    fcntl.flock(f, fcntl.LOCK_EX)  # until the file is closed
    yield


def turn(step: int | None = None) -> None:
  """Tells the watchdog that this process is not stuck, and its step."""
  if _watchdog:
    _watchdog.turn(step)


def leave() -> None:
  """Waits until all processes are done, and parts from them."""
  global _watchdog
  if _watchdog is None:
    return
  import jax
  gather('done')
  _watchdog.stop()
  jax.distributed.shutdown()
  _watchdog = None


def fail(message: str, status: int) -> None:
  """Ends all processes, each with one line; returns if there is but one."""
  if _watchdog:
    _watchdog.end(message, status, f'process {index()}: {message}')


def explain(error: Exception) -> None:
  """Ends all processes after an error that a lost one may have caused.

  Returns if there is but one.
  """
  if _watchdog is None:
    return
  _watchdog.wait_for_the_lost()
  sys.excepthook(type(error), error, error.__traceback__)
  fail(f'{type(error).__name__}: {error}', 1)
