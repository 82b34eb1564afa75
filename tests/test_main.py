"""The command line: train, resume, eval, predict; as a process where it counts.

The run that most of these look at, `trained`, is one.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from support.command import ROOT, TINY, finished, run_here, run_main

from flax_imdb import main
from flax_imdb.checkpoint import run
from flax_imdb.cluster import processes
from flax_imdb.config import packaged
from flax_imdb.inference import calibration
from flax_imdb.train import task

# One batch shape: half as much to compile, where that is what takes the time.
SHORT = (*TINY, '--config.data.max_length=20')


def _lines(workdir):
  return [json.loads(line)
          for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def _summary(workdir):
  return json.loads((workdir / 'summary.json').read_text())


def test_an_older_score_of_step_0_chooses_nothing():
  config = packaged('default')
  assert run.chosen_step(config, 0, 7) == run.chosen_step(config, None, 7) == 7
  assert run.chosen_step(config, 3, 7) == 3


@pytest.mark.parametrize('mode', ['train', 'predict'])
def test_only_what_goes_on_when_started_again_is_said_to(
    mode, monkeypatch, tmp_path):
  def interrupted(*arguments):
    raise KeyboardInterrupt
  monkeypatch.setattr(main, '_run_mode', interrupted)
  process = run_here(f'--mode={mode}', f'--workdir={tmp_path}/run')
  assert process.returncode == 130
  assert process.stderr.startswith('error: interrupted')
  assert ('goes on from what is saved: python' in process.stderr) == (
      mode == 'train')


def test_sigterm_before_there_is_a_step_is_to_be_started_again(
    monkeypatch, tmp_path):
  monkeypatch.setattr(
      task, '_labels', lambda *arguments: signal.raise_signal(signal.SIGTERM))
  process = run_here(*TINY, f'--workdir={tmp_path}/run')
  assert process.returncode == 75
  assert process.stderr == ('error: stopped by SIGTERM, with nothing new to '
                            'save: the same command goes on\n')


def test_a_run_directory_holds_what_the_docs_say(trained):
  workdir, output = trained
  names = {p.name.split('.tfevents')[0] for p in workdir.iterdir()}
  assert names == {
      'config.json', 'labels.json', 'data.json', 'tokenizer.json',
      'checkpoints', 'events.out', 'metrics.jsonl', 'calibration.json',
      'summary.json', 'MODEL_CARD.md', 'projector', 'projector_config.pbtxt'}
  summary = _summary(workdir)
  # 110 reviews, 11 validate: 99 are 7 batches of 16, the last one of 3.
  assert summary['step'] == summary['steps_total'] == 14
  assert [summary[s]['n'] for s in ('train', 'validation', 'test')] == [
      99, 11, 45]
  assert summary['best_step'] in (7, 14)
  assert re.fullmatch('[0-9a-f]{64}', summary['params_sha256'])
  assert summary['parameters'] == 2000 * 8 + 2 * 8 * 32 + 32 + 17 * 16 + 17
  assert summary['config']['model']['width'] == 8
  assert summary['seconds'] > 0
  lines = _lines(workdir)
  assert [(x['epoch'], x['step'], x['train']['n']) for x in lines] == [
      (1, 7, 99), (2, 14, 99)]
  best = max(lines, key=lambda x: -x['validation']['loss'])
  assert best['step'] == summary['best_step']
  np.testing.assert_allclose(
      best['validation']['loss'], summary['validation']['loss'], rtol=1e-6)
  for part in ('config.model.width = 8  (default 32)', 'jax 0.', '2 x cpu',
               'embed/embedding', f' {summary["parameters"]:,}\n', 'epoch 2/2',
               'reviews/s', 'batch shape compiled in'):
    assert part in output
  assert output.count('is positive, predicted') + output.count(
      'is negative, predicted') == 4


def test_a_run_is_calibrated_on_validation(trained):
  workdir, output = trained
  summary = _summary(workdir)
  found = summary['calibration']
  assert json.loads((workdir / 'calibration.json').read_text()) == {
      'step': summary['evaluated_step'], 'temperature': found['temperature']}
  assert found['validation']['loss'] < summary['validation']['loss']
  assert found['test']['loss'] != summary['test']['loss']
  assert sum(row['n'] for row in found['test']['reliability']) == 45
  right = sum(row['n'] * row['accuracy'] for row in found['test'][
      'reliability'])
  assert right / 45 == pytest.approx(summary['test']['accuracy'])
  assert calibration.text(found) in output.splitlines()


def test_examples_are_what_predict_answers(trained):
  workdir, output = trained
  examples = re.findall(
      r'^is (?:positive|negative), predicted (\w+ \S+  (.*))$', output, re.M)
  assert len(examples) == 4
  printed = finished(run_here(
      '--mode=predict', f'--workdir={workdir}',
      stdin='\n'.join(text for _, text in examples).encode()))
  assert printed.splitlines() == [line for line, _ in examples]


def test_eval_prints_the_number_of_the_summary(trained):
  workdir, output = trained
  for split in ('test', 'validation', 'train'):
    line = finished(run_here(
        '--mode=eval', f'--workdir={workdir}',
        f'--split={split}')).splitlines()[-1]
    # Of train it is news: while it trained only the steps were measured.
    assert (line in output.splitlines()) == (split != 'train')
    assert line.startswith(f'{split}: loss ')
  loss = _summary(workdir)['validation']['loss']
  assert f'validation: loss {loss:.4f}  accuracy ' in output


def test_eval_takes_the_best_the_latest_or_any_step(trained):
  workdir, _ = trained
  last, best = (finished(run_here('--mode=eval', f'--workdir={workdir}', step))
                for step in ('--step=latest', '--step=best'))
  assert '\nstep 14, ' in last
  assert f'\nstep {_summary(workdir)["best_step"]}, ' in best
  also = finished(run_here('--mode=eval', f'--workdir={workdir}', '--step=14'))
  assert also.splitlines()[-1] == last.splitlines()[-1]


def test_a_finished_run_says_so_and_evaluates_again(trained, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained[0], workdir)
  before = _summary(workdir)
  for name in ('summary.json', 'calibration.json'):
    (workdir / name).unlink()
  output = finished(run_here(*TINY, f'--workdir={workdir}'))
  assert 'already at step 14 of 14' in output
  assert _summary(workdir) == before
  assert ((workdir / 'calibration.json').read_bytes()
          == (trained[0] / 'calibration.json').read_bytes())
  assert _lines(workdir) == _lines(trained[0])


@pytest.fixture(scope='module')
def two_devices(tmp_path_factory):
  """The run directory of this process' devices."""
  workdir = tmp_path_factory.mktemp('two') / 'run'
  finished(run_here(*SHORT, f'--workdir={workdir}'))
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize(('devices', 'argv'), [
    (1, SHORT), (8, SHORT), (4, TINY)])  # and several widths
