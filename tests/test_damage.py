"""A newest checkpoint that is damaged: the run goes on from the one before."""

import json
import shutil

from conftest import TINY
import pytest

from flax_imdb import main


def _truncate(file):
  file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def _flip(file):
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def _empty(file):
  file.write_bytes(b'')


def _largest(folder):
  return max(folder.rglob('d/*'), key=lambda file: file.stat().st_size)


# Of an item the array data, the index of it, and its description.
_FILES = {
    'model data': lambda step: _largest(step / 'model'),
    'training data': lambda step: _largest(step / 'training'),
    'model manifest': lambda step: step / 'model/manifest.ocdbt',
    'training description': lambda step: step / 'training/_METADATA',
    'progress': lambda step: step / 'progress/metadata',
    'score': lambda step: step / 'metrics/metrics',
}
_DELETED = [
    '_CHECKPOINT_METADATA', 'model', 'model/_METADATA', 'training', 'progress',
    'metrics']


def _delete(path):
  shutil.rmtree(path) if path.is_dir() else path.unlink()


def _every_other_file(step):
  for file in sorted(f for f in step.rglob('*') if f.is_file())[::2]:
    file.unlink()


def _all_files(step):
  shutil.rmtree(step)
  step.mkdir()


_DAMAGES = {
    **{f'{how.__name__[1:]} {name}': lambda step, how=how, find=find: how(
        find(step)) for how in (_truncate, _flip)
       for name, find in _FILES.items()},
    'empty score': lambda step: _empty(_FILES['score'](step)),
    **{f'without {name}': lambda step, name=name: _delete(step / name)
       for name in _DELETED},
    'every other file': _every_other_file,
    'all files': _all_files,
}
# orbax does without these; what it reads is whole.
_HARMLESS = {'without _CHECKPOINT_METADATA', 'without model/_METADATA'}


@pytest.mark.parametrize('name', _DAMAGES)
def test_the_run_goes_on_from_the_newest_whole_checkpoint(
    name, trained, tmp_path, capsys):
  undisturbed, _ = trained
  workdir = tmp_path / 'run'
  shutil.copytree(undisturbed, workdir)
  (workdir / 'summary.json').unlink()
  _DAMAGES[name](workdir / 'checkpoints' / '14')
  assert main.main([*TINY, f'--workdir={workdir}']) == 0
  output = capsys.readouterr().out
  if name in _HARMLESS:
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
    _flip(_largest(workdir / 'checkpoints' / str(step) / 'training'))
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
  _truncate(workdir / 'checkpoints/14/metrics/metrics')
  assert main.main(['--mode=eval', f'--workdir={workdir}']) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: checkpoint 14 has a damaged score: delete ')
  assert error.count('\n') == 1 and not (workdir / 'damaged').exists()
