"""Who is lost and who is stuck, by what was heard of all."""

import re
import signal
import subprocess
import sys
import time

import pytest
from support.command import ROOT

from flax_imdb.cluster import watchdog
from flax_imdb.cluster.watchdog import Beat


def _watch(index=1, count=3):
  watch = watchdog.Watchdog(index, count)
  watch.prepare(None, now=0.0)
  watch._since = 0.0
  return watch


def _beat(number, turns=0, life=0, phase='step', limit=60.0):
  return Beat(number, turns, life, phase, limit)


def test_who_is_silent_is_lost():
  watch = _watch()
  watch.report_alive('step', 29, 0.0)
  for second in range(1, 30):
    beat = _beat(second, second)
    watch.listen({0: beat, 1: beat, 2: _beat(*[min(second, 5)] * 2)},
                 float(second))
    lost = watch.verdict(float(second))
    assert bool(lost) == (second > 5 + watchdog.SILENT)
  assert lost.startswith('process 2 of 3 is lost at step 29')


def test_who_cannot_be_asked_is_process_0():
  watch = _watch()
  watch.listen(dict.fromkeys(range(3), _beat(1, 1)), 1.0)
  assert not watch.verdict(1 + watchdog.SILENT)
  assert watch.verdict(1.1 + watchdog.SILENT).startswith(
      'process 0 of 3 is lost at step 0')


def _verdicts(watch, seconds, beats):
  """The first verdict and its time: `beats`(second) gives all beats."""
  for second in range(1, seconds):
    watch.listen(beats(second), float(second))
    if verdict := watch.verdict(float(second)):
      return verdict, second
  return None


@pytest.mark.parametrize('phase', ['load', 'restore', 'compile', 'save'])
def test_who_lives_but_does_not_move_is_stuck_in_its_phase(phase):
  """Before any step, too; the others, who wait for it, are not named."""
  def beats(second):
    waits = _beat(second, turns=9, phase='evaluate', limit=5.0)
    return {0: waits, 1: waits, 2: _beat(second, 8, 0, phase, 70.0)}
  verdict, second = _verdicts(_watch(), 100, beats)
  assert verdict.startswith(f'process 2 of 3 is stuck in phase {phase} at step')
  assert second == 1 + 71


def test_all_are_named_that_stand_still_at_the_same_place():
  verdict, _ = _verdicts(
      _watch(), 100, lambda second: dict.fromkeys(range(3), _beat(second, 8)))
  assert verdict.startswith('process 0, 1, 2 of 3 is stuck in phase step')


