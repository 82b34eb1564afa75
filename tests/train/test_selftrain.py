"""Self-training on the command line: a teacher, its labels, their student."""

import json
import shutil

import numpy as np
import pytest
from support import data_sets
from support.command import EVERY_INPUT, finished, run_here

from flax_imdb.config import load_config, override
from flax_imdb.data import sources
from flax_imdb.terminal import Terminal
from flax_imdb.train import selftrain

pytestmark = pytest.mark.usefixtures('one_train_step')

FLAGS = (*EVERY_INPUT, '--config.data.unlabelled_split=train[500:600]',
         '--config.self_training_rounds=1')


@pytest.fixture(scope='module')
def student(tmp_path_factory):
  """A finished run directory of two rounds, and what it printed."""
  workdir = tmp_path_factory.mktemp('selftrain') / 'run'
  output = finished(run_here(
      *FLAGS, '--config.self_training_rounds=2', f'--workdir={workdir}'))
  return workdir, output


def _summary(workdir):
  return json.loads((workdir / 'summary.json').read_text())


def _labels(workdir):
  with np.load(workdir / 'pseudo_labels.npz') as f:
    return f['probabilities'], json.loads(f['about'].tobytes())


def test_each_teacher_is_a_run_directory_of_its_own(student):
  workdir, output = student
  rounds = []
  for place in (workdir, workdir / 'teacher', workdir / 'teacher' / 'teacher'):
    summary = _summary(place)
    rounds.append(summary['config']['self_training_rounds'])
    assert summary['test']['n'] == 45
    # Of the last epoch: all that have a label, its own or a teacher's.
    labelled = 99 + 100 * bool(rounds[-1])
    assert summary['train']['n'] % labelled == 0
  assert rounds == [2, 1, 0]
  # 99 reviews have labels, and 100 none, of which the first knows nothing: it
  # passes over its own twice.
  assert [_summary(place)['step'] for place in (
      workdir, workdir / 'teacher', workdir / 'teacher' / 'teacher')] == [
          26, 26, 28]
  assert not (workdir / 'teacher' / 'teacher' / 'pseudo_labels.npz').exists()
  assert output.count('labels 100 reviews') == 2


def test_the_labels_say_who_gave_them(student):
  workdir, _ = student
  probabilities, about = _labels(workdir)
  teacher = _summary(workdir / 'teacher')
  given, = about['teachers']
  assert given['run'] == f'{workdir}/teacher'
  assert given['step'] == teacher['evaluated_step']
  assert about['of']['split'] == 'train[500:600]'
  assert probabilities.shape == (100,) and probabilities.std() > 0
  first, _ = _labels(workdir / 'teacher')
  assert not np.array_equal(first, probabilities)


def test_the_labels_are_what_predict_says(student):
  workdir, _ = student
  texts, _ = sources.read_texts(
      data_sets.of('grammar_reviews'), 'train[500:600]')
  printed = finished(run_here(
      '--mode=predict', '--json', f'--workdir={workdir}/teacher',
      stdin='\n'.join(texts).encode()))
  np.testing.assert_allclose(
      _labels(workdir)[0],
      [json.loads(line)['probability'] for line in printed.splitlines()],
      rtol=1e-6)


@pytest.mark.slow
def test_the_student_learns_from_the_labels(student, tmp_path):
  """With other labels it is another one."""
  workdir, _ = student
  copy = tmp_path / 'run'
  def begun(**arrays):  # which reads the labels and teaches no more
    copy.mkdir()
    for name in 'config.json', 'labels.json', 'tokenizer.json', 'ngrams.npz':
      shutil.copy(workdir / name, copy)
    np.savez(copy / 'pseudo_labels.npz', **arrays)
  with np.load(workdir / 'pseudo_labels.npz') as f:
    arrays = dict(f)
  begun(**arrays)
  flags = (*FLAGS, '--config.self_training_rounds=2', f'--workdir={copy}')
  finished(run_here(*flags))
  want = _summary(workdir)['params_sha256']
  assert _summary(copy)['params_sha256'] == want
  assert not (copy / 'teacher').exists()
  shutil.rmtree(copy)
  begun(**arrays | {'probabilities': 1 - arrays['probabilities']})
  finished(run_here(*flags))
  assert _summary(copy)['params_sha256'] != want


