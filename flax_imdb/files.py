"""Files: read no further than they may be large, written whole or not at all.

A file is not there or whole, whenever the process or the machine dies. In an
object store, which puts a whole one in its place, that needs no other name.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import re
import stat
import time

from flax_imdb import remote
from flax_imdb.errors import UserError

# No process takes as long to write one; one that was killed leaves its own.
_LEFTOVER_SECONDS = 3600


def path(where: str | os.PathLike[str]) -> pathlib.Path:
  """The path of a run directory, or of what is in it.

  Returns:
    A `pathlib.Path`, or where it is remote an `epath.Path`, which is no
    subclass of it but has the methods that a run directory needs.

  Raises:
    UserError: as `remote.path`.
  """
  where = os.fspath(where)
  return remote.path(where) if remote.is_remote(where) else pathlib.Path(where)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
  """Names `path` and the fix where what the context writes can't be written.

  Raises:
    UserError: the disk is full or read-only, or what else an OSError tells.
    StoreError: the object store failed.
  """
  try:
    yield
  except BrokenPipeError:  # that a reader has seen enough is no failure
    raise
  except Exception as e:
    remote.raise_failure(e, f'cannot write {path}')
    if isinstance(e, OSError):
      reason = e.strerror or str(e)
    elif found := re.search(r"os_error_code='(\d+)'", str(e)):  # TensorStore's
      reason = os.strerror(int(found[1]))
    else:
      raise
    raise UserError(
        f'cannot write {path} ({reason}): make room, or choose another '
        'directory with --workdir, or XDG_CACHE_HOME for the cache') from e


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
  """Writes under a temporary name, then renames; text becomes UTF-8.

  Raises:
    UserError: the directory can't be written, or is full.
  """
  if isinstance(content, str):
    content = content.encode()
  if remote.is_remote(path):
    with writing(path):
      remote.path(os.fspath(path)).write_bytes(content)
    return
  path = pathlib.Path(path)
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name, _LEFTOVER_SECONDS)
    try:
      with open(temporary, 'wb') as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())  # or a power cut leaves the name without content
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)


def move(source: pathlib.Path, target: pathlib.Path) -> None:
  """Moves a directory; what the target is to stand in is made, too.

  Raises:
    UserError: the target can't be written.
    StoreError: as `writing`.
  """
  with writing(target):
    if remote.is_remote(target):
      remote.move(source, target)
    else:
      target.parent.mkdir(exist_ok=True)
      source.rename(target)


def read(path: str | os.PathLike[str], most: int,
         fix: str = 'copy the run directory again, or train again') -> bytes:
  """Reads a file that a stranger may have made.

  Args:
    path: the file; a pipe or a device, which might never end, is refused.
    most: bytes; a larger file is refused before it is read.
    fix: what the user can do where it can't be read.

  Raises:
    UserError: it can't be read, is no regular file or is too large.
  """
  if remote.is_remote(path):
    return _read_remote(os.fspath(path), most, fix)
  try:
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 'rb') as f:
      status = os.fstat(f.fileno())
      _check_file(path, stat.S_ISREG(status.st_mode), status.st_size, most, fix)
      return f.read(most)
  except OSError as e:
    raise UserError(f'cannot read {path} ({e.strerror}): {fix}') from e


def _read_remote(name: str, most: int, fix: str) -> bytes:
  path = remote.path(name)
  try:
    status = path.stat()
    _check_file(path, not status.is_directory, status.length, most, fix)
    with path.open('rb') as f:
      return f.read(most)
  except FileNotFoundError as e:
    raise UserError(f'cannot read {path} (it is not there): {fix}') from e
  except Exception as e:
    remote.raise_failure(e, f'cannot read {path}')
    raise


def _check_file(path: str | os.PathLike[str], is_file: bool, size: int,
                most: int, fix: str) -> None:
  if not is_file:
    raise UserError(f'cannot read {path} (it is no file): {fix}')
  if size > most:
    raise UserError(f'cannot read {path} (its {size:,} bytes are more than the '
                    f'{most:,} that it may have): {fix}')


def remove_leftovers(
    directory: pathlib.Path, names: str, seconds: float = 0) -> None:
  """Removes what a process that was killed left of `write` that long ago.

  Args:
    directory: where it wrote; other files that end in .tmp are the user's.
    names: of the files that it wrote, a pattern.
    seconds: the age from which on a leftover goes.
  """
  if remote.is_remote(directory):
    return  # there `write` makes none
  for file in directory.glob(f'{names}.[0-9]*.tmp'):
    with contextlib.suppress(FileNotFoundError):  # another one was faster
      if file.stat().st_mtime <= time.time() - seconds:
        file.unlink()
