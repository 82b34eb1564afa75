"""Other services are told what TensorBoard is, and can't end a run.

The packages are played: what the real ones hold was looked at by hand.
"""

import json
import sys
import threading

import pytest
from support.command import TINY, finished, run_here, run_main

from flax_imdb.checkpoint import run
from flax_imdb.config import load_config
from flax_imdb.errors import UserError
from flax_imdb.train import loggers

# Both note each call in a file; a call that $FAILS names raises.
_PLAYED = '''
import json, os
def note(*what):
  with open(os.environ["NOTES"], "a") as f:
    f.write(json.dumps(what) + "\\n")
  if what[0] == os.environ.get("FAILS"):
    raise RuntimeError("no\\nroute to host")
'''
_WANDB = _PLAYED + '''
class Settings:
  def __init__(self, **fields): pass
class Run:
  class summary:
    update = staticmethod(lambda values: note("summary", values))
  def log(self, values, step): note("log", step, values)
  def finish(self, exit_code): note("finish", exit_code)
def init(id, project, name, resume, dir, config, settings):
  note("init", id, project, name, resume, dir, config["model"]["width"])
  return Run()
'''
_MLFLOW = _PLAYED + '''
from types import SimpleNamespace as N
from mlflow import entities
class MlflowClient:
  def __init__(self): self.metrics = {}
  def get_experiment_by_name(self, name): return None
  def create_experiment(self, name): note("experiment", name); return "7"
  def create_run(self, experiment, run_name):
    note("run", experiment, run_name)
    return N(info=N(run_id="abc"))
  def update_run(self, run, status): note("update", run, status)
  def log_batch(self, run, params=(), metrics=()):
    for x in metrics: note("metric", run, x[3], x[0], x[1])
    for x in params: note("param", x[0], x[1])
  def get_run(self, run):
    with open(os.environ["NOTES"]) as f:
      notes = [json.loads(line) for line in f]
    return N(data=N(metrics={x[3]: x[4] for x in notes if x[0] == "metric"}))
  def set_terminated(self, run, status): note("end", run, status)
'''


@pytest.fixture
def notes(tmp_path, monkeypatch):
  """Both packages are there; returns what was noted so far."""
  folder = tmp_path / 'packages'
  (folder / 'mlflow').mkdir(parents=True)
  (folder / 'wandb.py').write_text(_WANDB)
  (folder / 'mlflow' / '__init__.py').write_text(_MLFLOW)
  (folder / 'mlflow' / 'entities.py').write_text(
      'Metric = Param = lambda *values: values')
  (folder / 'mlflow' / 'exceptions.py').write_text(
      'class MlflowException(Exception): pass')
  path = tmp_path / 'notes'
  path.touch()
  monkeypatch.setenv('NOTES', str(path))
  monkeypatch.delenv('WANDB_DIR', raising=False)
  monkeypatch.syspath_prepend(folder)
  yield lambda: [json.loads(line) for line in path.read_text().splitlines()]
  for name in [x for x in sys.modules if x.split('.')[0] in (
      'wandb', 'mlflow')]:
    del sys.modules[name]


def _config(names):
  config = load_config('configs/default.py')
  config.loggers = names
  return config


def _told(config, tmp_path, lines):
  return loggers.told(config, str(tmp_path / 'run'), lines.append)


def test_a_package_that_is_not_there_is_told_before_anything_is(
    trained, tmp_path, monkeypatch):
  monkeypatch.setattr(loggers.importlib.util, 'find_spec', lambda name: None)
  process = run_here(*TINY, '--config.loggers=mlflow', f'--workdir={tmp_path}')
  assert process.returncode == 2
  assert process.stderr == (
      'error: config.loggers=mlflow needs mlflow: pip install mlflow, or leave '
      'it out\n')
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_nothing_of_them_is_imported_unless_it_is_asked_for(notes, tmp_path):
  for name in 'wandb.py', 'mlflow/__init__.py':
    (tmp_path / 'packages' / name).write_text('raise SystemExit(9)')
  finished(run_main(*TINY, '--config.num_epochs=1', f'--workdir={tmp_path}/r',
                    PYTHONPATH=f'{tmp_path}/packages:{sys.path[1]}'))


def test_a_run_tells_both_what_it_tells_tensorboard(notes, trained, tmp_path):
  workdir = tmp_path / 'run'
  output = finished(run_here(
      *TINY, '--config.loggers=wandb,mlflow', f'--workdir={workdir}'))
  assert 'warning' not in output
  said = notes()
  ids = json.loads((workdir / 'loggers.json').read_text())
  assert ids['mlflow'] == 'abc'
  init, = [x for x in said if x[0] == 'init']
  assert init[1:] == [ids['wandb'], 'flax_imdb', 'run', 'allow', str(workdir),
                      8]
  lines = [json.loads(x) for x in
           (workdir / 'metrics.jsonl').read_text().splitlines()]
  logged = [x for x in said if x[0] == 'log']
  assert [step for _, step, _ in logged] == [7, 14]
  for line, (_, _, values) in zip(lines, logged, strict=True):
    assert values['train/loss'] == line['train']['loss']
    assert values['validation/accuracy'] == line['validation']['accuracy']
    assert values['reviews_per_second'] > 0 and 'step' not in values
  metrics = {(step, tag): value for kind, _, step, tag, value in (
      x for x in said if x[0] == 'metric')}
  for _, step, values in logged:
    assert values.items() <= {
        tag: x for (own, tag), x in metrics.items() if own == step}.items()
  summary = json.loads((workdir / 'summary.json').read_text())
  (_, final), = [x for x in said if x[0] == 'summary']
  assert final['final/test/accuracy'] == summary['test']['accuracy']
  assert ['param', 'model.width', '8'] in said
  assert ['finish', 0] in said and ['end', 'abc', 'FINISHED'] in said
  # The same bits as without.
  for name in 'metrics.jsonl', 'calibration.json':
    assert (workdir / name).read_bytes() == (trained[0] / name).read_bytes()

  # Started again: the same runs, and no number twice.
  finished(run_here(
      *TINY, '--config.loggers=mlflow,wandb', f'--workdir={workdir}'))
  again = notes()[len(said):]
  assert ['update', 'abc', 'RUNNING'] in again
  assert {x[1] for x in again if x[0] == 'init'} == {ids['wandb']}
  assert not [x for x in again if x[0] in ('log', 'metric', 'run', 'param')]
  assert json.loads((workdir / 'loggers.json').read_text()) == ids

  # And with none: what is told of a run is not what it is.
  finished(run_here(*TINY, f'--workdir={workdir}'))


