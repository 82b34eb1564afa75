"""What Optuna tries, what ends a trial, what is left, and that it resumes."""

import json
import subprocess
import sys
import time
import types

import pytest
from support.command import ROOT, TINY, environ, finished, run_here, run_main

from flax_imdb import cli
from flax_imdb.analysis import tune
from flax_imdb.config import differences, load_config, read_config

FILES = sorted(f'configs/{f.name}' for f in ROOT.glob('configs/*.py'))


@pytest.fixture
def clock(tmp_path, monkeypatch):
  """Each finished run has taken a minute; one that waits is an hour late."""
  def monotonic():
    runs = tmp_path / 'runs'
    return (60.0 * len(list(runs.glob('*/summary.json')))
            + 3600.0 * (runs / 'late' / 'metrics.jsonl').exists())
  monkeypatch.setattr(tune, 'time', types.SimpleNamespace(monotonic=monotonic))


@pytest.fixture
def two_fields(monkeypatch):
  """Trials of two epochs, which differ in learning rate alone."""
  monkeypatch.setattr(tune, 'search_space', lambda config: {
      'num_epochs': (2, 2, False), 'learning_rate': (1e-3, 0.1, True)})


def _tune(tmp_path, minutes, *argv):
  return [*TINY, '--mode=tune', f'--workdir={tmp_path}/runs',
          f'--minutes={minutes}', '--config.learning_rate=0.0512345', *argv]


def _starts(run):
  return (run / 'log.txt').read_text().count('begins')


def _names(folder):
  return sorted(path.name for path in folder.glob('trial_*'))


@pytest.mark.parametrize('file', FILES)
def test_the_space_holds_the_config_itself_and_what_its_model_reads(file):
  config = load_config(file)
  space = tune.search_space(config)
  flat = {field: new for field, (_, new) in differences(
      type(config)(), config).items()}
  for field, (least, most, log) in space.items():
    assert least <= flat[field] <= most and least < most
    assert least > 0 or not log
  words_alone = config.model.inputs == 'words'
  assert ('model.bigram_dropout' not in space) == words_alone
  assert ('model.log_odds_dropout' not in space) == words_alone
  assert ('adversarial_norm' in space) == (config.adversarial_norm > 0)
  assert {'learning_rate', 'model.pooled_dropout', 'num_epochs'} <= set(space)


@pytest.mark.parametrize('ema_decay', [0.9998, 0.99999])
def test_what_is_drawn_stays_within_its_bounds(ema_decay):
  """Where four digits would be 1."""
  optuna = pytest.importorskip('optuna')
  config = load_config('configs/debug.py')
  config.ema_decay = ema_decay
  space = tune.search_space(config)
  tuning = types.SimpleNamespace(config=config)
  study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
  for _ in range(20):
    found = tune.Tuning._config(tuning, study.ask(), space)
    assert 0 < found.ema_decay < 1


def test_the_best_trial_becomes_a_config_file(tmp_path, played, clock):
  """Six minutes: the first takes one for two epochs."""
  output = finished(run_here(*_tune(tmp_path, 6)))
  runs = tmp_path / 'runs'
  scores = {path.parent.name: json.loads(path.read_text())['validation']['loss']
            for path in runs.glob('trial_*/summary.json')}
  assert 3 <= len(scores) <= 6
  best = min(scores, key=scores.get)
  assert best != 'trial_0'  # or nothing was tuned
  first = read_config(runs / 'trial_0' / 'config.json')
  _, as_it_is = cli.parse(_tune(tmp_path, 6))
  assert not differences(first, as_it_is)
  tuned = load_config(str(runs / 'tuned.py'))
  assert not differences(tuned, read_config(runs / best / 'config.json'))
  text = (runs / 'tuned.py').read_text()
  assert text.split('\n')[2] == (
      f'python -m flax_imdb.main --config={runs}/tuned.py')
  gain = f'{scores[best] - scores["trial_0"]:+.4f}'
  assert gain in output and gain in text and f'{scores[best]:.4f}' in text
  assert [path.parent.name for path in runs.glob('*/checkpoints')] == [best]
  # The minutes are over: it says the same again.
  again = finished(run_here(*_tune(tmp_path, 6)))
  assert again == output[output.index('best of'):]


def test_accuracy_is_made_large(tmp_path, played, clock, two_fields):
  finished(run_here(*_tune(
      tmp_path, 4, '--config.early_stopping.monitor=accuracy')))
  scores = [json.loads(path.read_text())['validation']['accuracy']
            for path in tmp_path.glob('runs/*/summary.json')]
  assert len(scores) == 4
  text = (tmp_path / 'runs' / 'tuned.py').read_text()
  assert f'accuracy {max(scores):.4f} in' in text


def test_no_trial_begins_that_could_not_end_in_time(
    tmp_path, played, clock, two_fields):
  finished(run_here(*_tune(tmp_path, 0.1)))  # the first always runs
  assert _names(tmp_path / 'runs') == ['trial_0']
  finished(run_here(*_tune(tmp_path, 2.9)))
  assert _names(tmp_path / 'runs') == ['trial_0', 'trial_1']
  finished(run_here(*_tune(tmp_path, 3)))
  rates = {read_config(path / 'config.json').learning_rate
           for path in tmp_path.glob('runs/trial_*')}
  assert len(rates) == 3  # a start draws anew


