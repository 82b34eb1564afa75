"""Signals: what is noted, what ends at once; tests/faults sends them."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support.command import ROOT

from flax_imdb.cluster import preemption


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_handlers_return(number):
  before = signal.getsignal(number)
  with preemption.deferred(8) as stop:
    assert stop.signal is None
    os.kill(os.getpid(), number)
    assert stop.signal == number.name
  assert signal.getsignal(number) is before
  with preemption.deferred(8) as stop:  # each context counts anew
    os.kill(os.getpid(), number)
    time.sleep(0.2)
    assert stop.signal == number.name


# Blocks the main thread in C as a compilation does: no Python handler can run.
_BUSY = '''
import ctypes, time
from flax_imdb.cluster import preemption
with preemption.deferred(8):
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
