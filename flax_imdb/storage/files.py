"""Files, on a disk or in a bucket: written whole or not at all, read bounded.

`_place` alone asks which of the two a path belongs to. `disk` and `bucket` have
the same functions, which are described here and raise what they meet.
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import os
import pathlib
import re
import socket
import time
from typing import Any, BinaryIO

from flax_imdb.errors import TransientError, UserError
from flax_imdb.storage import bucket, disk

Path = str | os.PathLike[str]

# What a disk, a server or a machine may get over; a missing right and a limit
# stay until somebody changes them.
_MAY_GO_AWAY = {
    errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.ETIMEDOUT,
    errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EMFILE, errno.ENFILE,
    errno.ENOMEM, errno.ENOBUFS, errno.ENOTCONN, errno.ECONNREFUSED,
    errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETDOWN, errno.ENETUNREACH}
_TENSORSTORE = re.compile(r"os_error_code='(\d+)'")
# That which etils and gcsfs raise without a number.
_BY_TYPE = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES,
            IsADirectoryError: errno.EISDIR, NotADirectoryError: errno.ENOTDIR}


def _place(path: Path) -> Any:
  return bucket if '://' in os.fspath(path) else disk


def as_path(where: Path) -> pathlib.Path:
  """The path of a run directory, or of what is in it.

  In a bucket an `epath.Path`, no subclass, but with all methods needed here.
  Raises UserError as `bucket.as_path`.
  """
  return _place(where).as_path(os.fspath(where))


def absolute(where: str) -> str:
  """A directory's name that does not depend on the working directory.

  Raises UserError if that is gone, or as `bucket.absolute`.
  """
  return _place(where).absolute(where)


def os_error(error: Exception) -> int | None:
  """The errno of what the system refused; None if it was not the system.

  Also where TensorStore tells of it, in the text of a ValueError.
  """
  if isinstance(error, OSError):
    return error.errno or _BY_TYPE.get(type(error))
  found = _TENSORSTORE.search(str(error))
  return int(found[1]) if found else None


def raise_failure(error: Exception, what: str, fix: str) -> None:
  """Raises what ends a run in one line if disk or store is to blame.

  TransientError where it may go away by itself, UserError with the fix where it
  will not. Returns if it was neither.
  """
  bucket.raise_failure(error, what)
  number = os_error(error)
  if number is None and not isinstance(error, OSError):
    return
  reason = os.strerror(number) if number else str(error)
  if number in _MAY_GO_AWAY:
    raise TransientError(f'{what} ({reason}): {fix}') from error
  raise UserError(f'{what} ({reason}): {fix}') from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
  """Names `path` and the fix where what the context writes can't be written.

  Raises as `raise_failure`: a full disk or a store may soon be as they were.
  """
  try:
    yield
  except BrokenPipeError:  # that a reader has seen enough is no failure
    raise
  except Exception as e:
    raise_failure(e, f'cannot write {path}',
                  'make room, or choose another directory with --workdir, or '
                  'XDG_CACHE_HOME for the cache')
    raise


def exists(path: pathlib.Path,
           fix: str = 'see that it is to be read') -> bool:
  """Whether there is something; if nobody can tell, as `raise_failure`."""
  try:
    return path.exists()
  except OSError as e:
    raise_failure(e, f'cannot read {path}', fix)
    raise


def write(path: Path, content: str | bytes) -> None:
  """Writes a file that is whole or not there; text as UTF-8; see `writing`."""
  if isinstance(content, str):
    content = content.encode()
  with writing(path):
    _place(path).write(as_path(path), content)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
  """A file of a disk to write, which takes this place when the context ends.

  It is whole or not there, as of `write`, and may be larger than memory.
  """
  with writing(path), disk.replacing(path) as f:
    yield f


def append(path: Path, content: bytes) -> None:
  """Adds to a file, made if need be; on disk, unless it raises as `writing`."""
  with writing(path):
    _place(path).append(as_path(path), content)


def move(source: pathlib.Path, target: pathlib.Path) -> None:
  """Moves a directory, and makes what it is to stand in; see `writing`."""
  with writing(target):
    _place(target).move(source, target)


@contextlib.contextmanager
def locked(path: Path, lost: Callable[[str], None]) -> Iterator[str]:
  """Holds a lock, kept in this file, until the context or the process ends.

  Yields why there is none, if the file system has no locks, else ''. `lost` is
  called in a thread if another process took it, as it may in a bucket if this
  one stood still. Raises TransientError, which names who holds it, and where
  it can't be written as `raise_failure`.
  """
  folder = os.path.dirname(os.fspath(path))
  now = time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())
  who = f'process {os.getpid()} on {socket.gethostname()} since {now}'
  with contextlib.ExitStack() as stack:
    try:
      why_none = stack.enter_context(
          _place(path).locked(as_path(path), who, lost))
    except BlockingIOError as e:
      raise TransientError(
          f'{folder} is in use by {e.strerror}: wait for its end, stop it, or '
          'give another --workdir') from None
    except Exception as e:
      raise_failure(e, f'cannot write {path}', 'choose another --workdir')
      raise
    yield why_none


def read_bounded(path: Path, most: int) -> bytes:
  """Reads a file that a stranger may have made, of at most `most` bytes.

  Raises ValueError if it is larger, or a pipe or a device, which might never
  end; what the disk or the store raises as it is, also for a directory.
  """
  with _place(path).opened(as_path(path)) as (file, size):
    if size is None:
      raise ValueError('it is no file')
    if size > most:
      raise ValueError(f'its {size:,} bytes are more than the {most:,} that it '
                       'may have')
    return file.read(most)


def read_bytes(
    path: Path, most: int,
    fix: str = 'copy the run directory again, or train again') -> bytes:
  """As `read_bounded`, but for somebody to read.

  Raises UserError, which tells the `fix`, if it is no such file, or as
  `raise_failure` if it can't be read.
  """
  try:
    return read_bounded(path, most)
  except ValueError as e:
    raise UserError(f'cannot read {path} ({e}): {fix}') from e
  except Exception as e:
    raise_failure(e, f'cannot read {path}', fix)
    raise


def find(pattern: str) -> list[tuple[str, int, str]]:
  """The files that a name or a pattern of many means, in order; or none.

  Of each its absolute name, its bytes, and what changes when it is written.
  Raises what the disk or the store raises, for a directory IsADirectoryError.
  """
  return list(_place(pattern).find(pattern))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
  """Opens a file to read; UserError for a pipe, else as `read_bounded`."""
  with _place(path).opened(as_path(path)) as (file, size):
    if size is None:
      raise UserError(f'{path} is a pipe or a device: give a file')
    yield file


def sizes(folder: Path) -> Iterator[tuple[pathlib.PurePath, int]]:
  """Name and bytes of all files below; ValueError for a pipe or a device."""
  return _place(folder).sizes(as_path(folder))


def remove_leftovers(folder: pathlib.Path, names: str) -> None:
  """Removes what a killed `write` left of files whose names match a pattern."""
  _place(folder).remove_leftovers(folder, names)
