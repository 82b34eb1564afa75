"""Which processes there are: the flags, and the clusters that are asked."""

import os
import re

import pytest

from flax_imdb.cluster import discovery
from flax_imdb.errors import TransientError, UserError


@pytest.mark.parametrize(('flags', 'message'), [
    ((None, 2, 0), 'also need --coordinator_address'),
    (('a:1', None, None), 'also need --num_processes and --process_id'),
    (('a:1', 0, 0), '--num_processes=0: must be at least 1'),
    (('a:1', 2, 2), '--process_id=2: must be 0 to 1'),
    (('a:1', 2, -1), '--process_id=-1: must be 0 to 1'),
    (('a', 2, 0), 'write it as HOST:PORT'),
    (('a:99999', 2, 0), 'write it as HOST:PORT')])
def test_flags(flags, message):
  with pytest.raises(UserError, match=re.escape(message)):
    discovery.check_flags(*flags)
  discovery.check_flags(None, None, None)
  discovery.check_flags('a:1', 2, 1)


def test_where_there_is_a_cluster(monkeypatch):
  for name in list(os.environ):
    if name.startswith(('SLURM_', 'TPU_', 'MEGASCALE_', 'JAX_PLATFORMS')):
      monkeypatch.delenv(name)
  assert discovery._cluster() is None  # a laptop
  monkeypatch.setenv('SLURM_STEP_NODELIST', 'a,b')
  monkeypatch.setenv('SLURM_PROCID', '0')
  monkeypatch.setenv('SLURM_NTASKS', '1')
  assert discovery._cluster() is None
  monkeypatch.setenv('SLURM_NTASKS', '2')
  assert discovery._cluster() == 'slurm'
  monkeypatch.delenv('SLURM_PROCID')
  monkeypatch.setattr(discovery.glob, 'glob', lambda pattern: ['/dev/accel0'])
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'a')
  assert discovery._cluster() is None  # one host of a Cloud TPU
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'a,b')
  assert discovery._cluster() == 'gketpu'
  monkeypatch.setenv('JAX_PLATFORMS', '')  # as if it were unset
  assert discovery._cluster() == 'gketpu'
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert discovery._cluster() is None


def test_a_cluster_that_does_not_know_process_0_yet_may_later(monkeypatch):
  monkeypatch.setattr(discovery, '_cluster', lambda: 'gketpu')
  monkeypatch.setenv('MEGASCALE_COORDINATOR_ADDRESS', 'not-yet.invalid')
  with pytest.raises(TransientError, match='not-yet.invalid.*start all again'):
    discovery.ask_cluster(0)
