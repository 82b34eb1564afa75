"""Sets up jax before anything imports it; fixtures that many tests share."""

import fcntl
import os
import pathlib
import shutil
import signal
import tempfile

import pytest

from flax_imdb import environment, terminal

# One directory for the session and all its workers, none of the user's:
# programs compiled by one test serve the next, data generated once is read
# often. The first process makes it, the workers inherit the variable.
_SHARED = 'FLAX_IMDB_TESTS_SHARED'
_IS_FIRST = _SHARED not in os.environ
if _IS_FIRST:
  os.environ[_SHARED] = tempfile.mkdtemp(prefix='flax_imdb_tests_')
SHARED = pathlib.Path(os.environ[_SHARED])
os.environ['XDG_CACHE_HOME'] = str(SHARED / 'cache')
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(SHARED / 'cache' / 'xla')
os.environ['JAX_NUM_CPU_DEVICES'] = '2'
os.environ['JAX_PLATFORMS'] = 'cpu'
# The rest as the command line sets it: with other flags for XLA, a run in this
# process would differ from one in a subprocess in its last bits.
environment.configure(global_batch_size=32)

# What a shell starts with & has to ignore SIGINT, and passes that on: bash
# could set no trap then, and a test of Ctrl-C would wait for what can't come.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

_LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser):
  parser.addoption('--all', action='store_true',
                   help='run the tests that are marked slow, too')


def pytest_collection_modifyitems(config, items):
  """Leaves out what is slow, unless it is asked for."""
  if config.getoption('--all'):
    return
  slow = [item for item in items if item.get_closest_marker('slow')]
  items[:] = [item for item in items if item not in set(slow)]
  config.hook.pytest_deselected(items=slow)
  config.stash[_LEFT_OUT] = len(slow)


def pytest_sessionstart():
  terminal.quiet_libraries()  # as the command line does, and after pytest's own


def pytest_sessionfinish(session):
  if hasattr(session.config, 'workeroutput'):  # the first process reports
    session.config.workeroutput['left_out'] = session.config.stash.get(
        _LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
  node.config.stash[_LEFT_OUT] = getattr(node, 'workeroutput', {}).get(
      'left_out', 0)


def pytest_terminal_summary(terminalreporter, config):
  if n := config.stash.get(_LEFT_OUT, 0):
    terminalreporter.write_line(
        f'{n} slow tests were left out: pytest --all runs them, too')


def pytest_unconfigure():
  if _IS_FIRST:
    shutil.rmtree(SHARED, ignore_errors=True)


@pytest.fixture(scope='session')
def train_steps():
  """The train steps that were made, by config and steps an epoch."""
  return {}


@pytest.fixture
def one_train_step(train_steps, monkeypatch):
  """Makes the train step of a config once, where it is not the point.

  To trace and to load it takes longer than all else that a resumed run does.
  """
  from flax_imdb.train import task
  make = task.make_train_step
  def made(config, model, optimizer, steps_per_epoch, *, class_weights):
    key = config.to_json(sort_keys=True), steps_per_epoch, str(class_weights)
    if key not in train_steps:
      train_steps[key] = make(config, model, optimizer, steps_per_epoch,
                              class_weights=class_weights)
    return train_steps[key]
  monkeypatch.setattr(task, 'make_train_step', made)


@pytest.fixture(scope='session')
def trained():
  """A finished tiny run: (run directory, what it printed). Don't change it."""
  from support.command import TINY
  return _trained('trained', TINY)


@pytest.fixture(scope='session')
def trained_on_every_input():
  """The same of a run that reads all that there is to be read."""
  from support.command import EVERY_INPUT
  return _trained('every_input', EVERY_INPUT)


def _trained(name, flags):
  from support.command import finished, run_main
  workdir, output = SHARED / name, SHARED / f'{name}.txt'
  with open(SHARED / f'{name}.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker makes it for all
    if not output.exists():
      # What it prints does not depend on what other workers have cached.
      text = finished(run_main(*flags, f'--workdir={workdir}',
                               XDG_CACHE_HOME=str(SHARED / f'{name}_cache')))
      output.write_text(text)
  return workdir, output.read_text()
