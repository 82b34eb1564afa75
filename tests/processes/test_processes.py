"""Several real processes: the same run, and what happens when one is lost."""

import concurrent.futures
import errno
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from support.command import (
  ROOT,
  TINY,
  environ,
  finished,
  needs_proc,
  run_here,
  run_main,
)

from flax_imdb.cluster import processes
from flax_imdb.errors import TransientError, UserError

# Long enough to be disturbed: 140 steps, of one batch shape.
LONG = (*TINY, '--config.num_epochs=20', '--config.data.max_length=20')


def _launch(count, devices, *argv):
  return subprocess.Popen(
      [sys.executable, 'launch/local.py', f'--processes={count}',
       f'--devices={devices}', '--', *argv], cwd=ROOT, text=True,
      env=environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _bare(index, address, *argv, count=2, **options):
  """One process without a launcher."""
  return subprocess.Popen(
      [sys.executable, '-m', 'flax_imdb.main', *argv,
       f'--coordinator_address={address}', f'--num_processes={count}',
       f'--process_id={index}'], text=True, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, **options)


def _ends(process, timeout=120):
  """(status, stdout, stderr) of a process."""
  out, err = process.communicate(timeout=timeout)
  return process.returncode, out, err


def _address():
  with socket.create_server(('127.0.0.1', 0)) as server:
    return f'127.0.0.1:{server.getsockname()[1]}'


def _errors(err, index):
  """What a launched process wrote of its own on stderr, jax' noise left out."""
  return re.findall(rf'^{index}: (error: .*|stopped by .*)$', err, re.M)


def _assert_same(workdir, other):
  """The two runs have the same bits."""
  for name in ('metrics.jsonl', 'config.json', 'tokenizer.json',
               'calibration.json'):
    assert (workdir / name).read_bytes() == (other / name).read_bytes()
  a, b = (json.loads((path / 'summary.json').read_text()) | {'seconds': 0}
          for path in (workdir, other))
  assert a == b


@pytest.fixture(scope='module')
def long(tmp_path_factory):
  """The undisturbed long run of one process with two devices."""
  workdir = tmp_path_factory.mktemp('long') / 'run'
  finished(run_here(*LONG, f'--workdir={workdir}'))
  return workdir


@pytest.fixture(scope='module')
def four_devices(tmp_path_factory):
  """The tiny run of one process with four devices."""
  workdir = tmp_path_factory.mktemp('four') / 'run'
  finished(run_main(*TINY, f'--workdir={workdir}', JAX_NUM_CPU_DEVICES='4'))
  return workdir


# -- the same run -------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_give_the_bits_of_two_devices(trained, tmp_path):
  status, out, err = _ends(_launch(2, 1, *TINY, f'--workdir={tmp_path}'))
  assert status == 0, err
  assert not [line for line in out.splitlines()
              if not re.match('0: |1: .Gloo', line)]  # the first one speaks
  _assert_same(tmp_path, trained[0])
  names = {re.sub(r'\d+\.vm.*|\d+\..*', '', p.name)
           for p in tmp_path.iterdir()}
  assert names == {re.sub(r'\d+\.vm.*|\d+\..*', '', p.name)
                   for p in trained[0].iterdir()}
  # The config, the epochs, the end: of one process.
  assert len(list(tmp_path.glob('events*'))) == 3


@pytest.mark.slow
def test_two_processes_compile_ahead_and_give_the_same_bits(trained, tmp_path):
  address, script = _address(), '''
import sys
from flax_imdb import main
from flax_imdb.train import programs
programs.threads = lambda: 2  # as on an accelerator
sys.exit(main.main(sys.argv[1:]))'''
  both = [subprocess.Popen(
      [sys.executable, '-c', script, *TINY, f'--workdir={tmp_path}',
       f'--coordinator_address={address}', '--num_processes=2',
       f'--process_id={i}'], cwd=ROOT, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, env=environ(JAX_NUM_CPU_DEVICES='1'))
          for i in (0, 1)]
  (status, out, err), (other, _, _) = [_ends(process) for process in both]
  assert (status, other) == (0, 0), err
  assert '\n2 programs compiled' in out and '\nfirst step done\n' in out
  _assert_same(tmp_path, trained[0])


@pytest.mark.slow
def test_two_processes_teach_themselves_as_one_does(tmp_path):
  flags = (*TINY, '--config.data.unlabelled_split=train[500:600]',
           '--config.self_training_rounds=1')
  finished(run_here(*flags, f'--workdir={tmp_path}/one'))
  status, _, err = _ends(
      _launch(2, 1, *flags, f'--workdir={tmp_path}/two'), timeout=300)
  assert status == 0, err
  for run in ('one', 'two'):
    assert (tmp_path / run / 'teacher' / 'summary.json').exists()
  _assert_same(tmp_path / 'two', tmp_path / 'one')


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(1, 4), (2, 2), (4, 1)])
def test_four_devices_of_some_processes(shape, four_devices, tmp_path):
  # gloo adds the gradients of four devices in another order than one process
  # does: the losses differ by 4e-10 of themselves. Two have but one order.
  status, _, err = _ends(_launch(*shape, *TINY, f'--workdir={tmp_path}'))
  assert status == 0, err
  ours, theirs = ([json.loads(line) for line in
                   (path / 'metrics.jsonl').read_text().splitlines()]
                  for path in (tmp_path, four_devices))
  assert len(ours) == len(theirs) == 2
  for a, b in zip(ours, theirs, strict=True):
    assert a['step'] == b['step']
    for split in ('train', 'validation'):
      assert a[split] == pytest.approx(b[split], rel=1e-6)


