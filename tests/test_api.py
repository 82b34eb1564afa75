"""The package from Python, in processes of its own, as a program uses it."""

import json
import subprocess
import sys

import pytest
from support.command import ROOT, TINY, environ, finished, run_here

import flax_imdb
from flax_imdb.errors import UserError


def _python(program, cwd, *arguments):
  return subprocess.run(
      [sys.executable, '-W', 'error::DeprecationWarning', '-c', program,
       *arguments], cwd=cwd, env=environ(PYTHONPATH=str(ROOT)),
      capture_output=True, text=True, timeout=300, check=False)


def test_importing_it_starts_nothing(tmp_path):
  process = _python(
      'import sys, flax_imdb\n'
      'heavy = {"jax", "numpy", "flax", "ml_collections"} & {*sys.modules}\n'
      'assert not heavy, heavy; print(flax_imdb.__version__)', tmp_path)
  assert process.returncode == 0, process.stderr


def test_a_run_is_trained_and_opened(tmp_path):
  """From another directory, with the same bits as the command's."""
  fields = [flag.removeprefix('--config.').split('=') for flag in TINY[1:]]
  program = f'''
import json, flax_imdb
from flax_imdb.config import override
config = flax_imdb.load_config('configs/quickstart.py')
for field, value in {fields}:
  override(config, field, value)
summary = flax_imdb.train(config, 'mine', quiet=True)
assert flax_imdb.train(config, 'mine', quiet=True) == summary  # it has ended
run = flax_imdb.load('mine')
print(json.dumps([summary['params_sha256'], summary['test'], run.step,
                  run.labels, run.evaluate(), run.predict(['A good film.', '']),
                  run.history]))
assert run.summary == summary
'''
  process = _python(program, tmp_path)
  assert process.returncode == 0, process.stderr
  assert 'Warning' not in process.stderr and 'jax was' not in process.stderr
  sha256, test, step, labels, evaluated, predictions, history = json.loads(
      process.stdout)
  finished(run_here(*TINY, f'--workdir={tmp_path}/command'))
  summary = json.loads((tmp_path / 'command' / 'summary.json').read_text())
  assert sha256 == summary['params_sha256'] and test == summary['test']
  assert step == summary['evaluated_step']
  assert test.items() >= evaluated.items() and evaluated['n'] == 45
  assert labels == ['negative', 'positive']
  lines = finished(run_here(
      '--mode=predict', '--json', f'--workdir={tmp_path}/command',
      stdin=b'A good film.\n\n')).splitlines()
  assert predictions == [json.loads(line) for line in lines]
  lines = (tmp_path / 'command' / 'metrics.jsonl').read_text().splitlines()
  assert history == [json.loads(line) for line in lines]
  assert [line['epoch'] for line in history] == [1, 2]


def test_a_setting_that_comes_too_late_is_told(trained, tmp_path):
  program = ('import sys, jax, flax_imdb; '
             'flax_imdb.load(sys.argv[1]).predict(["x"])')
  process = _python(program, tmp_path, str(trained[0]))
  assert process.returncode == 0, process.stderr
  assert 'jax was imported before flax_imdb could set' in process.stderr
  assert 'NPROC' in process.stderr  # the others are the tests' own


@pytest.mark.parametrize(('name', 'says'), [
    ('none', 'is no run directory'), (300 * 'x', 'File name too long')])
def test_what_is_no_run_is_one_error(name, says, tmp_path):
  process = _python(
      'import sys, flax_imdb; flax_imdb.load(sys.argv[1])', tmp_path, name)
  assert process.returncode == 1
  assert 'UserError' in process.stderr.splitlines()[-1]
  assert says in process.stderr


def test_what_is_no_list_of_texts_or_no_split_is_a_mistake(trained):
  opened = flax_imdb.load(str(trained[0]))
  assert opened.predict([]) == opened.explain([]) == []
  with pytest.raises(UserError, match='give a list'):
    opened.predict('Not bad at all.')
  with pytest.raises(UserError, match="'dev' is none of train, validation, te"):
    opened.evaluate('dev')
