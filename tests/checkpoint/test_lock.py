"""Two starts on one run directory: the second is refused, the first goes on."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
from support.command import ROOT, TINY, environ

from flax_imdb import main
from flax_imdb.checkpoint import run
from flax_imdb.errors import TransientError
from flax_imdb.storage import disk, files


@contextlib.contextmanager
def _another(workdir):
  """Another process that holds the lock, once this yields it."""
  process = subprocess.Popen(
      [sys.executable, '-c', 'import sys, time\n'
       'from flax_imdb.checkpoint import run\n'
       'with run.locked(sys.argv[1], print):\n'
       '  print("held", flush=True)\n'
       '  time.sleep(600)', str(workdir)], cwd=ROOT, env=environ(),
      stdout=subprocess.PIPE)
  try:
    assert process.stdout.readline() == b'held\n'
    yield process
  finally:
    process.kill()
    process.communicate()


def test_a_second_start_is_refused_until_the_first_is_dead(
    trained, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(disk, '_LOCK_SECONDS', 0.2)
  workdir = tmp_path / 'run'
  shutil.copytree(trained[0], workdir)
  (workdir / 'summary.json').unlink()
  with _another(workdir) as process:
    before = {f: f.read_bytes() for f in workdir.rglob('*') if f.is_file()}
    assert main.main([*TINY, f'--workdir={workdir}']) == 69
    assert re.fullmatch(
        rf'error: {workdir} is in use by process {process.pid} on '
        rf'{re.escape(socket.gethostname())} since \d+-\d+-\d+ \d+:\d+:\d+ '
        r'UTC: wait for its end, [^\n]*--workdir\n', capsys.readouterr().err)
    assert before == {
        f: f.read_bytes() for f in workdir.rglob('*') if f.is_file()}
    for mode in (['--mode=eval'], ['--mode=predict', 'good']):
      assert main.main([*mode, f'--workdir={workdir}']) == 0
  assert (workdir / '.lock').exists()  # it was killed
  assert main.main([*TINY, f'--workdir={workdir}']) == 0
  assert not (workdir / '.lock').exists()


def test_one_that_is_about_to_end_is_waited_for(tmp_path):
  held, ended = threading.Event(), []
  def hold():
    with run.locked(str(tmp_path), print):
      held.set()
      time.sleep(0.5)
      ended.append(True)
  thread = threading.Thread(target=hold)
  thread.start()
  held.wait()
  with run.locked(str(tmp_path), print):
    assert ended
    # The file it left was removed: this is one that a third process sees.
    with pytest.raises(BlockingIOError), open(tmp_path / '.lock') as third:
      fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
  thread.join()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('number', [
    errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_breaks_no_run(
    number, tmp_path, monkeypatch):
  def none(*args):
    raise OSError(number, os.strerror(number))
  monkeypatch.setattr(fcntl, 'flock', none)
  said = []
  with run.locked(str(tmp_path), said.append):
    pass
  line, = said
  assert line.startswith(f'{tmp_path} cannot be locked ({os.strerror(number)})')


def test_a_lock_that_cannot_be_asked_for_is_told(tmp_path, monkeypatch):
  def fail(*args):
    raise OSError(errno.EIO, 'Input/output error')
  monkeypatch.setattr(fcntl, 'flock', fail)
  with pytest.raises(TransientError, match=r'cannot write .*/\.lock \(Inp'):
    with run.locked(str(tmp_path), print):
      pass


def test_a_strangers_link_is_not_followed(tmp_path, capsys):
  (tmp_path / 'mine').write_text('mine')
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run/.lock').symlink_to(tmp_path / 'mine')
  assert main.main([*TINY, f'--workdir={tmp_path}/run']) == 2
  assert 'cannot write' in capsys.readouterr().err
  assert (tmp_path / 'mine').read_text() == 'mine'


def test_the_lock_ends_where_the_run_fails(tmp_path):
  with pytest.raises(ValueError, match='a bug'):
    with run.locked(str(tmp_path), print):
      raise ValueError('a bug')
  with files.locked(tmp_path / '.lock', print) as why_none:
    assert why_none == ''
