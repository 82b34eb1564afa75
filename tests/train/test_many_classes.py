"""Four classes on the command line: trained, evaluated, served, resumed."""

import html
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support import data_sets
from support.command import EVERY_INPUT, ROOT, finished, run_here, run_main

from flax_imdb.config import read_config
from flax_imdb.data import reviews, sources
from flax_imdb.data.tokenizer import load_tokenizer
from flax_imdb.errors import UserError
from flax_imdb.train import task

FLAGS = (*EVERY_INPUT, '--config.data.name=topics',
         '--config.schedule=constant', '--config.data.test_split=test')
TEXTS = ['goal match', 'bank the profit', 'new robot and software chip',
         'treaty', '', 'zzyzx', *('the team ' * n + 'vote' for n in range(20))]


@pytest.fixture(scope='module', autouse=True)
def prepared(tmp_path_factory):
  """The directory of tfds in which the set is."""
  folder = tmp_path_factory.mktemp('tfds')
  data_sets.make_topics(folder)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TFDS_DATA_DIR', str(folder))
    yield folder


@pytest.fixture(scope='module')
def trained(prepared, tmp_path_factory):
  """(run directory of two epochs, what it printed)."""
  workdir = tmp_path_factory.mktemp('classes') / 'run'
  return workdir, finished(run_main(*FLAGS, f'--workdir={workdir}'))


def _summary(workdir):
  return json.loads((workdir / 'summary.json').read_text())


def _predicted(workdir, *flags):
  printed = finished(run_here(
      '--mode=predict', f'--workdir={workdir}', *flags,
      stdin='\n'.join(TEXTS).encode()))
  return printed.splitlines()


def test_it_learns_and_says_of_each_class_how_well(trained):
  workdir, output = trained
  assert json.loads((workdir / 'labels.json').read_text()) == [
      *data_sets.TOPICS]
  summary = _summary(workdir)
  assert summary['test']['accuracy'] > 0.8  # by chance 0.4
  for split in ('validation', 'test'):
    found = summary[split]
    confusion = np.array(found['confusion'])
    assert confusion.shape == (4, 4) and confusion.sum() == found['n']
    assert list(found['classes']) == [*data_sets.TOPICS]
    assert [x['support'] for x in found['classes'].values()] == confusion.sum(
        axis=1).tolist()
    assert np.trace(confusion) / found['n'] == found['accuracy']
    f1 = [x['f1'] for x in found['classes'].values()]
    assert found['macro_f1'] == pytest.approx(np.mean(f1))
  assert f'macro F1 {summary["test"]["macro_f1"]:.4f}\n' in output
  assert all(f'\n  {name}' in output for name in data_sets.TOPICS)
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  assert 'macro_f1' in json.loads(lines[-1])['validation']


def test_it_is_evaluated_to_the_same(trained):
  workdir, output = trained
  printed = finished(run_here('--mode=eval', f'--workdir={workdir}'))
  table = printed[printed.index('test: loss'):]
  assert len(table.splitlines()) == 7 and table in output


def test_predictions_speak_its_names(trained):
  workdir, _ = trained
  predictions = [json.loads(x) for x in _predicted(workdir, '--json')]
  assert [p['label'] for p in predictions[:4]] == [*data_sets.TOPICS]
  for p, text in zip(predictions, TEXTS, strict=True):
    assert p['text'] == text and list(p['probabilities']) == [*data_sets.TOPICS]
    assert sum(p['probabilities'].values()) == pytest.approx(1)
    assert p['probability'] == p['probabilities'][p['label']] == max(
        p['probabilities'].values())
  first, *_ = _predicted(workdir)
  assert first.startswith('Sport ') and first.endswith('  goal match')


def test_an_explanation_is_of_the_class_that_is_predicted(trained):
  workdir, _ = trained
  for line in _predicted(workdir, '--json', '--explain'):
    prediction = json.loads(line)
    # The logit of the largest: from it and the others come the probabilities.
    logit = prediction['baseline'] + sum(w[2] for w in prediction['words'])
    assert abs(prediction['gap']) < 0.02
    own = {prediction['text'][begin:end]: score
           for begin, end, score in prediction['words']}
    if prediction['text'] == 'goal match':
      assert prediction['label'] == 'Sport'
      assert logit > prediction['baseline'] and max(own.values()) > 0


def test_an_export_answers_as_predict_does(trained, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained[0], workdir)
  finished(run_here('--mode=export', f'--workdir={workdir}'))
  about = json.loads((workdir / 'export' / 'model.json').read_text())
  assert about['labels'] == [*data_sets.TOPICS] and 'threshold' not in about
  env = {k: v for k, v in os.environ.items() if not k.startswith(
      ('JAX_', 'XLA_', 'NPROC', 'PYTHONPATH', 'XDG_'))}
  served = subprocess.run(
      [sys.executable, str(ROOT / 'examples' / 'serve_export.py'),
       str(workdir / 'export')], env=env | {'JAX_PLATFORMS': 'cpu'},
      cwd=workdir, input='\n'.join(TEXTS).encode() + b'\n', check=True,
      capture_output=True, timeout=300).stdout.decode().splitlines()
  want = [json.loads(x) for x in _predicted(workdir, '--json')]
  for prediction in want:
    prediction.pop('note', None)
  assert [json.loads(x) for x in served] == want
  assert len({p['probability'] for p in want}) > 15