def test_any_number_of_devices_gives_the_same_run(
    devices, argv, two_devices, trained, tmp_path):
  """With dropout on; the sums' order differs, so the last digits may."""
  workdir = tmp_path / 'run'
  finished(run_main(*argv, f'--workdir={workdir}',
                    JAX_NUM_CPU_DEVICES=str(devices)))
  assert _summary(workdir)['config']['model']['pooled_dropout'] > 0
  expected = _lines(two_devices if argv == SHORT else trained[0])
  for a, b in zip(_lines(workdir), expected, strict=True):
    for split in ('train', 'validation'):
      np.testing.assert_allclose(
          a[split]['loss'], b[split]['loss'], rtol=1e-5)
      assert a[split]['accuracy'] == b[split]['accuracy']


@pytest.mark.parametrize(
    'devices', [3, pytest.param(1, marks=pytest.mark.slow),
                pytest.param(7, marks=pytest.mark.slow)])
def test_evaluates_on_other_devices_than_it_trained_on(devices, trained):
  workdir, output = trained
  line = finished(run_main(
      '--mode=eval', f'--workdir={workdir}',
      JAX_NUM_CPU_DEVICES=str(devices))).splitlines()[-1]
  assert line in output.splitlines()


def test_no_epochs_evaluate_the_initial_weights(tmp_path):
  argv = [*TINY, f'--workdir={tmp_path}', '--config.num_epochs=0']
  output = finished(run_here(*argv))
  assert _summary(tmp_path)['step'] == 0
  assert (tmp_path / 'checkpoints' / '0').is_dir()
  line = finished(run_here('--mode=eval', f'--workdir={tmp_path}'))
  assert line.splitlines()[-1] in output.splitlines()


