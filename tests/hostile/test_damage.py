"""A newest checkpoint that is damaged: the run goes on from the one before."""

import json
import shutil

import pytest
from support.command import TINY
from support.damages import DAMAGES, HARMLESS, data, flip, truncate

from flax_imdb import main


@pytest.mark.parametrize('name', DAMAGES)
def test_the_run_goes_on_from_the_newest_whole_checkpoint(
    name, trained, tmp_path, capsys):
  undisturbed, _ = trained
  workdir = tmp_path / 'run'
  shutil.copytree(undisturbed, workdir)
  (workdir / 'summary.json').unlink()
  DAMAGES[name](workdir / 'checkpoints' / '14')
  assert main.main([*TINY, f'--workdir={workdir}']) == 0
  output = capsys.readouterr().out
  if name in HARMLESS:
    assert 'already at step 14 of 14' in output
  else:
    assert 'checkpoint 14 cannot be restored (' in output
    assert f'set aside as {workdir}/damaged/14-' in output
    assert 'resuming from step 7 of 14' in output
  for file in ('metrics.jsonl', 'config.json'):
    assert (workdir / file).read_bytes() == (undisturbed / file).read_bytes()
  a, b = (json.loads((path / 'summary.json').read_text())
          for path in (workdir, undisturbed))
  assert a | {'seconds': 0} == b | {'seconds': 0}


def test_without_a_whole_checkpoint_the_run_begins_again(
    trained, tmp_path, capsys):
  undisturbed, _ = trained
  workdir = tmp_path / 'run'
  shutil.copytree(undisturbed, workdir)
  for step in (7, 14):
    for file in data(workdir / 'checkpoints' / str(step) / 'training'):
      flip(file)
  assert main.main([*TINY, f'--workdir={workdir}']) == 0
  output = capsys.readouterr().out
  assert output.count('set aside as') == 2
  assert 'each new batch shape compiles once' in output
  a, b = (json.loads((path / 'summary.json').read_text())['params_sha256']
          for path in (workdir, undisturbed))
  assert a == b


def test_eval_names_a_damaged_score_and_changes_nothing(
    trained, tmp_path, capsys):
  workdir = tmp_path / 'run'
  shutil.copytree(trained[0], workdir)
  truncate(workdir / 'checkpoints/14/metrics/metrics')
  assert main.main(['--mode=eval', f'--workdir={workdir}']) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: checkpoint 14 has a damaged score: delete ')
  assert error.count('\n') == 1 and not (workdir / 'damaged').exists()
