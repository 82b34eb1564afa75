"""The training loop, in this process: what it saves, resumes and evaluates."""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from rich.console import Console
from support.command import EVERY_INPUT, TINY, finished, run_here

from flax_imdb import environment, main
from flax_imdb.checkpoint import records, run
from flax_imdb.checkpoint.manager import Checkpoints
from flax_imdb.cluster import devices, preemption
from flax_imdb.config import load_config, override, read_config
from flax_imdb.data.batches import TrainBatches
from flax_imdb.data.reviews import load_splits
from flax_imdb.errors import UserError
from flax_imdb.fields import check_fields
from flax_imdb.inference import evaluate
from flax_imdb.model.classifier import params_sha256
from flax_imdb.terminal import Rate, Terminal
from flax_imdb.train import loop, programs
from flax_imdb.train.metrics import Metrics

pytestmark = pytest.mark.usefixtures('one_train_step')


class _Terminal(Terminal):
  """Keeps what it is told; interrupts the run at a line that begins so."""

  def __init__(self, interrupt_at=None):
    super().__init__()
    self.lines, self.updates, self.calls = [], [], []
    self._interrupt_at = interrupt_at

  def announce(self, text):
    self.lines.append(text)
    if self._interrupt_at and text.startswith(self._interrupt_at):
      raise KeyboardInterrupt

  @contextlib.contextmanager
  def showing(self, view):
    self.calls.append(view)
    try:
      yield
    finally:
      self.calls.append('over')

  def update(self, step, means, rate):
    self.updates.append((step, means, rate.reviews, rate.tokens))
    self.calls[-1].update(step, means, rate)


def _seen(view):
  """The lines that a view shows."""
  file = io.StringIO()
  Console(file=file, width=100).print(view)
  return [line.rstrip() for line in file.getvalue().splitlines()]


def _flags(flags):
  config = load_config(flags[0].removeprefix('--config='))
  for word in flags[1:]:
    override(
        config, *word.removeprefix('--config.').split('=', 1))
  return config


def _config(**fields):
  """The config of TINY, 7 steps an epoch, but one program for all runs."""
  config = _flags(TINY)
  config.update_from_flattened_dict({
      'data.bucket_width': 0, 'data.max_length': 20, 'ema_decay': 0.8,
      'schedule': 'constant', 'warmup_epochs': 0.0, 'show_examples': 0})
  config.update_from_flattened_dict(fields)
  check_fields(config)
  return config


