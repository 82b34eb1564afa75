"""Files: what a killed process leaves is removed, errors name the fix."""

import errno
import os
import re
import time

import pytest

from flax_imdb.checkpoint import run
from flax_imdb.errors import TransientError, UserError
from flax_imdb.storage import cache, disk, files


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path):
  old, new, other = (tmp_path / f'{name}.tmp' for name in ('a.1', 'a.2', 'b.1'))
  for file in (old, new, other):
    file.write_text('half')
  for file in (old, other):
    os.utime(file, (0, time.time() - 2 * disk._LEFTOVER_SECONDS))
  files.write(tmp_path / 'a', 'whole')
  assert (tmp_path / 'a').read_text() == 'whole'
  assert sorted(tmp_path.iterdir()) == [tmp_path / 'a', new, other]
  files.remove_leftovers(tmp_path, '*')
  assert sorted(tmp_path.iterdir()) == [tmp_path / 'a']


def test_processes_of_one_number_write_files_of_their_own(tmp_path):
  """As in two containers, where the number is often 1."""
  with (files.replacing(tmp_path / 'a') as first,
        files.replacing(tmp_path / 'a') as second):
    first.write(b'first')
    second.write(b'second')
  assert (tmp_path / 'a').read_bytes() == b'first'
  assert [*tmp_path.iterdir()] == [tmp_path / 'a']


def test_a_cache_without_a_place_is_a_mistake(tmp_path, monkeypatch):
  (tmp_path / 'file').touch()
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  with pytest.raises(UserError, match='XDG_CACHE_HOME'), cache.lock():
    pass
  monkeypatch.delenv('XDG_CACHE_HOME')
  def homeless():
    raise RuntimeError('Could not determine home directory.')
  monkeypatch.setattr(cache.pathlib.Path, 'home', homeless)
  with pytest.raises(UserError, match='set XDG_CACHE_HOME'):
    cache.directory()


def test_a_run_begins_without_leftovers_and_spares_what_is_not_its_own(
    tmp_path):
  for name in ('summary.json.12.tmp', 'metrics.jsonl.7.tmp', 'notes.tmp'):
    (tmp_path / name).write_text('half')
  with run.locked(str(tmp_path), print):
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        '.lock', 'notes.tmp']
  assert [file.name for file in tmp_path.iterdir()] == ['notes.tmp']


@pytest.mark.parametrize(('error', 'kind'), [
    (OSError(errno.ENOSPC, 'No space left on device'), TransientError),
    (ValueError("RESOURCE_EXHAUSTED: Failed to write [os_error_code='28']"),
     TransientError),
    (OSError(errno.EIO, 'Input/output error'), TransientError),
    (OSError(errno.ESTALE, 'Stale file handle'), TransientError),
    (OSError(errno.EDQUOT, 'Disk quota exceeded'), TransientError),
    (OSError(errno.EROFS, 'Read-only file system'), UserError),
    (OSError(errno.EACCES, 'Permission denied'), UserError),
    (OSError(errno.ENOTDIR, 'Not a directory'), UserError),
    (OSError(errno.EFBIG, 'File too large'), UserError),
    (ValueError("PERMISSION_DENIED: Failed [os_error_code='13']"), UserError)])
def test_a_disk_that_fails_is_told_with_the_fix(error, kind):
  number = files.os_error(error)
  assert kind.status == {TransientError: 69, UserError: 2}[kind]
  with pytest.raises(kind, match=re.escape(
      f'cannot write here ({os.strerror(number)}): make room')):
    with files.writing('here'):
      raise error


def test_a_read_that_may_succeed_later_is_no_mistake(tmp_path, monkeypatch):
  (tmp_path / 'a').write_text('1')
  for number, kind in ((errno.EIO, TransientError), (errno.EACCES, UserError)):
    def fail(*args, number=number):
      raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, 'open', fail)
    with pytest.raises(kind, match=re.escape(os.strerror(number))):
      files.read_bytes(tmp_path / 'a', 10)


def test_a_directory_is_no_file_to_read(tmp_path):
  with pytest.raises(UserError, match=r'\(Is a directory\): copy the run'):
    files.read_bytes(tmp_path, 10)


def test_other_errors_are_not_the_disks():
  with pytest.raises(ValueError, match='^another$'):
    with files.writing('here'):
      raise ValueError('another')