@pytest.mark.slow
def test_slurm_and_evaluation(trained):
  workdir, _ = trained
  job = os.getpid()
  slurm = {'SLURM_JOB_ID': str(job), 'SLURM_STEP_NODELIST': 'localhost',
           'SLURM_NTASKS': '2', 'JAX_NUM_CPU_DEVICES': '1'}
  command = [sys.executable, '-m', 'flax_imdb.main', '--mode=eval',
             f'--workdir={workdir}']
  both = [subprocess.Popen(
      command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, env=environ(
          **slurm, SLURM_PROCID=i, SLURM_LOCALID=i))
      for i in '01']
  (status, out, err), (other, quiet, _) = map(_ends, both)
  assert (status, other) == (0, 0), err
  alone = finished(run_main('--mode=eval', f'--workdir={workdir}'))
  assert 'in each of 2 processes' in out
  assert out.splitlines()[-1] == alone.splitlines()[-1]
  assert 'test: loss' not in quiet


# -- one is disturbed ---------------------------------------------------------


def _disturb(workdir, index, number):
  """Starts the long run in two processes and sends a signal to one."""
  launcher = _launch(2, 1, *LONG, f'--workdir={workdir}')
  while not (line := launcher.stdout.readline()).startswith('0: epoch 3/20'):
    assert line, launcher.communicate()[1]
  children = pathlib.Path(
      f'/proc/{launcher.pid}/task/{launcher.pid}/children').read_text().split()
  os.kill(int(children[index]), number)
  return launcher, time.monotonic()


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
  """Two runs, of which process 0, or 1, is stopped: {index: ...}."""
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    runs = {}
    for index in (0, 1):
      workdir = tmp_path_factory.mktemp('stopped') / 'run'
      runs[index] = workdir, pool.submit(
          _outcome, *_disturb(workdir, index, signal.SIGSTOP))
    yield runs  # they wait while other tests run


def _outcome(launcher, since):
  status, _, err = _ends(launcher)
  return status, err, time.monotonic() - since


def _assert_lost(outcome, index):
  status, err, seconds = outcome
  assert seconds < 60
  line, = _errors(err, 1 - index)
  step = re.match(f'error: process {index} of 2 is lost at step '
                  r'(\d+): start the run again', line)
  assert step and 7 <= int(step[1]) <= 140
  return status


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize('index', [0, 1])
def test_one_is_killed(index, stopped, long, tmp_path):
  status = _assert_lost(
      _outcome(*_disturb(tmp_path, index, signal.SIGKILL)), index)
  assert status == 128 + signal.SIGKILL  # of the one that failed first
  if index:
    output = finished(run_main(*LONG, f'--workdir={tmp_path}'))
    assert 'resuming from step' in output
    _assert_same(tmp_path, long)


@needs_proc
@pytest.mark.slow
def test_one_is_asked_to_stop(stopped, long, tmp_path):
  status, _, err = _ends(_disturb(tmp_path, 1, signal.SIGTERM)[0])
  assert status == 75
  first, = _errors(err, 0)
  assert [first] == _errors(err, 1)
  step = re.match(r'stopped by SIGTERM after step (\d+) of 140', first)
  assert step
  status, out, err = _ends(_launch(2, 1, *LONG, f'--workdir={tmp_path}'))
  assert status == 0, err
  assert f'0: resuming from step {step[1]} of 140' in out
  _assert_same(tmp_path, long)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize('index', [0, 1])
def test_one_is_stopped(index, stopped, long):
  workdir, outcome = stopped[index]
  assert _assert_lost(outcome.result(), index) == 69
  if not index:
    finished(run_main(*LONG, f'--workdir={workdir}'))
    _assert_same(workdir, long)


# With a watch that is faster than a real one; {hang} is what hangs.
_HANGS = '''
import sys, time
from flax_imdb import main
from flax_imdb.cluster import processes, watchdog
watchdog.FIRST = 6.0
watchdog.LEAST.update(step=6.0, wait=6.0)
def hang(*args, **kwargs):
  time.sleep(1000)
{hang}
sys.exit(main.main(sys.argv[1:]))
'''