def _lines(workdir):
  return [json.loads(line)
          for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def _script(monkeypatch, *fields):
  """Changes the results of the first scores; returns the true ones."""
  score, true, left = evaluate.score, [], list(fields)
  def scripted(logits, labels):
    true.append(score(logits, labels))
    return true[-1] | (left.pop(0) if left else {})
  monkeypatch.setattr(evaluate, 'score', scripted)
  return true


def test_a_resumed_run_remembers_its_patience_and_its_time(
    tmp_path, monkeypatch):
  """The first epoch is the best: the run stops after three more."""
  monkeypatch.setattr(Rate, 'seconds', lambda self: 1000.0)
  config = _config(**{'num_epochs': 9, 'early_stopping.patience': 3})
  _script(monkeypatch, *({'loss': x} for x in (0.5, 0.9, 0.8, 0.7)))
  terminal = _Terminal(interrupt_at='epoch 3/9')
  with pytest.raises(KeyboardInterrupt):
    loop.train(config, str(tmp_path), terminal)
  assert terminal.calls[1:] == ['over']
  terminal = _Terminal()
  summary = loop.train(config, str(tmp_path), terminal)
  assert 'resuming from step 21 of 63' in terminal.lines
  view, over = terminal.calls
  assert over == 'over'
  lines = _seen(view)
  # Epochs of both processes make the curves, and lead to the same patience.
  assert any(re.fullmatch(
      r'validation 0\.7000 ▁█▆▄ +0\.\d{4} +\S{4}', line) for line in lines)
  assert ('best: epoch 1, validation loss 0.5000  0 of 3 epochs of patience '
          'left') in lines
  assert any(line.startswith('step 28 of 63  ') for line in lines)
  assert lines[-1].startswith('recurrence: loop on cpu, as config.model')
  assert summary['step'] == 28 and summary['best_step'] == 7
  assert summary['seconds'] == 4000
  assert [x['step'] for x in _lines(tmp_path)] == [7, 14, 21, 28]
  # Started once more it only evaluates, and was trained for no longer.
  monkeypatch.setattr(
      programs, 'compile_ahead', lambda *_: time.sleep(0.01))
  again = loop.train(config, str(tmp_path), _Terminal())
  assert again['seconds'] == 4000


@pytest.mark.parametrize(('monitor', 'restore_best', 'best', 'evaluated'), [
    ('loss', True, 7, 7), ('accuracy', True, 14, 14), ('loss', False, 7, 14),
    ('macro_f1', True, 7, 7)])
def test_the_monitor_chooses_the_weights_that_are_evaluated(
    monitor, restore_best, best, evaluated, tmp_path, monkeypatch):
  """With averaged weights, which validation and evaluation both take."""
  true = _script(monkeypatch, {'loss': 0.5, 'accuracy': 0.1, 'macro_f1': 0.2},
                 {'loss': 0.9, 'accuracy': 0.9, 'macro_f1': 0.1})
  config = _config(**{'early_stopping.monitor': monitor,
                      'early_stopping.restore_best': restore_best})
  summary = loop.train(config, str(tmp_path), _Terminal())
  assert summary['best_step'] == best
  first, second, validation, _ = true
  assert first['loss'] != pytest.approx(second['loss'], rel=1e-6)
  want = first if evaluated == 7 else second
  assert summary['validation'].items() >= validation.items()
  assert validation['loss'] == pytest.approx(want['loss'], rel=1e-7)
  assert [summary[s]['n'] for s in ('train', 'validation', 'test')] == [
      99, 11, 45]
  # Of the training split what its last epoch measured, not a second pass.
  assert summary['train'] == _lines(tmp_path)[-1]['train']


def test_a_linear_model_of_the_same_reviews_stands_beside(
    trained_on_every_input):
  workdir, output = trained_on_every_input
  config = read_config(workdir / 'config.json')
  found = run.restore(str(workdir), None)
  summary = json.loads((workdir / 'summary.json').read_text())
  assert set(summary['linear']) == {'validation', 'test'}
  for name, reviews in load_splits(
      config, found.tokenizer, print, ['validation', 'test']).items():
    logits = found.ngrams.annotate(reviews).linear
    want = {'n': len(reviews), 'accuracy': pytest.approx(
        ((logits > 0) == reviews.labels).mean())}
    assert summary['linear'][name].items() >= want.items()
  line = evaluate.score_text('test', summary['linear']['test'])
  assert f'the linear model alone, on {line}' in output.splitlines()


def test_a_line_is_written_before_its_checkpoint(tmp_path, monkeypatch):
  """A kill between the two repeats the epoch and loses no line."""
  save, written = Checkpoints.save, []
  def spy(self, *args, **kwargs):
    written.append([x['step'] for x in _lines(tmp_path)])
    save(self, *args, **kwargs)
  monkeypatch.setattr(Checkpoints, 'save', spy)
  loop.train(_config(), str(tmp_path), _Terminal())
  assert written == [[7], [7, 14]]


@pytest.mark.parametrize(('rate', 'validation_loss', 'message'), [
    (1e30, 0.5, r'step 2 is not finite: loss \S+, gradient norm \S+, learning '
     r'rate 1e\+30; nothing was saved before: lower config.learning_rate'),
    (5e-3, float('nan'), 'validation loss after step 7 is nan; nothing was')])
def test_neither_loss_may_be_infinite(
    rate, validation_loss, message, tmp_path, monkeypatch):
  _script(monkeypatch, {'loss': validation_loss})
  config = _config(learning_rate=rate, warmup_epochs=0.0, schedule='constant')
  terminal = _Terminal()
  with pytest.raises(FloatingPointError, match=message):
    loop.train(config, str(tmp_path), terminal)
  assert terminal.calls[-1] == 'over'
  with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
    assert checkpoints.steps() == []
  assert _lines(tmp_path) == []


def _poison(monkeypatch, steps):
  """Makes the loss of some steps NaN."""
  def poisoned(batches, step):
    batch = batch_of(batches, step)
    if step + 1 in steps:
      batch['labels'] = np.full_like(batch['labels'], np.nan)
    return batch
  batch_of = TrainBatches.__call__
  monkeypatch.setattr(TrainBatches, '__call__', poisoned)


def test_a_step_that_is_not_finite_stops_the_run_and_is_named(
    tmp_path, monkeypatch):
  _poison(monkeypatch, [9, 10])
  with pytest.raises(FloatingPointError, match=(
      'step 9 is not finite: loss nan, gradient norm nan, learning rate 0.00'
      '.*; step 7 was saved before')):
    loop.train(_config(), str(tmp_path), _Terminal())
  with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
    assert checkpoints.steps() == [7]


def test_a_signal_saves_no_step_that_is_not_finite(tmp_path, monkeypatch):
  _poison(monkeypatch, [9])
  batch_of = TrainBatches.__call__
  def signalled(batches, step):
    if step + 1 == 10:
      os.kill(os.getpid(), signal.SIGTERM)
    return batch_of(batches, step)
  monkeypatch.setattr(TrainBatches, '__call__', signalled)
  with pytest.raises(FloatingPointError, match='step 9 is not finite'):
    loop.train(_config(), str(tmp_path), _Terminal())
  with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
    assert checkpoints.steps() == [7]


@pytest.mark.parametrize('evaluation', [3, 4])  # of an epoch; of the end
def test_a_signal_while_it_evaluates_is_seen(evaluation, tmp_path, monkeypatch):
  score, calls = evaluate.score, []
  def signalled(logits, labels):
    calls.append(len(labels))
    if len(calls) == evaluation:
      os.kill(os.getpid(), signal.SIGTERM)
    return score(logits, labels)
  monkeypatch.setattr(evaluate, 'score', signalled)
  with pytest.raises(preemption.Preempted, match='SIGTERM after step 14 of 14'):
    loop.train(_config(), str(tmp_path), _Terminal())
  assert len(calls) == evaluation
  assert not (tmp_path / 'summary.json').exists()
  with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
    assert checkpoints.steps() == [7, 14]


def test_a_kill_before_the_summary_leaves_the_calibration_as_it_will_be(
    tmp_path, monkeypatch):
  def killed(workdir, summary):
    raise KeyboardInterrupt
  with monkeypatch.context() as patch:
    patch.setattr(records, 'write_summary', killed)
    with pytest.raises(KeyboardInterrupt):
      loop.train(_config(), str(tmp_path), _Terminal())
  before = (tmp_path / 'calibration.json').read_bytes()
  summary = loop.train(_config(), str(tmp_path), _Terminal())
  assert (tmp_path / 'calibration.json').read_bytes() == before
  assert json.loads(before) == {
      'step': summary['evaluated_step'],
      'temperature': summary['calibration']['temperature']}


def test_such_steps_are_left_out_and_counted(tmp_path, monkeypatch):
  _poison(monkeypatch, [2, 3, 8, 14])
  summary = loop.train(
      _config(on_nan='skip'), str(tmp_path), _Terminal())
  first, second = (line['train'] for line in _lines(tmp_path))
  assert (first['skipped'], second['skipped']) == (2, 2)
  assert first['n'] in (99 - 32, 99 - 19)  # one batch of 7 has 3 reviews only
  assert second['n'] in (99 - 32, 99 - 19)
  assert np.isfinite(summary['test']['loss'])


def test_an_epoch_without_a_finite_step_stops_the_run(tmp_path, monkeypatch):
  _poison(monkeypatch, range(8, 15))
  with pytest.raises(FloatingPointError, match='step 8 is not finite'):
    loop.train(_config(on_nan='skip'), str(tmp_path), _Terminal())


def test_the_host_waits_for_steps_past_and_says_where_it_is(
    tmp_path, monkeypatch):
  monkeypatch.setattr(loop, 'WAIT_EVERY', 2)
  waited, to_host = [], loop.devices.to_host
  def spy(tree):
    host = to_host(tree)
    if isinstance(host, Metrics):
      waited.append(float(host.weight))
    return host
  monkeypatch.setattr(loop.devices, 'to_host', spy)
  terminal = _Terminal()
  loop.train(_config(num_epochs=1), str(tmp_path), terminal)
  assert [step for step, *_ in terminal.updates] == [4, 6, 7]
  (_, _, early, some), _, (_, means, reviews, tokens) = terminal.updates
  assert means['n'] == reviews == 99 and early in (64, 51)
  # 20 of each, at which they are cut.
  assert early < some < tokens == 20 * 99
  # Sums of steps 2 and 4, then of the whole epoch; a batch of 3 may be there.
  assert [round(x, -1) for x in waited] in (
      [30, 60, 100, 100], [20, 50, 100, 100])  # and once for the summary


@pytest.mark.parametrize('debug', [False, True])
def test_config_debug_turns_jit_off_and_stops_at_nans(
    debug, tmp_path, monkeypatch):
  seen = []
  def fake(config, workdir, terminal):
    del config, workdir, terminal
    seen.append((jax.config.jax_disable_jit, jax.config.jax_debug_nans))
    return {'seconds': 1.0}
  monkeypatch.setattr(loop, 'train', fake)
  monkeypatch.setattr(environment, 'configure', lambda size: None)
  level = logging.getLogger('absl').level
  try:
    assert main.main(['--config=configs/debug.py', f'--workdir={tmp_path}',
                      f'--config.debug={str(debug).lower()}']) == 0
  finally:
    jax.config.update('jax_disable_jit', False)
    jax.config.update('jax_debug_nans', False)
    logging.getLogger('absl').setLevel(level)
  assert seen == [(debug, debug)]


def test_a_run_that_begins_with_another_s_weights_averages_them_too(tmp_path):
  loop.train(_config(num_epochs=1), str(tmp_path / 'a'), _Terminal())
  config = _config(num_epochs=1, init_from=str(tmp_path / 'a'))
  assert config.ema_decay > 0
  summary = loop.train(config, str(tmp_path / 'b'), _Terminal())
  assert summary['step'] == 7


def test_an_epoch_of_two_passes_trains_twice_with_each_review(
    trained_on_every_input):
  whole, printed = trained_on_every_input
  assert '28 steps, 14 an epoch of 2 passes over 99 reviews;' in printed
  assert [(line['epoch'], line['step'], line['train']['n'])
          for line in _lines(whole)] == [(1, 14, 198), (2, 28, 198)]
  assert json.loads((whole / 'summary.json').read_text())['train'] == (
      _lines(whole)[-1]['train'])


@pytest.mark.parametrize('at', ['epoch 1/2', 'first step done'])
def test_a_run_of_every_input_resumes_to_the_same_bits(
    at, tmp_path, trained_on_every_input):
  """And in this process to those that another one came to."""
  config = _flags(EVERY_INPUT)
  with pytest.raises(KeyboardInterrupt):
    loop.train(config, str(tmp_path), _Terminal(interrupt_at=at))
  before = (tmp_path / 'ngrams.npz').read_bytes()
  summary = loop.train(config, str(tmp_path), _Terminal())
  whole, _ = trained_on_every_input
  want = json.loads((whole / 'summary.json').read_text())
  assert summary | {'seconds': 0} == want | {'seconds': 0}
  assert (tmp_path / 'ngrams.npz').read_bytes() == before
  assert (whole / 'ngrams.npz').read_bytes() == before
  assert _lines(tmp_path) == _lines(whole)


def test_a_run_that_begins_with_another_s_pairs_keeps_their_rows(
    tmp_path, trained_on_every_input):
  whole, _ = trained_on_every_input
  config = _flags(EVERY_INPUT)
  config.init_from, config.num_epochs = str(whole), 0
  config.data.train_split = 'train[40:110]'  # which has other pairs
  config.model.inputs = 'words+bigrams+log_odds'  # and none of its weights
  config.data.log_odds_ngrams = 50
  summary = loop.train(config, str(tmp_path), _Terminal())
  want = json.loads((whole / 'summary.json').read_text())
  # Log-odds are its own, so only the parameters are the same.
  restored = run.restore(str(whole), None)
  assert params_sha256(devices.to_host(restored.params)) == params_sha256(
      devices.to_host(run.restore(str(tmp_path), None).params))
  assert summary['parameters'] == want['parameters']
  with np.load(tmp_path / 'ngrams.npz') as ours:
    np.testing.assert_array_equal(ours['pairs'], restored.ngrams.pairs)


def test_a_run_that_begins_with_another_s_words_reads_the_same(
    tmp_path, trained_on_every_input):
  config = _flags(EVERY_INPUT)
  config.init_from, config.num_epochs = str(trained_on_every_input[0]), 0
  config.data.punctuation = not config.data.punctuation
  with pytest.raises(UserError, match='was made with config.data.punctuation='):
    loop.train(config, str(tmp_path), _Terminal())


def test_what_a_run_reads_is_read_again_where_it_is_evaluated(
    trained_on_every_input):
  whole, printed = trained_on_every_input
  assert 'pairs to embed' in printed and 'grouped 110 reviews' in printed
  for split in ('validation', 'test'):
    line = finished(run_here(
        '--mode=eval', f'--workdir={whole}', f'--split={split}')).splitlines()
    assert line[-1] in printed.splitlines()


def test_a_run_without_its_ngrams_is_refused(
    trained_on_every_input, tmp_path):
  whole, _ = trained_on_every_input
  shutil.copytree(whole, tmp_path / 'run')
  (tmp_path / 'run' / 'ngrams.npz').unlink()
  for mode in ('eval', 'predict', 'export', 'train'):
    words = EVERY_INPUT if mode == 'train' else ()
    refused = run_here(f'--mode={mode}', *words, f'--workdir={tmp_path}/run',
                       stdin=b'good')
    assert refused.returncode == 2
    assert re.fullmatch(
        r'error: cannot read \S+ngrams\.npz \(.*\): copy the run directory '
        r'again, or train again\n', refused.stderr)
