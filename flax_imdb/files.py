"""Files that are whole or not there, whenever the process or machine dies."""

import os
import pathlib

from flax_imdb.errors import UserError


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
  """Writes under a temporary name, then renames; text becomes UTF-8.

  Raises:
    UserError: the directory can't be written, or is full.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  if isinstance(content, str):
    content = content.encode()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      with open(temporary, 'wb') as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())  # or a power cut leaves the name without content
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)
  except OSError as e:
    raise UserError(
        f'cannot write {path} ({e.strerror}): make room, or choose another '
        'directory with --workdir, or XDG_CACHE_HOME for the cache') from e