@pytest.mark.slow
def test_one_whose_main_thread_hangs_is_named(tmp_path):
  address, hang = _address(), '''
from flax_imdb.data.batches import TrainBatches
call = TrainBatches.__call__
TrainBatches.__call__ = lambda self, step: hang() if (
    step == 30 and processes.index() == 1) else call(self, step)'''
  both = [subprocess.Popen(
      [sys.executable, '-c', _HANGS.format(hang=hang), *LONG,
       f'--workdir={tmp_path}', f'--coordinator_address={address}',
       '--num_processes=2', f'--process_id={i}'], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env=environ(JAX_NUM_CPU_DEVICES='1')) for i in (0, 1)]
  for process in both:
    status, _, err = _ends(process)
    assert status == 69
    assert re.match(r'error: process 1 of 2 is stuck in phase (step|wait) at '
                    r'step 3\d: start the run again', err.splitlines()[-1])


def test_a_lone_run_that_hangs_ends(tmp_path):
  hang = 'from flax_imdb.train.writers import Writers\nWriters.write = hang'
  process = subprocess.run(
      [sys.executable, '-c', _HANGS.format(hang=hang), *LONG,
       f'--workdir={tmp_path}'], cwd=ROOT, text=True, capture_output=True,
      check=False, timeout=120)
  assert process.returncode == 69
  assert re.fullmatch('error: the run is stuck in phase save at step 7: start '
                      'it again, and it goes on .*\n', process.stderr)


# -- bad input ----------------------------------------------------------------


def test_a_workdir_that_is_not_shared_is_refused(tmp_path):
  address, both = _address(), []
  for index in (0, 1):
    (tmp_path / str(index)).mkdir()
    both.append(_bare(
        index, address, *TINY, '--workdir=run', cwd=tmp_path / str(index),
        env=environ(JAX_NUM_CPU_DEVICES='1', PYTHONPATH=str(ROOT))))
  for process in both:
    status, _, err = _ends(process)
    assert status == 2
    line, = err.splitlines()
    assert line.startswith('error: the workdir is not shared: process 1 does')
  assert not list(tmp_path.glob('*/run/*'))


def test_processes_that_do_not_divide_the_batch(tmp_path):
  status, _, err = _ends(_launch(
      2, 1, *TINY, '--config.global_batch_size=15', f'--workdir={tmp_path}'))
  assert status == 2
  for index in range(2):
    line, = _errors(err, index)
    assert 'global_batch_size=15 is not divisible by the 2 devices' in line


def test_other_flags_in_one_process(tmp_path):
  address = _address()
  both = [_bare(i, address, *TINY, f'--config.seed={i}',
                f'--workdir={tmp_path}/run', cwd=ROOT,
                env=environ(JAX_NUM_CPU_DEVICES='1'))
          for i in (0, 1)]
  for process in both:
    status, _, err = _ends(process)
    assert status == 2
    assert err.startswith('error: process 1 has another config than process 0')


def test_a_port_in_use():
  with socket.create_server(('127.0.0.1', 0)) as server:
    process = run_main(
        f'--coordinator_address=127.0.0.1:{server.getsockname()[1]}',
        '--num_processes=2', '--process_id=0')
  assert process.returncode == 69
  assert process.stderr.startswith('error: process 0 cannot listen on port')
  assert process.stderr.count('\n') == 1


def test_nobody_listens(monkeypatch):
  monkeypatch.setattr(processes, 'MEET_SECONDS', 0.3)
  with pytest.raises(TransientError, match='cannot reach process 0 at 127.0'):
    processes.initialize(_address(), 2, 1)


def test_a_port_that_is_not_allowed_is_a_mistake(monkeypatch):
  def create_server(*args, **kwargs):
    raise PermissionError(errno.EACCES, 'Permission denied')
  monkeypatch.setattr(processes.socket, 'create_server', create_server)
  with pytest.raises(UserError, match='cannot listen on port 80 .Permission'):
    processes.initialize('127.0.0.1:80', 2, 0)


def test_nobody_comes():
  process = subprocess.run(
      [sys.executable, '-c', 'from flax_imdb.cluster import processes; '
       'processes.MEET_SECONDS = 1; '
       f'processes.initialize("{_address()}", 2, 0)'], cwd=ROOT,
      capture_output=True, text=True, timeout=60, check=False)
  assert process.returncode == 69  # where jax aborts
  assert process.stderr.splitlines()[-1].startswith(
      'error: the 2 processes did not all meet at 127.0.0.1')


def test_the_command_line_checks_them():
  process = run_here('--num_processes=2')
  assert process.returncode == 2
  assert process.stderr == ('error: several processes also need '
                            '--coordinator_address and --process_id\n')
  process = run_here('--mode=predict', '--coordinator_address=a:1',
                     '--num_processes=2', '--process_id=0')
  assert process.returncode == 2
  assert process.stderr == ('error: --mode=predict runs in one process: leave '
                            'out --num_processes\n')
