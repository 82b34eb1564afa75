"""The half of `files` for a disk: whole, whenever process or machine dies."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import glob
import os
import pathlib
import secrets
import stat
import time
from typing import BinaryIO

from flax_imdb.errors import UserError

# No process takes as long to write one; one that was killed leaves its own.
_LEFTOVER_SECONDS = 3600
# That a process which was told to stop may take to end.
_LOCK_SECONDS = 5
# What flock says where the file system has none, such as some NFS.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def as_path(where: str) -> pathlib.Path:
  """See `files.as_path`."""
  return pathlib.Path(where)


def absolute(where: str) -> str:
  """See `files.absolute`."""
  try:
    return str(pathlib.Path(where).absolute())
  except FileNotFoundError as e:
    raise UserError('the working directory is no longer there: change to '
                    'another') from e


def write(path: pathlib.Path, content: bytes) -> None:
  """See `files.write`."""
  with replacing(path) as f:
    f.write(content)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
  """Writes under a temporary name, then renames; see `files.replacing`."""
  # In containers that share a directory processes have equal numbers.
  temporary = path.with_name(
      f'{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp')
  path.parent.mkdir(parents=True, exist_ok=True)
  remove_leftovers(path.parent, path.name, _LEFTOVER_SECONDS)
  try:
    with open(temporary, 'wb') as f:
      yield f
      f.flush()
      os.fsync(f.fileno())  # or a power cut leaves the name without content
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def append(path: pathlib.Path, content: bytes) -> None:
  """See `files.append`."""
  with open(path, 'ab') as f:
    f.write(content)
    f.flush()
    os.fsync(f.fileno())


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[tuple[BinaryIO, int | None]]:
  """Opens a file to read: it and its bytes, None if it is no regular one."""
  # Without O_NONBLOCK a pipe would be waited for.
  descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
  status = os.fstat(descriptor)
  if stat.S_ISDIR(status.st_mode):  # which Python would not close
    os.close(descriptor)
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
  with open(descriptor, 'rb') as f:
    yield f, status.st_size if stat.S_ISREG(status.st_mode) else None


@contextlib.contextmanager
def locked(path: pathlib.Path, who: str,
           lost: Callable[[str], None]) -> Iterator[str]:
  """See `files.locked`; BlockingIOError says who has it after 5 s."""
  import fcntl  # only now: Windows has none
  del lost  # the kernel takes it from nobody who lives
  end, why_none = time.monotonic() + _LOCK_SECONDS, ''
  while True:
    # A stranger's link is not followed, and a pipe not waited for.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
                         | os.O_NONBLOCK, 0o666)
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if _is_at(path, descriptor):
        break  # else the one before removed it meanwhile
    except BlockingIOError:
      if time.monotonic() > end:
        other = os.read(descriptor, 200).decode(errors='replace')
        os.close(descriptor)
        raise BlockingIOError(errno.EAGAIN, other or 'another') from None
    except OSError as e:
      if e.errno not in _NO_LOCKS:
        os.close(descriptor)
        raise
      why_none = os.strerror(e.errno)
      break
    os.close(descriptor)
    time.sleep(0.1)
  try:
    os.ftruncate(descriptor, 0)
    os.write(descriptor, who.encode())
    yield why_none
  finally:
    if not why_none:
      with contextlib.suppress(OSError):  # left behind it locks nothing
        path.unlink()
    os.close(descriptor)


def _is_at(path: pathlib.Path, descriptor: int) -> bool:
  """Whether an open file still has this name."""
  try:
    return os.path.samestat(os.fstat(descriptor), os.stat(path))
  except FileNotFoundError:
    return False


def move(source: pathlib.Path, target: pathlib.Path) -> None:
  """See `files.move`."""
  target.parent.mkdir(exist_ok=True)
  source.rename(target)


def find(pattern: str) -> Iterator[tuple[str, int, str]]:
  """See `files.find`."""
  names = [pattern] if os.path.lexists(pattern) else sorted(
      glob.glob(pattern, recursive=True))
  for name in names:
    status = os.stat(name)
    if stat.S_ISDIR(status.st_mode):
      raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    yield os.path.abspath(name), status.st_size, str(status.st_mtime_ns)


def sizes(folder: pathlib.Path) -> Iterator[tuple[pathlib.PurePath, int]]:
  """See `files.sizes`."""
  def fail(error):
    raise error  # pathlib's rglob would leave out what it can't list
  for place, _, names in os.walk(folder, onerror=fail):
    for path in (pathlib.Path(place, name) for name in names):
      status = path.stat()
      if not stat.S_ISREG(status.st_mode):
        raise ValueError(f'{path.name} is no file')
      yield path, status.st_size


def remove_leftovers(
    folder: pathlib.Path, names: str, seconds: float = 0) -> None:
  """See `files.remove_leftovers`."""
  for file in folder.glob(f'{names}.[0-9]*.tmp'):  # others are the user's
    with contextlib.suppress(FileNotFoundError):  # another one was faster
      if file.stat().st_mtime <= time.time() - seconds:
        file.unlink()