class _Interrupting(Terminal):
  """Interrupts the run at a line that begins so."""

  def __init__(self, text):
    super().__init__()
    self._text = text

  def announce(self, text):
    if text.startswith(self._text):
      raise KeyboardInterrupt


@pytest.mark.parametrize('text', [
    'first step done', '{workdir}/teacher labels',
    pytest.param('evaluated', marks=pytest.mark.slow),
    pytest.param('26 steps', marks=pytest.mark.slow)],
    ids=['teacher', 'labels', 'end of teacher', 'student'])
def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(
    text, student, tmp_path):
  workdir = str(tmp_path / 'run')
  config = load_config('configs/default.py')
  for word in FLAGS[1:]:
    override(config, *word.removeprefix('--config.').split('=', 1))
  with pytest.raises(KeyboardInterrupt):
    selftrain.train(
        config, workdir, _Interrupting(text.format(workdir=workdir)))
  assert not (tmp_path / 'run' / 'summary.json').exists()
  finished(run_here(*FLAGS, f'--workdir={workdir}'))
  # With one round less, the teacher of two rounds is this run.
  assert _summary(tmp_path / 'run')['params_sha256'] == _summary(
      student[0] / 'teacher')['params_sha256']


def test_teachers_may_be_runs_that_are_there(
    trained_on_every_input, tmp_path):
  teacher, _ = trained_on_every_input
  output = finished(run_here(
      *FLAGS, f'--config.teachers={teacher},{teacher}',
      f'--workdir={tmp_path}/run'))
  assert output.count(f'{teacher} labels 100 reviews') == 2
  assert not (tmp_path / 'run' / 'teacher').exists()
  _, about = _labels(tmp_path / 'run')
  assert [given['run'] for given in about['teachers']] == [str(teacher)] * 2


@pytest.mark.parametrize(('field', 'value'), [
    ('train_split', 'train[:90]'), ('validation_by', 'rows'),
    ('validation_fraction', '0.2'), ('test_split', 'test[:40]'),
    ('text_field', 'title'), ('label_field', 'stars')])
def test_a_teacher_that_knows_other_reviews_is_refused(
    field, value, trained_on_every_input, tmp_path):
  teacher, _ = trained_on_every_input
  process = run_here(
      *FLAGS, f'--config.teachers={teacher}', f'--workdir={tmp_path}/run',
      f'--config.data.{field}={value}')
  assert process.returncode == 2
  assert (f'config.data.{field}=' in process.stderr
          and process.stderr.count('\n') == 1)
  assert not (tmp_path / 'run' / 'config.json').exists()


@pytest.mark.parametrize(('flags', 'line'), [
    (['--config.data.unlabelled_split='],
     'give --config.data.unlabelled_split'),
    (['--config.data.unlabelled_split=nothing'], 'unknown split'),
    (['--config.data.unlabelled_split=train[:110]',
      '--config.data.train_split=train[:110]'], 'give another split'),
    (['--config.teachers=nowhere'], 'nowhere is no run directory'),
    (['--config.self_training_rounds=0'], 'has no use'),
    (['--config.self_training_rounds=0', '--config.teachers=nowhere',
      '--config.data.unlabelled_split='], 'teachers=nowhere has no use')])
def test_what_is_missing_is_one_line(flags, line, tmp_path):
  process = run_here(*FLAGS, *flags, f'--workdir={tmp_path}/run')
  assert process.returncode == 2
  assert line in process.stderr and process.stderr.count('\n') == 1
  assert not (tmp_path / 'run' / 'config.json').exists()
  assert not (tmp_path / 'run' / 'teacher').exists()


def test_labels_of_a_run_that_never_began_are_no_other_s(student, tmp_path):
  """A kill may leave them; the next config may be another."""
  workdir, _ = student
  (tmp_path / 'run').mkdir()
  shutil.copy(workdir / 'pseudo_labels.npz', tmp_path / 'run')
  shutil.copytree(workdir / 'teacher', tmp_path / 'run' / 'teacher')
  process = run_here(*FLAGS, '--config.self_training_rounds=2',
                     '--config.seed=7', f'--workdir={tmp_path}/run')
  assert process.returncode == 2
  assert 'made with another config (seed: 0 there, 7 now)' in process.stderr
  assert not (tmp_path / 'run' / 'config.json').exists()
