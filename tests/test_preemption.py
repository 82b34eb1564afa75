"""Signals: what is noted, what ends at once, a run that goes on after it."""

import json
import os
import signal
import subprocess
import sys
import time

from conftest import ROOT
from conftest import TINY
from conftest import finished
from conftest import run_main
import pytest

from flax_imdb import preemption


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_handlers_return(number):
  before = signal.getsignal(number)
  with preemption.deferred() as request:
    assert request.name is None
    os.kill(os.getpid(), number)
    assert request.name == number.name
  assert signal.getsignal(number) is before
  with preemption.deferred() as request:  # each context counts anew
    os.kill(os.getpid(), number)
    time.sleep(0.2)
    assert request.name == number.name


# Blocks the main thread in C as a compilation does: no Python handler can run.
_BUSY = '''
import ctypes, time
from flax_imdb import preemption
with preemption.deferred():
  print('ready', flush=True)
  start = time.monotonic()
  while time.monotonic() < start + 20:
    ctypes.CDLL(None).poll(None, 0, 20000) if {in_c} else time.sleep(20)
'''


@pytest.mark.parametrize('in_c', [False, True])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_at_once(number, in_c):
  with subprocess.Popen(
      [sys.executable, '-c', _BUSY.format(in_c=in_c)], cwd=ROOT,
      stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(number)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=5) == 128 + number


def _start(workdir, *argv):
  return subprocess.Popen(
      [sys.executable, '-W', 'error', '-m', 'flax_imdb.main', *TINY, *argv,
       f'--workdir={workdir}'], cwd=ROOT, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(('number', 'line'), [
    (signal.SIGTERM, 'each new batch shape compiles once'),  # while it compiles
    (signal.SIGINT, 'first step done'),
    (signal.SIGTERM, 'epoch 1/2')])  # in or after the first save
def test_a_stopped_run_goes_on_to_the_same_bits(
    number, line, trained, tmp_path):
  with _start(tmp_path) as process:
    while line not in process.stdout.readline():
      pass
    process.send_signal(number)
    process.stdout.read()
    error = process.stderr.read()
  assert process.returncode == preemption.EXIT_STATUS == 75
  assert error.count('\n') == 1
  stopped = int(error.split('after step ')[1].split()[0])
  assert error.startswith(
      f'stopped by {number.name} after step {stopped} of 14')

  output = finished(run_main(*TINY, f'--workdir={tmp_path}'))
  assert f'resuming from step {stopped} of 14' in output
  undisturbed, _ = trained
  for name in ('metrics.jsonl', 'config.json', 'tokenizer.json'):
    assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes()
  a, b = (json.loads((path / 'summary.json').read_text())
          for path in (tmp_path, undisturbed))
  assert a | {'seconds': 0} == b | {'seconds': 0}
