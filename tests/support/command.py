"""Runs the real command line, as a user would."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]

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