def test_what_was_evaluated_before_it_trained_is_not_the_best(tmp_path):
  argv = [*SHORT, f'--workdir={tmp_path}', '--config.schedule=constant']
  finished(run_here(*argv, '--config.num_epochs=0'))
  assert _summary(tmp_path)['best_step'] is None
  finished(run_here(*argv, '--config.num_epochs=1'))
  summary = _summary(tmp_path)
  assert summary['best_step'] == summary['evaluated_step'] == 7


def test_early_stopping_stops_and_stays_stopped(tmp_path):
  # A rate of nearly 0 improves nothing by 0.5 nats.
  argv = [*SHORT, f'--workdir={tmp_path}', '--config.num_epochs=9',
          '--config.learning_rate=1e-9', '--config.early_stopping.patience=2',
          '--config.early_stopping.min_delta=0.5']
  finished(run_here(*argv))
  summary = _summary(tmp_path)
  assert summary['step'] == 3 * 7 and summary['steps_total'] == 9 * 7
  assert summary['stopped_epoch'] == 3
  assert summary['best_step'] == summary['evaluated_step']
  assert 'already at step 21 of 63, stopped early' in finished(run_here(*argv))


def test_a_resumed_run_may_go_on_for_longer_and_is_else_the_same(tmp_path):
  argv = [*SHORT, f'--workdir={tmp_path}', '--config.schedule=constant']
  changed = ['--config.num_epochs=3', '--config.early_stopping.patience=2',
             '--config.show_examples=1']
  finished(run_here(*argv))
  saved = json.loads((tmp_path / 'config.json').read_text())
  output = finished(run_here(*argv, *changed))
  assert 'resuming from step 14 of 21' in output
  assert output.count('predicted') == 1
  # It is then the run with the new fields, for all that open it.
  now = json.loads((tmp_path / 'config.json').read_text())
  assert now['num_epochs'] == 3 and now['early_stopping']['patience'] == 2
  saved |= {'num_epochs': 3, 'show_examples': 1}
  saved['early_stopping']['patience'] = 2
  assert now == saved
  whole = tmp_path / 'whole'
  finished(run_here(*argv, *changed, f'--workdir={whole}'))
  assert ((tmp_path / 'metrics.jsonl').read_text()
          == (whole / 'metrics.jsonl').read_text())
  assert (_summary(tmp_path)['params_sha256']
          == _summary(whole)['params_sha256'])


def test_a_run_goes_on_with_the_reviews_alone_that_it_began_with(tmp_path):
  file = tmp_path / 'reviews.csv'
  argv = ['--config=configs/texts.py', '--config.num_epochs=1',
          f'--config.data.train_file={file}', '--config.model.inputs=words',
          '--config.model.width=4', '--config.min_steps_per_epoch=1',
          f'--workdir={tmp_path}/run']
  def write(n):
    file.write_text('text,label\n' + ''.join(
        f'film number {i} is {"good" if i % 2 else "bad"},{i % 2}\n'
        for i in range(n)))
  write(100)
  finished(run_here(*argv))
  assert 'already at' in finished(run_here(*argv))
  before = _lines(tmp_path / 'run')
  write(120)
  process = run_here(*argv)
  assert process.returncode == 2
  assert 'run began with other reviews (train, validation): give' in (
      process.stderr)
  assert _lines(tmp_path / 'run') == before
  (tmp_path / 'run' / 'data.json').unlink()  # as of an older run
  assert 'already at' in finished(run_here(*argv))


