"""Runs the real command line, as a user would or in this process."""

import contextlib
import io
import os
import pathlib
import subprocess
import sys
import tempfile
import types
from unittest import mock

import pytest

from flax_imdb import main

ROOT = pathlib.Path(__file__).parents[2]

needs_proc = pytest.mark.skipif(
    not os.path.exists('/proc/self/stat'), reason='needs /proc, as on Linux')

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
    '--config.eval_batch_size=12',
)

# The same with all that can be read: segments, pairs, log-odds, a linear model,
# marks; with validation by groups, epochs of two passes, and what is added to
# the input.
EVERY_INPUT = (
    '--config=configs/default.py',
    '--config.data.name=grammar_reviews',
    *TINY[1:5],
    '--config.min_steps_per_epoch=10',
    '--config.data.vocab_size=300',
    '--config.data.max_length=60',
    '--config.data.segment_length=20',
    '--config.data.bigrams=400',
    '--config.data.log_odds_ngrams=1000',
    *TINY[7:],
)


# Python's flags with which no warning passes unseen, but for the one that
# pyproject.toml names, too.
STRICT = ('-W', 'error', '-W',
          'ignore:Error reading persistent compilation cache entry')


def environ(**env):
  """The environment of another process; None takes a variable out of it."""
  env = {'NPROC': None} | env  # that of this process' two devices
  return {k: v for k, v in {**os.environ, **env}.items() if v is not None}


def run_main(*argv, stdin=b'', **env):
  """Runs python -m flax_imdb.main as a user would; returns the process.

  stdout and stderr are str; `env` as for `environ`.
  """
  process = subprocess.run(
      [sys.executable, *STRICT, '-m', 'flax_imdb.main', *argv],
      cwd=ROOT, env=environ(**env), input=stdin, capture_output=True,
      timeout=300, check=False)
  process.stdout = process.stdout.decode()
  process.stderr = process.stderr.decode()
  return process


@contextlib.contextmanager
def standard_input(content):
  """Makes standard input a file of these bytes, as a shell does with <.

  With None it is closed.
  """
  if content is None:
    with mock.patch('sys.stdin', None):
      yield
    return
  with tempfile.TemporaryFile() as file, io.TextIOWrapper(file) as text:
    file.write(content)
    file.seek(0)
    with mock.patch('sys.stdin', text):
      yield


def run_here(*argv, stdin=b''):
  """Does in this process what `run_main` does in another, and returns as much.

  A process takes two seconds to start: for all that is not about processes.
  """
  output, error = io.StringIO(), io.StringIO()
  with (contextlib.redirect_stdout(output), contextlib.redirect_stderr(error),
        standard_input(stdin)):
    status = main.main(list(argv))
  return types.SimpleNamespace(
      returncode=status, stdout=output.getvalue(), stderr=error.getvalue())


def finished(process):
  """Asserts that a run went well and returns its standard output."""
  assert process.returncode == 0, process.stderr
  return process.stdout
