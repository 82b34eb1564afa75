"""The cache of all runs: ids, n-grams, compiled programs, generated data."""

from collections.abc import Iterator
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib

from flax_imdb.errors import UserError
from flax_imdb.storage import files

# Where it is another user's, say.
FIX = 'see that it is to be read, or set XDG_CACHE_HOME to another place'


def directory() -> pathlib.Path:
  """Where the cache is, made or not; UserError for who has no home."""
  try:
    base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  except RuntimeError as e:
    raise UserError(f'there is no place for the cache ({e}): set '
                    'XDG_CACHE_HOME') from e
  return pathlib.Path(base) / 'flax_imdb'


def path(folder: str, name: str, suffix: str, *key) -> pathlib.Path:
  """Where in a folder of the cache something is kept that depends on `key`."""
  digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
  return directory() / folder / f'{name.replace("/", "-")}-{digest}{suffix}'


@contextlib.contextmanager
def lock() -> Iterator[None]:
  """Lets one process of a machine through at a time; as `files.writing`."""
  with contextlib.ExitStack() as stack:
    with files.writing(directory() / 'lock'):
      directory().mkdir(parents=True, exist_ok=True)
      f = stack.enter_context(open(directory() / 'lock', 'w'))
      fcntl.flock(f, fcntl.LOCK_EX)  # until the file is closed
    yield