@pytest.mark.parametrize('sign', ['turns', 'life'])
def test_who_waits_for_one_that_lives_is_not_stuck(sign):
  def beats(second):
    waits = _beat(second, turns=9)
    slow = {'turns': second // 50, 'life': 0} if sign == 'turns' else {
        'turns': 9, 'life': second // 50}  # it holds a lock, say
    return {0: _beat(second, **slow), 1: waits, 2: waits}
  assert _verdicts(_watch(), 400, beats) is None


def test_a_lone_run_speaks_of_itself():
  watch = _watch(index=0, count=1)
  watch.report_alive('save', 12, 0.0)
  verdict, _ = _verdicts(watch, 100, lambda second: {0: _beat(
      second, phase='save')})
  assert verdict == ('the run is stuck in phase save at step 12: start it '
                     'again, and it goes on from its last checkpoint')


def test_a_phase_may_take_a_small_multiple_of_its_longest_time():
  watch, now = _watch(), 0.0
  def limit_after(*seconds, phase):
    nonlocal now
    for took in seconds:
      watch.report_alive(phase, None, now)
      now += took
    watch.report_alive(phase, None, now)
    return watch.beat().limit
  watch.report_alive('load', None, now)
  assert watch.beat().limit == watchdog.FIRST  # nobody knows yet
  assert limit_after(0.5, 8.0, 0.25, phase='step') == 80
  assert limit_after(0.5, 0.25, phase='evaluate') == watchdog.LEAST['evaluate']
  assert limit_after(2.0, phase='save') == watchdog.LEAST_ELSEWHERE
  assert limit_after(90.0, phase='restore') == 900
  assert limit_after(0.5, phase='step') == 80  # it is remembered


def test_a_step_that_is_first_compiled_says_nothing_of_steps():
  watch = _watch()
  watch.report_alive('step', 1, 0.0)
  watch.report_alive('compile', None, 0.0)
  watch.report_alive('step', 2, 30.0)  # one of 70 s is no hang
  assert watch.beat().limit == watchdog.FIRST


def test_who_meets_others_in_a_phase_is_still_in_it_for_the_first_time():
  watch = _watch()
  watch.report_alive('load', None, 0.0)
  turns = watch.beat().turns
  watch.report_alive(None, None, 1.0)  # to agree on the directory, say
  beat = watch.beat()
  assert (beat.turns, beat.phase) == (turns + 1, 'load')
  assert beat.limit == watchdog.FIRST
  watch.report_alive('restore', None, 40.0)
  watch.report_alive('load', None, 41.0)
  assert watch.beat().limit == 400


@pytest.mark.parametrize(('main', 'all_', 'works'), [
    (0.0, 0.01, False), (0.001, 0.01, True), (0.0, 0.9, True)])
def test_work_is_a_sign_of_life_where_no_time_is_known(
    monkeypatch, main, all_, works):
  """Waiting for a collective takes up to 0.01 of a core, and no main thread."""
  seconds = [0.0, 0.0]
  def work():
    seconds[:] = seconds[0] + main, seconds[1] + all_
    return tuple(seconds)
  monkeypatch.setattr(watchdog, '_processor_seconds', work)
  watch = _watch()
  def lives():
    return watch.beat().life < watch.beat().life
  watch.report_alive('load', None, 0.0)
  assert lives() == works
  watch.report_alive('step', 1, 0.0)
  assert lives() == works
  watch.report_alive('step', 2, 1.0)
  assert not lives()  # the steps are known: it may hang in a loop
  for now in (2.0, 3.0, 4.0):  # any compilation may be the longest
    watch.report_alive('compile', None, now)
    assert lives() == works


# A lone process whose watch is ten times as fast as a real one.
_LONE = '''
import itertools, time
from flax_imdb.cluster import processes, watchdog
watchdog._BEAT, watchdog.FIRST, watchdog.LEAST['step'] = 0.1, 1.5, 1.5
with processes.watched():
  {main}
print('done', flush=True)
'''


def _lone(main):
  return subprocess.Popen(
      [sys.executable, '-c', _LONE.format(main=main)], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize('hang', [
    'time.sleep(100)', '__import__("ctypes").CDLL(None).poll(None, 0, 100000)'])
def test_a_slow_compilation_goes_on_and_a_hang_is_ended(hang):
  process = _lone(f'''
  processes.report_alive('compile')
  end = time.monotonic() + 4
  while time.monotonic() < end: pass
  print('compiled', flush=True)
  processes.report_alive('restore', 7)
  {hang}''')
  out, err = process.communicate(timeout=60)
  assert (process.returncode, out) == (69, 'compiled\n')
  assert re.fullmatch('error: the run is stuck in phase restore at step 7: '
                      'start it again, .*\n', err)


def test_a_known_phase_is_ended_even_if_it_works():
  process = _lone('''
  for step in range(3): processes.report_alive('step', step)
  while True: pass''')
  out, err = process.communicate(timeout=60)
  assert (process.returncode, out) == (69, '')
  assert err.startswith('error: the run is stuck in phase step at step 2: ')


def test_a_process_that_was_suspended_is_not_stuck():
  process = _lone('''
  for step in range(3): processes.report_alive('step', step)
  print('ready', flush=True)
  time.sleep(3)''')
  assert process.stdout.readline() == 'ready\n'
  time.sleep(0.4)  # four beats see it stand still, as steps may for 1.5 s
  process.send_signal(signal.SIGSTOP)
  time.sleep(2.5)
  process.send_signal(signal.SIGCONT)
  out, err = process.communicate(timeout=60)
  assert (process.returncode, out, err) == (0, 'done\n', '')


def test_a_process_that_hangs_in_writing_ends_too():
  process = _lone('''
  processes.report_alive('save', 3)
  print('x' * 1_000_000)''')
  assert process.wait(timeout=60) == 69  # nobody reads what it prints
  assert process.stderr.read().startswith('error: the run is stuck in phase')
  process.communicate()