def test_with_more_patience_a_stopped_run_goes_on(tmp_path):
  argv = [*SHORT, f'--workdir={tmp_path}', '--config.schedule=constant',
          '--config.learning_rate=1e-9', '--config.early_stopping.min_delta=9']
  finished(run_here(*argv, '--config.early_stopping.patience=1',
                    '--config.num_epochs=3'))
  assert _summary(tmp_path)['stopped_epoch'] == 2
  output = finished(run_here(
      *argv, '--config.early_stopping.patience=2', '--config.num_epochs=3'))
  assert 'resuming from step 14 of 21\n' in output
  assert _summary(tmp_path)['step'] == 21


def test_a_schedule_that_ends_with_the_run_keeps_its_epochs(tmp_path):
  argv = [*SHORT, f'--workdir={tmp_path}', '--config.schedule=cosine']
  finished(run_here(*argv, '--config.num_epochs=1'))
  process = run_here(*argv, '--config.num_epochs=2')
  assert process.returncode == 2
  assert 'another config (num_epochs: 1 there, 2 now)' in process.stderr


def test_without_validation_all_reviews_train_and_the_last_weights_count(
    tmp_path):
  argv = [*SHORT, f'--workdir={tmp_path}',
          '--config.data.validation_fraction=0']
  output = finished(run_here(*argv))
  summary = _summary(tmp_path)
  assert summary['train']['n'] == 110 and 'validation' not in summary
  assert summary['best_step'] is None
  assert 'calibration' not in summary and 'calibrated' not in output
  assert not (tmp_path / 'calibration.json').exists()
  assert summary['evaluated_step'] == summary['step'] == 14
  assert [set(line) for line in _lines(tmp_path)] == 2 * [
      {'epoch', 'step', 'train'}]
  line = finished(run_here('--mode=eval', f'--workdir={tmp_path}'))
  assert line.splitlines()[-1] in output.splitlines()
  process = run_here('--mode=eval', f'--workdir={tmp_path}', '--step=best')
  assert process.returncode == 2 and 'has no best step' in process.stderr
  assert 'already at step 14 of 14' in finished(run_here(*argv))


def test_debug_may_be_turned_on_to_look_at_a_run(trained):
  workdir, output = trained
  try:
    line = finished(run_here('--mode=eval', f'--workdir={workdir}',
                             '--config.debug=true')).splitlines()[-1]
    assert jax.config.jax_disable_jit
  finally:
    jax.config.update('jax_disable_jit', False)
    jax.config.update('jax_debug_nans', False)
  assert line in output.splitlines()
  assert not json.loads((workdir / 'config.json').read_text())['debug']


@pytest.mark.slow  # an operation at a time is 500 programs to compile
def test_debug_config_runs_without_jit(tmp_path, monkeypatch):
  """In the default directory for runs, below the working directory."""
  monkeypatch.chdir(tmp_path)
  try:
    output = finished(run_here('--config=configs/debug.py'))
    assert jax.config.jax_disable_jit
  finally:
    jax.config.update('jax_disable_jit', False)
    jax.config.update('jax_debug_nans', False)
  assert 'epoch 1/1' in output and (tmp_path / 'runs' / 'debug').is_dir()


