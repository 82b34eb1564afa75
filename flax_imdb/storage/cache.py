"""The cache of all runs: token ids, compiled programs and generated data."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib


def directory() -> pathlib.Path:
  """Where the cache is, made or not."""
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(base) / 'flax_imdb'


@contextlib.contextmanager
def lock() -> Iterator[None]:
  """Lets one process of a machine through at a time; may raise OSError."""
  directory().mkdir(parents=True, exist_ok=True)
  with open(directory() / 'lock', 'w') as f:
    fcntl.flock(f, fcntl.LOCK_EX)  # until the file is closed
    yield
