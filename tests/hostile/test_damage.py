"""A newest checkpoint that is damaged: the run goes on from the one before.

And one that only can't be read, which is no reason to leave it.
"""

import errno
import json
import shutil

import orbax.checkpoint as ocp
import pytest
from support.command import TINY
from support.damages import DAMAGES, HARMLESS, data, flip, truncate

from flax_imdb import main
from flax_imdb.checkpoint import manager, seal
from flax_imdb.cluster import processes
from flax_imdb.errors import TransientError
from flax_imdb.storage import disk


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


@pytest.fixture
def copied(trained, tmp_path):
  """A finished run without its end, to change."""
  workdir = tmp_path / 'run'
  shutil.copytree(trained[0], workdir)
  (workdir / 'summary.json').unlink()
  return workdir


def _content(workdir):
  return {file.relative_to(workdir): file.read_bytes()
          for file in workdir.rglob('*') if file.is_file()}


def _flip_arrays(workdir):
  for step in (7, 14):
    for file in data(workdir / 'checkpoints' / str(step) / 'training'):
      flip(file)


def _truncate_scores(workdir):
  for step in (7, 14):
    truncate(workdir / f'checkpoints/{step}/metrics/metrics')


@pytest.mark.parametrize('damage', [_flip_arrays, _truncate_scores])
def test_without_a_whole_checkpoint_the_run_stops_and_changes_nothing(
    damage, trained, copied, capsys):
  damage(copied)
  before = _content(copied)
  for _ in range(2):  # also if it is started again
    assert main.main([*TINY, f'--workdir={copied}']) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'error: no checkpoint of {copied} is whole (of')
    assert error.endswith(f'or move {copied}/checkpoints away to begin anew\n')
    assert error.count('\n') == 1 and _content(copied) == before
  (copied / 'checkpoints').rename(copied / 'moved')  # as the line says
  assert main.main([*TINY, f'--workdir={copied}']) == 0
  a, b = (json.loads((path / 'summary.json').read_text())['params_sha256']
          for path in (copied, trained[0]))
  assert a == b


# The texts are those of TensorStore 0.1.86 for failing reads, shortened.
def _tensorstore(status, number):
  return ValueError(f'{status}: Error opening "zarr" driver: Error reading "x" '
                    f"[os_error_code='{number}']")


# What a read fails with, and the exit status; None for a traceback.
FAILED = {
    'EIO': (OSError(errno.EIO, 'Input/output error'), 69),
    'ESTALE': (OSError(errno.ESTALE, 'Stale file handle'), 69),
    'EMFILE': (OSError(errno.EMFILE, 'Too many open files'), 69),
    'ENOMEM': (OSError(errno.ENOMEM, 'Cannot allocate memory'), 69),
    'EACCES': (PermissionError(errno.EACCES, 'Permission denied'), 2),
    'EIO of an array': (_tensorstore('UNKNOWN', errno.EIO), 69),
    'ESTALE of an array': (_tensorstore('ABORTED', errno.ESTALE), 69),
    'EMFILE of an array': (
        _tensorstore('RESOURCE_EXHAUSTED', errno.EMFILE), 69),
    'EACCES of an array': (
        _tensorstore('PERMISSION_DENIED', errno.EACCES), 2),
    'no memory': (MemoryError(), None),
    'another failure of TensorStore': (ValueError('INTERNAL: unknown'), None),
    'a bug': (ZeroDivisionError('a bug'), None),
}


def _raise(error):
  def fail(*args, **kwargs):
    raise error
  return fail


@pytest.mark.parametrize('name', FAILED)
def test_a_checkpoint_that_is_not_to_be_read_is_no_damaged_one(
    name, copied, capsys, monkeypatch):
  error, status = FAILED[name]
  before = _content(copied)
  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, 'restore', _raise(error))
    if status is None:
      with pytest.raises(type(error)):
        main.main([*TINY, f'--workdir={copied}'])
    else:
      assert main.main([*TINY, f'--workdir={copied}']) == status
      told = capsys.readouterr().err
      assert told.startswith('error: cannot read checkpoint 14 (')
      assert told.count('\n') == 1
  assert _content(copied) == before
  assert main.main([*TINY, f'--workdir={copied}']) == 0
  assert 'already at step 14 of 14' in capsys.readouterr().out