def test_it_resumes_to_the_same_bits(trained, tmp_path):
  workdir = f'--workdir={tmp_path}'
  finished(run_here(*FLAGS, '--config.num_epochs=1', workdir))
  assert 'resuming from step' in finished(run_here(*FLAGS, workdir))
  a, b = _summary(tmp_path), _summary(trained[0])
  assert a | {'seconds': 0} == b | {'seconds': 0}
  assert (tmp_path / 'metrics.jsonl').read_bytes() == (
      trained[0] / 'metrics.jsonl').read_bytes()


def test_every_term_of_the_loss_and_a_teacher(tmp_path, monkeypatch):
  given_weights, make = [], task.make_train_step
  monkeypatch.setattr(task, 'make_train_step', lambda *args, class_weights: (
      given_weights.append(class_weights),
      make(*args, class_weights=class_weights))[1])
  output = finished(run_here(
      *FLAGS, '--config.num_epochs=1', '--config.model.members=2',
      '--config.data.unlabelled_split=test[:40]',
      '--config.self_training_rounds=1', '--config.entropy_weight=0.3',
      '--config.virtual_adversarial_norm=0.5', '--config.label_smoothing=0.1',
      '--config.class_weights=balanced',
      '--config.early_stopping.monitor=macro_f1',
      '--config.early_stopping.patience=2', f'--workdir={tmp_path}'))
  assert f'{tmp_path}/teacher labels 40 reviews, ' in output
  with np.load(tmp_path / 'pseudo_labels.npz') as f:
    given = f['probabilities']
  assert given.shape == (40, 4) and given.dtype == np.float32
  np.testing.assert_allclose(given.sum(axis=1), 1, atol=1e-6)
  _, labels = sources.read_texts(data_sets.of('topics'), 'test[:40]')
  assert (given.argmax(axis=1) == labels).mean() > 0.6
  # Two passes over those with labels and those that the teacher labelled.
  assert _summary(tmp_path)['train']['n'] == 2 * (99 + 40)
  # The teacher's and the student's; the first class has the most reviews.
  assert len(given_weights) == 2
  assert all(w.shape == (4,) and w[0] == w.min() < 1 < w.max()
             for w in given_weights)


def test_other_classes_are_another_run(trained, prepared, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained[0], workdir)
  (workdir / 'labels.json').write_text('["a", "b", "c", "d"]')
  process = run_here(*FLAGS, f'--workdir={workdir}')
  assert process.returncode == 2
  assert 'was made with other classes (4 there, 4 now' in process.stderr


def test_a_teacher_of_other_classes_is_refused(trained, tmp_path):
  teacher = tmp_path / 'teacher'
  shutil.copytree(trained[0], teacher)
  (teacher / 'labels.json').write_text('["a", "b", "c", "d"]')
  process = run_here(
      *FLAGS, '--config.data.unlabelled_split=test[:40]',
      '--config.self_training_rounds=1', f'--config.teachers={teacher}',
      f'--workdir={tmp_path}/run')
  assert process.returncode == 2
  assert 'knows other classes than this run' in process.stderr
  assert not (tmp_path / 'run' / 'pseudo_labels.npz').exists()


def test_a_model_of_fewer_classes_has_no_place_for_it(trained, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained[0], workdir)
  (workdir / 'labels.json').unlink()  # as if it knew two
  process = run_here('--mode=predict', f'--workdir={workdir}', 'goal')
  assert process.returncode == 2 and process.stderr.count('\n') == 1
  assert 'of shape' in process.stderr


def test_labels_beyond_the_classes_are_refused(trained, monkeypatch):
  config = read_config(trained[0] / 'config.json')
  tokenizer = load_tokenizer(trained[0] / 'tokenizer.json',
                             config.data.vocab_size)
  said = []
  with pytest.raises(UserError, match='has a label 3, and there are 3 classes'):
    reviews.load_splits(config, tokenizer, said.append, ['test'], 3)
  assert 'is damaged' in said[0]  # what was cached
  found = reviews.load_splits(config, tokenizer, said.append, ['test'], 4)
  assert found['test'].labels.max() == 3


def test_its_report_has_each_class_against_the_others(trained, tmp_path):
  shutil.copytree(trained[0], tmp_path / 'run')
  finished(run_here('--mode=report', f'--workdir={tmp_path}/run'))
  page = (tmp_path / 'run' / 'report' / 'index.html').read_text('utf-8')
  curves = re.search(r'aria-label="ROC curve.*?</svg>', page, re.DOTALL)[0]
  matrix = re.search(r'aria-label="Confusion.*?</svg>', page, re.DOTALL)[0]
  for name in data_sets.TOPICS:
    assert f'>{html.escape(name)}</text>' in curves
    assert f'>{html.escape(name)}</text>' in matrix
    assert f'<th scope="row">{html.escape(name)}</th>' in page
  assert 'to tell the 4 classes of topics apart' in page
  assert 'speaks for what is predicted, one' in page
