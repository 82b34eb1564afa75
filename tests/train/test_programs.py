"""The programs of a run are compiled side by side, and change nothing in it."""

from concurrent import futures
import os
import re
import signal
import threading

import jax
import pytest
from support.command import EVERY_INPUT, TINY, finished, run_here

from flax_imdb import environment
from flax_imdb.data.batches import TrainBatches
from flax_imdb.train import programs

# Two widths, to train and to evaluate; one that predicts may have its own.
BUCKETS = (*TINY, '--config.data.max_length=120',
           '--config.data.bucket_width=60', '--config.show_examples=0')
SEGMENTS = (*EVERY_INPUT, '--config.show_examples=0')
COMPILE = jax.stages.Lowered.compile
EVENT = '/jax/core/compile/backend_compile_duration'


@pytest.fixture
def two_threads(monkeypatch):
  """As on an accelerator: side by side, and before the first step."""
  monkeypatch.setattr(programs, 'threads', lambda: 2)


@pytest.fixture
def compiled():
  """The names of what was compiled, or read from jax' cache, in their order."""
  names = []
  def listen(event, duration, **kwargs):
    del duration
    if event == EVENT:
      names.append(kwargs.get('fun_name'))
  jax.monitoring.register_event_duration_secs_listener(listen)
  yield names
  jax.monitoring.unregister_event_duration_listener(listen)


def _results(workdir):
  """What a run has computed, each bit of it."""
  summary = (workdir / 'summary.json').read_text()
  return (re.findall(r'"params_sha256": ".*"', summary),
          (workdir / 'metrics.jsonl').read_text())


@pytest.fixture(scope='module')
def buckets(tmp_path_factory):
  """A run of BUCKETS that compiles each program when it is first called."""
  workdir = tmp_path_factory.mktemp('buckets') / 'run'
  out = finished(run_here(*BUCKETS, f'--workdir={workdir}'))
  assert ' batch shape compiled in' in out and 'programs' not in out
  return workdir, out


@pytest.mark.parametrize(('flags', 'run', 'count'), [
    (BUCKETS, 'buckets', 4), (SEGMENTS, 'trained_on_every_input', 2)])
def test_all_compile_before_the_first_step_and_no_bit_changes(
    flags, run, count, request, compiled, monkeypatch, tmp_path):
  lazily, _ = request.getfixturevalue(run)
  # It lets a program through only where another is on its way.
  slow = threading.Barrier(2)
  def compile_slowly(lowered):
    slow.wait(timeout=20)
    return COMPILE(lowered)
  monkeypatch.setattr(jax.stages.Lowered, 'compile', compile_slowly)
  monkeypatch.setattr(programs, 'threads', lambda: 2)
  compile_ahead = programs.compile_ahead
  def before_the_first_step(*args):
    compiled.clear()
    compile_ahead(*args)
    assert len(compiled) == count
    compiled.clear()
  monkeypatch.setattr(programs, 'compile_ahead', before_the_first_step)
  out = finished(run_here(*flags, f'--workdir={tmp_path}'))
  assert compiled == ['jit(activations)']  # of gates, for TensorBoard
  assert f'\n{count} programs compiled, up to 2 at a time, in ' in out
  assert '\nfirst step done\n' in out and 'shapes compiled' not in out
  assert _results(tmp_path) == _results(lazily)


@pytest.mark.usefixtures('two_threads')
def test_what_was_not_foreseen_compiles_when_it_comes(
    buckets, monkeypatch, tmp_path):
  monkeypatch.setattr(
      TrainBatches, 'first_of_each_shape', lambda self, steps: [steps[0]])
  out = finished(run_here(*BUCKETS, f'--workdir={tmp_path}'))
  assert '\n3 programs compiled' in out
  assert out.count(', 1 batch shape compiled in') == 1
  assert _results(tmp_path) == _results(buckets[0])


@pytest.mark.usefixtures('two_threads')
def test_a_signal_ends_it_once_what_compiles_is_done(
    buckets, monkeypatch, tmp_path):
  calls, waiting, left = [], threading.Event(), threading.Event()
  def compile_slowly(lowered):
    calls.append(lowered)
    if len(calls) == 1:
      waiting.wait(timeout=20)
      os.kill(os.getpid(), signal.SIGINT)
    else:
      left.wait(timeout=20)
    return COMPILE(lowered)
  def show(task, under_way, total):
    if len(under_way) == total:
      waiting.set()
  monkeypatch.setattr(programs, '_show', show)
  shutdown = futures.ThreadPoolExecutor.shutdown
  def leave(self, wait=True, *, cancel_futures=False):
    if cancel_futures:  # no pool of orbax
      left.set()
    shutdown(self, wait, cancel_futures=cancel_futures)
  monkeypatch.setattr(jax.stages.Lowered, 'compile', compile_slowly)
  monkeypatch.setattr(futures.ThreadPoolExecutor, 'shutdown', leave)
  flags = (*BUCKETS, f'--workdir={tmp_path}')
  process = run_here(*flags)
  assert process.returncode == 75, process.stderr
  assert process.stderr.startswith(
      'stopped by SIGINT after step 0 of 14, which is saved')
  assert len(calls) < 4
  monkeypatch.undo()
  finished(run_here(*flags))
  assert _results(tmp_path) == _results(buckets[0])


@pytest.mark.usefixtures('two_threads')
def test_a_run_that_is_done_compiles_only_what_evaluates(tmp_path):
  flags = (*BUCKETS, f'--workdir={tmp_path}')
  assert '\n4 programs compiled' in finished(run_here(*flags))
  assert '\n2 programs compiled' in finished(run_here(*flags))


def test_what_a_compiler_refuses_ends_the_run(monkeypatch, tmp_path):
  def refuse(lowered):
    raise RuntimeError('too large')
  monkeypatch.setattr(jax.stages.Lowered, 'compile', refuse)
  monkeypatch.setattr(programs, 'threads', lambda: 2)
  with pytest.raises(RuntimeError, match='too large'):
    run_here(*BUCKETS, f'--workdir={tmp_path}')


@pytest.mark.parametrize(('backend', 'debugging', 'threads'), [
    ('tpu', False, 24), ('cpu', False, 1), ('tpu', True, 1)])
def test_a_thread_for_each_core_of_an_accelerator_s_host(
    backend, debugging, threads, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(environment, 'available_cores', lambda: 24)
  with jax.disable_jit(debugging):
    assert programs.threads() == threads