@pytest.mark.parametrize('where', ['opened', 'sizes'])
def test_files_that_are_not_to_be_read_are_no_damaged_ones(
    where, copied, capsys, monkeypatch):
  before, usual = _content(copied), getattr(disk, where)
  def fail(path):
    if 'checkpoints' in path.parts:
      raise OSError(errno.EIO, 'Input/output error')
    return usual(path)
  monkeypatch.setattr(disk, where, fail)
  assert main.main([*TINY, f'--workdir={copied}']) == 69
  told = capsys.readouterr().err
  assert 'checkpoint 14 (Input/output error): ' in told
  assert _content(copied) == before


def test_a_bug_in_the_check_of_a_checkpoint_is_no_damage(copied, monkeypatch):
  before = _content(copied)
  monkeypatch.setattr(seal, 'checksum', _raise(TypeError('a bug')))
  with pytest.raises(TypeError, match='a bug'):
    main.main([*TINY, f'--workdir={copied}'])
  assert _content(copied) == before


def test_eval_names_a_damaged_score_and_changes_nothing(
    trained, tmp_path, capsys):
  workdir = tmp_path / 'run'
  shutil.copytree(trained[0], workdir)
  truncate(workdir / 'checkpoints/14/metrics/metrics')
  assert main.main(['--mode=eval', f'--workdir={workdir}']) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: checkpoint 14 has a damaged score: delete ')
  assert error.count('\n') == 1 and not (workdir / 'damaged').exists()


# -- several processes --------------------------------------------------------


@pytest.fixture
def second(monkeypatch):
  """Lets this process be the second of two; `gather` is what a test assigns."""
  monkeypatch.setattr(processes, 'index', lambda: 1)
  def assign(answer):
    monkeypatch.setattr(processes, 'gather', answer)
  return assign


def test_the_others_look_at_scores_once_the_broken_ones_are_gone(
    copied, second):
  step = copied / 'checkpoints/14'
  truncate(step / 'metrics/metrics')
  def gather(value):  # the first process is slow, and done only now
    if step.exists():
      step.rename(copied / 'aside')
    return ['', value]
  second(gather)
  with manager.Checkpoints(str(copied)) as checkpoints:
    assert checkpoints.steps() == [7]


def test_a_broken_score_that_only_another_process_sees_may_go_away(
    copied, second):
  truncate(copied / 'checkpoints/14/metrics/metrics')
  second(lambda value: ['', value])
  with pytest.raises(TransientError, match='process 1 sees .*/14, which proce'):
    manager.Checkpoints(str(copied))


def test_the_others_follow_to_the_step_that_the_first_process_chose(
    copied, second):
  from support.disturbed import shapes_of
  shapes = shapes_of(copied)
  def never():
    raise AssertionError('the second process has chosen')
  with manager.Checkpoints(str(copied), read_only=True) as checkpoints:
    second(lambda value: ['7', value])
    step, _ = checkpoints.restore_chosen(never, shapes)
    assert step == 7
    items, _ = checkpoints.restore_newest(shapes, never)
    assert items['training']['step'] == 7


def test_what_only_another_process_cannot_read_may_go_away(copied, second):
  from support.disturbed import shapes_of
  shapes = shapes_of(copied)
  second(lambda value: ['14', value])
  with manager.Checkpoints(str(copied), read_only=True) as checkpoints:
    shutil.rmtree(copied / 'checkpoints/14/model')
    with pytest.raises(TransientError, match='process 1 cannot read checkpoin'):
      checkpoints.restore_newest(shapes, print)