@pytest.mark.parametrize('fails', ['log', 'metric', 'summary', 'end'])
def test_one_that_fails_is_one_line_and_the_other_goes_on(
    fails, notes, tmp_path, monkeypatch):
  (tmp_path / 'run').mkdir()
  lines = []
  monkeypatch.setenv('FAILS', fails)
  with _told(_config('wandb,mlflow'), tmp_path, lines) as told:
    for step in 7, 14:
      told.log(step, {'train/loss': 0.5})
    told.log_results(14, {'final/test/loss': 0.5})
  bad = 'mlflow' if fails in ('metric', 'end') else 'wandb'
  assert lines == [
      f'warning: {bad} is told no more of this run (RuntimeError: no route to '
      'host), which goes on']
  said = notes()
  other = {'wandb': ['end', 'abc', 'FINISHED'], 'mlflow': ['finish', 0]}[bad]
  assert said[-1] == other or other in said
  assert [x[0] for x in said].count(fails) == 1  # it is asked no more


def test_one_that_never_answers_is_not_waited_for(
    notes, tmp_path, monkeypatch):
  (tmp_path / 'run').mkdir()
  monkeypatch.setattr(loggers, '_SECONDS', 0.2)
  answered, lines = threading.Event(), []
  with _told(_config('wandb'), tmp_path, lines) as told:
    import wandb
    wandb.Run.log = lambda *args, **kwargs: answered.wait()
    told.log(7, {'train/loss': 0.5})
    told.log(14, {'train/loss': 0.4})  # training goes on
  assert lines == ['warning: wandb is told no more of this run (it took more '
                   'than 0 s to answer), which goes on']
  answered.set()


def test_a_run_that_is_stopped_says_so(notes, tmp_path):
  (tmp_path / 'run').mkdir()
  with pytest.raises(KeyboardInterrupt):
    with _told(_config('wandb,mlflow'), tmp_path, []):
      raise KeyboardInterrupt
  assert ['finish', 1] in notes() and ['end', 'abc', 'KILLED'] in notes()


def test_one_that_can_not_start_is_a_mistake(notes, tmp_path, monkeypatch):
  monkeypatch.setenv('FAILS', 'init')
  process = run_here(*TINY, '--config.loggers=wandb', '--workdir',
                     str(tmp_path / 'run'))
  assert process.returncode == 2
  assert process.stderr == (
      'error: config.loggers=wandb cannot start (RuntimeError: no route to '
      'host): wandb login, or set WANDB_MODE=offline, or leave it out\n')
  monkeypatch.delenv('FAILS')  # and mended, the same directory goes on
  finished(run_here(*TINY, f'--workdir={tmp_path / "run"}'))


def test_a_run_that_goes_on_does_so_without_one_that_is_away(
    notes, tmp_path, monkeypatch):
  ids = tmp_path / 'run' / 'loggers.json'
  ids.parent.mkdir()
  ids.write_text('{"wandb": "abc"}')
  monkeypatch.setenv('FAILS', 'init')
  lines = []
  with _told(_config('wandb'), tmp_path, lines) as told:
    told.log(7, {'train/loss': 0.5})
  assert lines == ['warning: wandb is told no more of this run (RuntimeError: '
                   'no route to host), which goes on']
  assert json.loads(ids.read_text()) == {'wandb': 'abc'}  # for the next start


def test_a_run_that_mlflow_has_lost_begins_again(
    notes, tmp_path, monkeypatch):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'loggers.json').write_text('{"mlflow": "gone"}')
  import mlflow
  from mlflow.exceptions import MlflowException
  def missing(self, run, status):
    error = MlflowException('no such run')
    error.error_code = 'RESOURCE_DOES_NOT_EXIST'
    raise error
  monkeypatch.setattr(mlflow.MlflowClient, 'update_run', missing)
  with _told(_config('mlflow'), tmp_path, []):
    pass
  assert 'abc' in (tmp_path / 'run' / 'loggers.json').read_text()


@pytest.mark.parametrize('damaged', [
    '', '[]', '7', '{"wandb": 7}', '{"wandb": "../../x"}', '{"wandb": ""}',
    '[' * 1000, '{"wandb": "' + 'a' * 2000 + '"}'])
def test_a_stranger_s_ids_are_looked_at(damaged, notes, tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'loggers.json').write_text(damaged)
  with pytest.raises(UserError, match='loggers.json'):
    loggers.Loggers(_config('wandb'), str(tmp_path / 'run'), print)
  assert notes() == []


def test_loggers_and_profile_may_change_when_a_run_resumes():
  assert {'loggers', 'profile'} <= run._may_change(_config(''))
