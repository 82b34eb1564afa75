"""The cache of all runs: ids, n-grams, compiled programs, generated data."""

from collections.abc import Iterator
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib


def directory() -> pathlib.Path:
  """Where the cache is, made or not."""
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(base) / 'flax_imdb'


def path(folder: str, name: str, suffix: str, *key) -> pathlib.Path:
  """Where in a folder of the cache something is kept that depends on `key`."""
  digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
  return directory() / folder / f'{name.replace("/", "-")}-{digest}{suffix}'


@contextlib.contextmanager
def lock() -> Iterator[None]:
  """Lets one process of a machine through at a time; may raise OSError."""
  directory().mkdir(parents=True, exist_ok=True)
  with open(directory() / 'lock', 'w') as f:
    fcntl.flock(f, fcntl.LOCK_EX)  # until the file is closed
    yield