def test_prepare_makes_the_cache_that_train_reads(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  argv = [*TINY, '--mode=prepare']
  first = finished(run_here(*argv))
  assert 'prepared grammar_reviews' in first and 'encoded' in first
  again = finished(run_here(*argv))
  assert again == 'train: 99 reviews are ready\ntest: 45 reviews are ready\n'


def test_quiet_prints_nothing_but_why_it_failed(trained, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained[0], workdir)
  argv = [*TINY, f'--workdir={workdir}', '--quiet']
  done = run_main(*argv)
  assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
  failed = run_main(*argv, '--config.seed=7')
  assert (failed.returncode, failed.stdout) == (2, '')
  assert failed.stderr.count('\n') == 1 and 'another config' in failed.stderr
  refused = run_here('--mode=predict', '--quiet', 'good')
  assert refused.returncode == 2 and '--quiet is for' in refused.stderr


def test_a_run_that_is_no_terminal_s_ends_with_its_lines_and_what_to_type(
    trained):
  workdir, output = trained
  for line in ('validation: loss ', 'test: loss ', 'next:\n'):
    assert output.count(f'\n{line}') == 1
  assert '━' not in output and '\x1b' not in output
  seconds = _summary(workdir)['seconds']
  _, end = output.split(f'\n{seconds:.1f} s of training; the run lies in ')
  assert end.splitlines() == [f'{workdir}', 'next:', *(
      f'  python -m flax_imdb.main --mode={mode} --workdir={workdir}{text}'
      for mode, text in (('predict', " 'Not bad at all.'"), ('report', ''),
                         ('serve', '')))]


def test_any_text_is_printed_where_the_terminal_is_not_of_utf_8(trained):
  argv = ['--mode=predict', f'--workdir={trained[0]}']
  text = 'caf\u00e9 \U0001f600'
  plain = finished(run_main(
      *argv, stdin=text.encode(), PYTHONIOENCODING='ascii'))
  assert plain.endswith('  caf\\xe9 \\U0001f600  (only unknown words)\n')
  as_json = finished(run_main(
      *argv, '--json', stdin=text.encode(), PYTHONIOENCODING='ascii'))
  assert json.loads(as_json)['text'] == text


def test_predict_reads_words_a_file_or_standard_input(trained, tmp_path):
  workdir, _ = trained
  argv = ['--mode=predict', f'--workdir={workdir}']
  review = "I can't say I was bored."
  words = finished(run_here(*argv, *review.split()))
  assert re.fullmatch(
      rf'(positive|negative) [01]\.\d{{3}}  {re.escape(review)}\n', words)
  file = tmp_path / 'reviews.txt'
  file.write_text(f'{review}\n\nzzyzx qwrtp\nthe film\u2019s caf\u00e9\n')
  lines = finished(run_here(*argv, f'--input={file}')).splitlines()
  assert lines[0] == words.strip()
  assert len(lines) == 4
  assert lines[1].endswith('(no words)')
  assert lines[2].endswith('zzyzx qwrtp  (only unknown words)')
  piped = finished(run_here(*argv, '--json', stdin=file.read_bytes()))
  objects = [json.loads(line) for line in piped.splitlines()]
  assert [x['text'] for x in objects] == file.read_text().splitlines()
  for line, x in zip(lines, objects, strict=True):
    assert line.startswith(f'{x["label"]} {x["probability"]:.3f}')
    assert (x['label'] == 'positive') == (x['probability'] > 0.5)


def _modules(process):
  """The modules that -X importtime saw."""
  return {line.rsplit('|', 1)[1].strip()
          for line in process.stderr.decode().splitlines()
          if line.startswith('import time:') and '|' in line}


@pytest.mark.slow  # in tests/data a shorter one is not
def test_tensorflow_is_never_imported(trained, tmp_path):
  argv = [sys.executable, '-X', 'importtime', '-m', 'flax_imdb.main', *TINY,
          f'--workdir={tmp_path}']  # the config of `trained`: compiled already
  env = os.environ | {'XDG_CACHE_HOME': str(tmp_path / 'cache')}
  process = subprocess.run(
      argv, cwd=ROOT, env=env, capture_output=True, check=True, timeout=300)
  modules = _modules(process)
  assert 'tensorflow_datasets' in modules  # it prepared the data
  assert not {m for m in modules if m.split('.')[0] == 'tensorflow'}


def test_a_warm_start_imports_no_tfds(trained, tmp_path):
  shutil.copytree(trained[0], tmp_path / 'run')
  process = subprocess.run(
      [sys.executable, '-X', 'importtime', '-m', 'flax_imdb.main',
       '--mode=eval', f'--workdir={tmp_path}/run'],
      cwd=ROOT, capture_output=True, check=True, timeout=300)
  assert 'tensorflow_datasets' not in _modules(process)


@pytest.mark.parametrize(('argv', 'terminal', 'watched'), [
    (['--mode=train'], False, True), (['--mode=eval'], False, True),
    (['--mode=train'], True, False), (['--config.debug=true'], False, False),
    (['--mode=predict', 'good'], False, False)])
def test_a_hang_is_looked_for_where_no_person_would_see_it(
    argv, terminal, watched, monkeypatch):
  """Nor make it, with Ctrl-S, in a debugger or by writing slowly."""
  seen = []
  monkeypatch.setattr(main, '_start_jax', lambda args, config: None)
  monkeypatch.setattr(main, '_run_mode', lambda args, config, terminal: (
      seen.append(processes._watchdog is not None)))
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal, raising=False)
  assert main.main(argv) == 0
  assert seen == [watched] and processes._watchdog is None


