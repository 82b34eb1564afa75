"""Signals: what is noted, what ends at once; tests/faults sends them."""

import collections
import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support.command import ROOT

from flax_imdb.cluster import devices, preemption
from flax_imdb.errors import Terminated


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


def test_what_defers_nothing_is_ended_by_sigterm():
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(Terminated, match='stopped by SIGTERM, with') as caught:
    with preemption.heeded():
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(5)
      pytest.fail('it went on')
  assert caught.value.status == 75
  assert signal.getsignal(signal.SIGTERM) is before
  with pytest.raises(KeyboardInterrupt), preemption.heeded():
    raise KeyboardInterrupt  # Ctrl-C is none


def test_a_signal_to_a_run_that_just_ended_is_heeded_before_the_next():
  with preemption.deferred(8) as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == 'SIGTERM'
  with pytest.raises(Terminated, match='stopped by SIGTERM after a teacher'):
    preemption.leave_if_unheeded()
  with preemption.deferred(8):
    pass
  preemption.leave_if_unheeded()  # none has come since


@pytest.mark.parametrize('signalled', range(20))
def test_several_processes_stop_at_the_same_step(monkeypatch, signalled):
  """Which of them is signalled does not matter, nor how far its host is."""
  monkeypatch.setattr(preemption.processes, 'count', lambda: 2)
  monkeypatch.setattr(devices, 'to_host', lambda votes: sum(votes))
  votes = collections.defaultdict(list)  # of each step: an all-reduce of two
  def train_step(state, batch):
    votes[state].append(batch[devices.VOTES].sum())
    return state + 1, (None, votes[state])
  def steps(stop, signal_at):
    step, state = stop.voting(train_step), 0
    while not stop.agreed(wait=state % 14 == 0):  # an epoch has 14
      stop.signal = 'SIGTERM' if state >= signal_at else None
      state, _ = step(state, {'weights': np.ones((1, 2), np.float32)})
      yield state
  both = [steps(preemption.Stop(8), at) for at in (signalled, 1000)]
  done = list(itertools.zip_longest(*both))
  assert all(one == other for one, other in done)
  assert signalled < len(done) <= signalled + 15


def test_only_old_votes_are_waited_for_within_an_epoch(monkeypatch):
  """And what was agreed on once stays so, whatever an older vote says."""
  looked_at, answer = [], 0
  def to_host(votes):
    looked_at.append(votes)
    return answer
  monkeypatch.setattr(preemption.processes, 'count', lambda: 2)
  monkeypatch.setattr(devices, 'to_host', to_host)
  stop, state = preemption.Stop(8), 0
  step = stop.voting(lambda state, batch: (state + 1, (None, state)))
  for _ in range(24):
    assert not stop.agreed()
    state, _ = step(state, {'weights': np.ones((1, 2), np.float32)})
  assert looked_at == [0, 8]
  answer = 1
  assert stop.agreed(wait=True) and looked_at[-1] == 23
  answer = 0
  assert stop.agreed() and looked_at[-1] == 16


# Blocks the main thread in C as a compilation does: no Python handler can run.
_BUSY = '''
import ctypes, time
from flax_imdb.cluster import preemption
with preemption.deferred(8, lambda: print('left', flush=True)):
  print('ready', flush=True)
  start = time.monotonic()
  while time.monotonic() < start + 20:
    ctypes.CDLL(None).poll(None, 0, 20000) if {in_c} else time.sleep(20)
'''


@pytest.mark.parametrize(('number', 'in_c'), [
    (signal.SIGTERM, True), (signal.SIGINT, False),
    pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
    pytest.param(signal.SIGINT, True, marks=pytest.mark.slow)])
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
    assert process.stdout.read() == 'left\n'
