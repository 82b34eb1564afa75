"""Sets up jax before anything imports it; fixtures that many tests share."""

import os
import shutil
import tempfile

import pytest

from flax_imdb import environment, terminal

# One cache for the session, none of the user's: programs compiled by one test
# serve the next, data generated once is read often.
_CACHE = tempfile.mkdtemp(prefix='flax_imdb_tests_')
os.environ['XDG_CACHE_HOME'] = _CACHE
os.environ['JAX_COMPILATION_CACHE_DIR'] = f'{_CACHE}/xla'
os.environ['JAX_NUM_CPU_DEVICES'] = '2'
os.environ['JAX_PLATFORMS'] = 'cpu'
# The rest as the command line sets it: with other flags for XLA, a run in this
# process would differ from one in a subprocess in its last bits.
environment.configure(global_batch_size=32)


def pytest_sessionstart():
  terminal.quiet_libraries()  # as the command line does, and after pytest's own


def pytest_sessionfinish():
  shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
  """A finished tiny run: (run directory, what it printed). Don't change it."""
  from support.command import TINY, finished, run_main
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  return workdir, finished(run_main(*TINY, f'--workdir={workdir}'))
