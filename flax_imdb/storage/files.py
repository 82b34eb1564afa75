"""Files, on a disk or in a bucket: written whole or not at all, read bounded.

`_place` alone asks which of the two a path belongs to. `disk` and `bucket` have
the same functions, which are described here and raise what they meet.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import re
from typing import Any

from flax_imdb.errors import UserError
from flax_imdb.storage import bucket, disk

Path = str | os.PathLike[str]


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


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
  """Names `path` and the fix where what the context writes can't be written.

  Raises UserError for an OSError, TransientError where the object store failed.
  """
  try:
    yield
  except BrokenPipeError:  # that a reader has seen enough is no failure
    raise
  except Exception as e:
    bucket.raise_failure(e, f'cannot write {path}')
    if isinstance(e, OSError):
      reason = e.strerror or str(e)
    elif found := re.search(r"os_error_code='(\d+)'", str(e)):  # TensorStore's
      reason = os.strerror(int(found[1]))
    else:
      raise
    raise UserError(
        f'cannot write {path} ({reason}): make room, or choose another '
        'directory with --workdir, or XDG_CACHE_HOME for the cache') from e


def write(path: Path, content: str | bytes) -> None:
  """Writes a file that is whole or not there; text as UTF-8; see `writing`."""
  if isinstance(content, str):
    content = content.encode()
  with writing(path):
    _place(path).write(as_path(path), content)


def append(path: Path, content: bytes) -> None:
  """Adds to a file, made if need be; on disk, unless it raises as `writing`."""
  with writing(path):
    _place(path).append(as_path(path), content)


def move(source: pathlib.Path, target: pathlib.Path) -> None:
  """Moves a directory, and makes what it is to stand in; see `writing`."""
  with writing(target):
    _place(target).move(source, target)


def read_bytes(
    path: Path, most: int,
    fix: str = 'copy the run directory again, or train again') -> bytes:
  """Reads a file that a stranger may have made, of at most `most` bytes.

  Raises UserError, which tells the `fix`, if it can't be read, is larger, or is
  a pipe or a device, which might never end; TransientError if the store failed.
  """
  try:
    with _place(path).opened(as_path(path)) as (file, size):
      if size is None:
        raise UserError(f'cannot read {path} (it is no file): {fix}')
      if size > most:
        raise UserError(f'cannot read {path} (its {size:,} bytes are more than '
                        f'the {most:,} that it may have): {fix}')
      return file.read(most)
  except UserError:
    raise
  except Exception as e:
    bucket.raise_failure(e, f'cannot read {path}')
    if not isinstance(e, OSError):
      raise
    reason = e.strerror or 'it is not there'
    raise UserError(f'cannot read {path} ({reason}): {fix}') from e


def sizes(folder: Path) -> Iterator[tuple[pathlib.PurePath, int]]:
  """Name and bytes of all files below; ValueError for a pipe or a device."""
  return _place(folder).sizes(as_path(folder))


def remove_leftovers(folder: pathlib.Path, names: str) -> None:
  """Removes what a killed `write` left of files whose names match a pattern."""
  _place(folder).remove_leftovers(folder, names)
