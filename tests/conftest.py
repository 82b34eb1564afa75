"""Sets up jax before anything imports it, and runs the real command line."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest

from flax_imdb import environment

ROOT = pathlib.Path(__file__).parent.parent

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

# The smallest run that still has buckets, a short last batch and two epochs.
TINY = (
    '--config=configs/quickstart.py',
    '--config.num_epochs=2',
    '--config.global_batch_size=16',
    '--config.data.train_split=train[:110]',
    '--config.data.test_split=test[:45]',
    '--config.data.max_length=40',
    '--config.data.bucket_width=20',
    '--config.model.embedding_dim=8',
    '--config.model.width=8',
)


def pytest_sessionfinish():
  shutil.rmtree(_CACHE, ignore_errors=True)


def environ(**env):
  """The environment of another process; None takes a variable out of it."""
  env = {'NPROC': None} | env  # that of this process' two devices
  return {k: v for k, v in {**os.environ, **env}.items() if v is not None}


def run_main(*argv, stdin=b'', **env):
  """Runs python -m flax_imdb.main as a user would; returns the process.

  stdout and stderr are str; `env` as for `environ`.
  """
  process = subprocess.run(
      [sys.executable, '-W', 'error', '-m', 'flax_imdb.main', *argv],
      cwd=ROOT, env=environ(**env), input=stdin, capture_output=True,
      timeout=300, check=False)
  process.stdout = process.stdout.decode()
  process.stderr = process.stderr.decode()
  return process


def finished(process):
  """Asserts that a run went well and returns its standard output."""
  assert process.returncode == 0, process.stderr
  return process.stdout


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
  """A finished tiny run: (run directory, what it printed). Don't change it."""
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  return workdir, finished(run_main(*TINY, f'--workdir={workdir}'))
