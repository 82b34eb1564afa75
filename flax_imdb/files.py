"""Files that are whole or not there, whenever the process or machine dies."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import re
import time

from flax_imdb.errors import UserError

# No process takes as long to write one; one that was killed leaves its own.
_LEFTOVER_SECONDS = 3600


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
  """Names `path` and the fix where what the context writes can't be written.

  Raises:
    UserError: the disk is full or read-only, or what else an OSError tells.
  """
  try:
    yield
  except Exception as e:
    if isinstance(e, OSError):
      reason = e.strerror
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
  path = pathlib.Path(path)
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  if isinstance(content, str):
    content = content.encode()
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


def remove_leftovers(
    directory: pathlib.Path, names: str, seconds: float = 0) -> None:
  """Removes what a process that was killed left of `write` that long ago.

  Args:
    directory: where it wrote; other files that end in .tmp are the user's.
    names: of the files that it wrote, a pattern.
    seconds: the age from which on a leftover goes.
  """
  for file in directory.glob(f'{names}.[0-9]*.tmp'):
    with contextlib.suppress(FileNotFoundError):  # another one was faster
      if file.stat().st_mtime <= time.time() - seconds:
        file.unlink()
