"""Which processes take part: told by flags, found on SLURM and Cloud TPUs."""

import glob
import os
import urllib.request

from flax_imdb import environment
from flax_imdb.errors import TransientError, UserError


def check_flags(coordinator_address: str | None, num_processes: int | None,
                process_id: int | None) -> None:
  """Raises UserError if some of the flags are missing or out of range."""
  flags = {'coordinator_address': coordinator_address,
           'num_processes': num_processes, 'process_id': process_id}
  missing = [f'--{name}' for name, value in flags.items() if value is None]
  if len(missing) == 3:
    return
  if missing:
    raise UserError(f'several processes also need {" and ".join(missing)}')
  assert coordinator_address is not None
  assert num_processes is not None and process_id is not None
  if not 1 <= num_processes < 1 << 16:
    raise UserError(f'--num_processes={num_processes}: must be at least 1, and '
                    f'under {1 << 16}')
  if not 0 <= process_id < num_processes:
    raise UserError(f'--process_id={process_id}: must be 0 to '
                    f'{num_processes - 1}, one less than --num_processes')
  host, _, port = coordinator_address.rpartition(':')
  try:
    host.encode('idna')
  except UnicodeError:  # an empty part, or one of more than 63 characters
    host = ''
  if not host or not (port.isascii() and port.isdigit()
                      and 0 < int(port) < 65536):
    raise UserError(f'--coordinator_address={coordinator_address}: write it as '
                    'HOST:PORT, such as 10.0.0.1:8476, the same everywhere')


def ask_cluster(seconds: int) -> tuple | None:
  """Asks SLURM or the Cloud TPU; None if this is the only process.

  Within `seconds`: address of process 0, count, index, local devices or None.
  Raises TransientError if it does not answer, or does not know process 0 yet.
  """
  if not (method := _cluster()):
    return None
  from jax._src import clusters  # jax has no public name for it
  try:
    return clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, method, seconds)
  except (OSError, RuntimeError) as e:  # the former also of requests
    raise TransientError(
        f'the cluster does not say how to meet the other processes ({e}): '
        'start all again') from e


def _cluster() -> str | None:
  """The cluster, as jax names it; None if this is the only process."""
  env = os.environ
  if (tasks := environment.slurm_tasks()) is not None:
    return 'slurm' if tasks > 1 else None
  if ((env.get('JAX_PLATFORMS') or 'tpu').split(',')[0] != 'tpu'
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