def test_the_time_left_bounds_the_epochs_of_a_trial(tmp_path, played, clock):
  finished(run_here(*_tune(tmp_path, 1.5)))
  epochs = [read_config(path / 'config.json').num_epochs for path in sorted(
      tmp_path.glob('runs/trial_*'))]
  assert epochs == [2, 1]  # of up to four


def test_a_trial_worse_than_the_median_is_ended(
    tmp_path, played, clock, two_fields, monkeypatch):
  monkeypatch.setenv('PLAY_WAIT', 'trial_5')
  output = finished(run_here(*_tune(tmp_path, 6)))
  assert 'trial_5  ended after epoch 1, worse than the median' in output
  log = (tmp_path / 'runs' / 'trial_5' / 'log.txt').read_text()
  assert 'which is saved' in log


def test_a_trial_that_is_late_is_ended(
    tmp_path, played, clock, two_fields, monkeypatch):
  monkeypatch.setenv('PLAY_WAIT', 'trial_1')
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'late').symlink_to('trial_1')
  output = finished(run_here(*_tune(tmp_path, 30)))
  assert 'trial_1  ended: the 30 minutes are over' in output
  assert 'best of 1 finished trials' in output


@pytest.mark.parametrize('stopped', ['trial_0', 'trial_1'])
def test_what_was_running_goes_on_in_its_directory(
    tmp_path, played, clock, two_fields, monkeypatch, stopped):
  """After a signal, and where a kill left half a line and a lock."""
  monkeypatch.setenv('PLAY_STOP', stopped)
  process = run_here(*_tune(tmp_path, 3))
  assert process.returncode == 75 and 'stopped by SIGTERM; ' in process.stderr
  runs = tmp_path / 'runs'
  config = read_config(runs / stopped / 'config.json')
  assert (runs / stopped / 'checkpoints').is_dir()
  with open(runs / 'study.jsonl', 'a') as file:
    file.write('{"op_code": 9, "tri')
  (runs / 'study.jsonl.lock').symlink_to('study.jsonl')
  monkeypatch.delenv('PLAY_STOP')
  finished(run_here(*_tune(tmp_path, 3)))
  assert _starts(runs / stopped) == 2  # which refuses another config
  assert not differences(config, read_config(runs / stopped / 'config.json'))
  others = [run for run in runs.glob('trial_*') if run.name != stopped]
  assert len(others) == 2 and {_starts(run) for run in others} == {1}


def test_a_trial_that_fails_is_one_less(
    tmp_path, played, clock, two_fields, monkeypatch):
  monkeypatch.setenv('PLAY_FAIL', 'trial_1')
  output = finished(run_here(*_tune(tmp_path, 3)))
  run = tmp_path / 'runs' / 'trial_1'
  assert f'trial_1  failed: {run}: step 7 is not finite  learning' in output
  assert 'best of 3 finished trials' in output


def test_the_first_that_fails_ends_it(tmp_path, played, monkeypatch):
  monkeypatch.setenv('PLAY_FAIL', 'trial_0')
  process = run_here(*_tune(tmp_path, 3))
  run = tmp_path / 'runs' / 'trial_0'
  assert process.returncode == 1
  assert process.stderr == f'error: {run}: step 7 is not finite\n'


def test_mistakes_are_one_line(
    tmp_path, played, clock, two_fields, monkeypatch):
  def refused(message, *argv):
    process = run_here(*_tune(tmp_path, 1, *argv))
    assert process.returncode == 2 and process.stderr.count('\n') == 1
    assert message in process.stderr
  refused('num_epochs=0 leaves nothing to tune', '--config.num_epochs=0')
  refused('nothing to choose by', '--config.data.validation_fraction=0')
  finished(run_here(*_tune(tmp_path, 1)))
  refused('was made with another config (seed: 0 there, 1 now)',
          '--config.seed=1')
  journal = tmp_path / 'runs' / 'study.jsonl'
  for damage in (b'{"op_code"\n', b'[]\n', b'{}\n', b'\xff\n'):
    journal.write_bytes(damage + journal.read_bytes())
    refused('study.jsonl is not a journal of Optuna')
  monkeypatch.setitem(sys.modules, 'optuna', None)
  refused("needs Optuna: pip install 'optuna>=4,<6'")


@pytest.mark.slow
def test_real_runs_are_tuned_and_stopped(tmp_path):
  argv = [*_tune(tmp_path, 0.01), '--config.num_epochs=9']
  with subprocess.Popen(
      [sys.executable, '-m', 'flax_imdb.main', *argv], cwd=ROOT, env=environ(),
      text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
    log = tmp_path / 'runs' / 'trial_0' / 'log.txt'
    while not (log.exists() and 'epoch 1/9' in log.read_text()):
      assert process.poll() is None
      time.sleep(0.1)
    process.terminate()
    _, error = process.communicate(timeout=120)
  assert process.returncode == 75 and 'stopped by SIGTERM; ' in error
  output = finished(run_main(*argv))
  assert 'resuming from step' in log.read_text()
  assert 'best of 1 finished trials: Validation loss 0.' in output
  tuned = finished(run_main(
      f'--config={tmp_path}/runs/tuned.py',
      f'--workdir={tmp_path}/runs/trial_0'))
  assert 'already at step 63 of 63' in tuned