def test_where_there_is_no_fcntl_one_line_says_so():
  """As on Windows; whichever module asks for it first."""
  program = ('import runpy, sys; sys.modules["fcntl"] = None; '
             'runpy.run_module("flax_imdb.main", run_name="__main__")')
  process = subprocess.run(
      [sys.executable, '-W', 'error', '-c', program, '--help'], cwd=ROOT,
      capture_output=True, text=True, check=False, timeout=60)
  assert (process.returncode, process.stdout) == (2, '')
  assert process.stderr == ('error: Windows is not supported: use Linux, macOS '
                            'or, on Windows, WSL\n')


def test_a_wheel_finds_its_configs_from_anywhere(tmp_path):
  subprocess.run(
      [sys.executable, '-m', 'pip', 'wheel', str(ROOT), '--no-deps', '-q',
       '--no-build-isolation', '-w', str(tmp_path)], check=True, timeout=300)
  wheel, = tmp_path.glob('*.whl')
  site = tmp_path / 'site'
  with zipfile.ZipFile(wheel) as archive:  # all that pip does with it
    archive.extractall(site)
  (site / 'configs').mkdir()  # of another package, which is not to be run
  for name in ('default.py', 'quickstart.py', 'another.py'):
    (site / 'configs' / name).write_text('raise SystemExit(99)')
  program = ('import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); '
             'runpy.run_module("flax_imdb.main", run_name="__main__")')
  process = subprocess.run(
      [sys.executable, '-c', program, str(site), *TINY, '--mode=prepare'],
      cwd=tmp_path, capture_output=True, check=False, timeout=300)
  assert process.returncode == 0, process.stderr
  assert b'99 reviews are ready' in process.stdout
  assert pathlib.Path(site, 'flax_imdb', 'configs', 'default.py').exists()
  process = subprocess.run(
      [sys.executable, '-c', program, str(site), '--config=configs/another.py'],
      cwd=tmp_path, capture_output=True, check=False, timeout=300)
  assert process.returncode == 2
  assert b'error: config file configs/another.py not found' in process.stderr
  assert pathlib.Path(site, 'flax_imdb', 'data', 'grammar.toml').exists()
  page = pathlib.Path('flax_imdb', 'inference', 'page')
  assert {file.name for file in (ROOT / page).iterdir()} == {
      file.name for file in (site / page).iterdir()} >= {'index.html'}
