"""Runs compared over seeds: figures, order, what resumes and what fails."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from scipy import stats
from support.command import ROOT, TINY, environ, finished, run_here, run_main
from support.played_run import TEST_ACCURACY, loss

from flax_imdb.analysis import sweep
from flax_imdb.config import read_config

RATES = ['--set', 'learning_rate=1e-3,0.02']


def _sweep(tmp_path, *argv):
  return [*TINY, '--mode=sweep', f'--workdir={tmp_path}/runs', '--seeds=2',
          *argv]


def _starts(run):
  return (run / 'log.txt').read_text().count('begins')


def _runs(*accuracies):
  return [{'accuracy': x, 'loss': 1 - x, 'seconds': 10 * x}
          for x in accuracies]


def test_the_figures_are_those_of_their_definition():
  first, second = (0.80, 0.82, 0.81), (0.83, 0.84, 0.88)
  _, figures = sweep.compare([_runs(*first), _runs(*second)])
  n, mean = 3, sum(second) / 3
  assert figures['accuracy'] == pytest.approx(mean)
  assert figures['loss'] == pytest.approx(1 - mean)
  assert figures['seconds'] == pytest.approx(8.4)
  deviation = math.sqrt(sum((x - mean) ** 2 for x in second) / (n - 1))
  assert figures['standard_error'] == pytest.approx(deviation / math.sqrt(n))
  gains = [b - a for a, b in zip(first, second, strict=True)]
  gain = sum(gains) / n
  spread = math.sqrt(sum((x - gain) ** 2 for x in gains) / (n - 1))
  t = gain / (spread / math.sqrt(n))
  assert figures['p'] == pytest.approx(2 * stats.t.sf(t, n - 1))


@pytest.mark.parametrize('rows', [
    [_runs(0.8), _runs(0.9)], [_runs(0.8, 0.9), _runs(0.8, 0.9)],
    [_runs(0.91, 0.93), _runs(0.92, 0.94)]])  # which differ in their last bits
def test_what_shows_no_spread_has_no_p(rows):
  assert [row['p'] for row in sweep.compare(rows)] == [None, None]
  errors = [row['standard_error'] is None for row in sweep.compare(rows)]
  assert errors == 2 * [len(rows[0]) == 1]


def test_each_combination_is_trained_with_each_seed_and_compared(
    tmp_path, played):
  argv = _sweep(tmp_path, *RATES, '--set', 'model.layers=2,1',
                '--config.seed=3')
  output = finished(run_here(*argv))
  names = [f'learning_rate={rate},model.layers={layers}'
           for rate in ('0.001', '0.02') for layers in (2, 1)]
  written = (tmp_path / 'runs' / 'sweep.json').read_text()
  rows = json.loads(written)
  assert [row['combination'] for row in rows] == names
  assert re.findall(r'^\| (\S+=\S+) \|', output, re.MULTILINE) == names
  for row in rows:
    for one, seed in zip(row['runs'], (3, 4), strict=True):
      workdir = tmp_path / 'runs' / row['combination'] / f'seed_{seed}'
      assert (one['workdir'], one['seed']) == (str(workdir), seed)
      config = read_config(workdir / 'config.json')
      assert config.seed == seed and config.model.width == 8
      assert row['combination'] == (
          f'learning_rate={config.learning_rate},'
          f'model.layers={config.model.layers}')
      assert one['loss'] == loss(config)
    assert row['seconds'] == 13.5 and f'| {row["loss"]:.4f} | 13.5 |' in output
  assert TEST_ACCURACY[:6] not in output + written


def test_finished_runs_are_read_and_others_trained(tmp_path, played):
  argv = _sweep(tmp_path, *RATES)
  first = finished(run_here(*argv))
  runs = sorted(tmp_path.glob('runs/*/seed_?'))
  (runs[1] / 'summary.json').unlink()
  again = finished(run_here(*argv))
  assert '4 runs, 3 of them finished before' in again
  assert [_starts(run) for run in runs] == [1, 2, 1, 1]
  assert again.split('Validation')[1] == first.split('Validation')[1]
  wider = finished(run_here(*_sweep(tmp_path), *RATES, '--seeds=3'))
  assert '6 runs, 4 of them finished before' in wider
  changed = finished(run_here(
      *argv, '--config.show_examples=1', '--seeds=1'))
  assert '2 runs, 0 of them' in changed  # those that finished were others


def test_another_config_in_the_directory_is_refused(tmp_path, played):
  finished(run_here(*_sweep(tmp_path)))
  process = run_here(*_sweep(tmp_path, '--config.model.layers=2'))
  assert process.returncode == 2 and process.stderr.count('\n') == 1
  assert ('runs/seed_0 was made with another config (model.layers: 1 there, '
          '2 now)') in process.stderr


@pytest.mark.parametrize('jobs', [1, 2])
def test_a_signal_ends_the_runs_and_the_same_command_goes_on(
    tmp_path, played, monkeypatch, jobs):
  monkeypatch.setenv('PLAY_STOP', 'seed_1')
  argv = _sweep(tmp_path, f'--jobs={jobs}')
  process = run_here(*argv)
  assert process.returncode == 75
  assert process.stderr == (
      'stopped by SIGTERM; what was trained is saved: the same command goes on '
      f'from there: python -m flax_imdb.main {shlex.join(argv)}\n')
  log = tmp_path / 'runs' / 'seed_1' / 'log.txt'
  assert 'after step 7, which is saved' in log.read_text()
  monkeypatch.delenv('PLAY_STOP')
  finished(run_here(*argv))
  assert _starts(log.parent) == 2


def test_a_run_that_fails_ends_the_sweep_with_its_line_and_status(
    tmp_path, played, monkeypatch):
  monkeypatch.setenv('PLAY_FAIL', 'seed_1')
  process = run_here(*_sweep(tmp_path))
  run = tmp_path / 'runs' / 'seed_1'
  assert process.returncode == 1
  assert process.stderr == f'error: {run}: step 7 is not finite\n'
  monkeypatch.delenv('PLAY_FAIL')
  assert '2 runs, 1 of them finished before' in finished(
      run_here(*_sweep(tmp_path)))


@pytest.mark.parametrize(('jobs', 'devices'), [(1, None), (2, 2)])
def test_jobs_run_at_the_same_time_on_their_own_cores(
    tmp_path, played, monkeypatch, jobs, devices):
  """One job alone chooses for itself."""
  monkeypatch.delenv('JAX_NUM_CPU_DEVICES')
  monkeypatch.setattr('flax_imdb.environment.available_cores', lambda: 4)
  monkeypatch.setenv('PLAY_TOGETHER', str(jobs))
  finished(run_here(*_sweep(
      tmp_path, f'--jobs={jobs}', '--config.global_batch_size=64')))
  for log in tmp_path.glob('runs/seed_?/log.txt'):
    assert f'begins with {devices} devices' in log.read_text()


def test_a_real_run_directory_is_read_and_no_device_looked_for(
    tmp_path, trained):
  """There is none here; on an accelerator the runs would not get theirs."""
  shutil.copytree(trained[0], tmp_path / 'runs' / 'seed_0')
  output = finished(run_main(
      *_sweep(tmp_path), '--seeds=1', JAX_PLATFORMS='nowhere'))
  found = json.loads((trained[0] / 'summary.json').read_text())['validation']
  assert (f'| as it is | {found["accuracy"]:.4f} |  |  | {found["loss"]:.4f} |'
          in output)


@pytest.mark.slow
def test_a_stopped_sweep_ends_with_the_bits_of_an_undisturbed_one(tmp_path):
  """Real runs: one is stopped while it trains; it has long epochs."""
  longer = ['--config.num_epochs=9', '--config.data.max_length=20']
  argv = _sweep(tmp_path, '--set', 'model.width=8,4', *longer)
  with subprocess.Popen(
      [sys.executable, '-m', 'flax_imdb.main', *argv], cwd=ROOT, env=environ(),
      text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
      start_new_session=True) as process:
    log = tmp_path / 'runs' / 'model.width=8' / 'seed_1' / 'log.txt'
    while not (log.exists() and 'epoch 1/9' in log.read_text()):
      assert process.poll() is None
      time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C at a terminal
    _, error = process.communicate(timeout=120)
  assert process.returncode == 75 and 'stopped by SIGINT; ' in error
  assert 'is saved: the same command goes on' in log.read_text()
  output = finished(run_main(*argv))
  assert '4 runs, 1 of them finished before' in output
  assert 'resuming from step' in log.read_text()
  finished(run_main(
      *TINY, *longer, '--config.seed=1', f'--workdir={tmp_path}/alone'))
  one, alone = (json.loads((path / 'summary.json').read_text())
                for path in (log.parent, tmp_path / 'alone'))
  assert one['params_sha256'] == alone['params_sha256']
