"""The half of `files` for a bucket: gs://BUCKET/DIR.

An object is put in its place whole, without another name first. The paths are
`epath.Path`s, which go through gcsfs, as orbax' own do; arrays go through
TensorStore. All is imported only if needed.
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import fnmatch
import functools
import importlib.util
import io
import os
import pathlib
import re
import socket
import sys
import threading
import time
from typing import Any, BinaryIO

from flax_imdb.errors import TransientError, UserError

# Without the characters that mean something in a pattern or a URL: orbax would
# write what follows a # or ? to another place.
_NAME = re.compile(r'gs://([a-z0-9][a-z0-9._-]+[a-z0-9])((?:/[^/#?*\[\]]+)+)')
_SECONDS = 10  # that a request of `_reach` may take, and its repetitions
# Who has a lock says so each _BEAT; if it does not for _STALE, it is no more.
_BEAT, _STALE = 20.0, 60.0
# Whose errors mean that the store was not reached, or refused.
CLIENTS = ('gcsfs', 'google.api_core', 'google.auth', 'google.cloud',
           'aiohttp', 'requests')
_TENSORSTORE = re.compile(
    '(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED'
    '|RESOURCE_EXHAUSTED)[^[]*')


def absolute(where: str) -> str:
  """A directory's name as all write it, without a / at its end.

  Raises UserError if it is none that all clients of gs:// read in the same way.
  """
  found = re.sub('(?<!:)/+', '/', where).rstrip('/')
  if not (_NAME.fullmatch(found) and found.isprintable()
          and {'.', '..'}.isdisjoint(found.split('/'))):
    raise UserError(
        f'{where}: remote directories are not supported but for '
        'gs://BUCKET/DIR, with none of # ? * [ ] in it')
  return found


def as_path(where: str) -> Any:
  """The `epath.Path` of a directory or file, whose bucket is to be reached.

  Raises UserError as `absolute`, or if a package, credentials or the bucket are
  missing, and TransientError if it can't be reached.
  """
  where = absolute(where)
  # TensorFlow, where it is installed, would be imported to reach the store.
  os.environ.setdefault('EPATH_USE_TF', 'false')
  # Another protocol, which needs other rights, for other kinds of buckets.
  os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
  _reach(where.split('/')[2])
  from etils import epath
  return epath.Path(where)


@functools.cache
def _reach(bucket: str) -> None:
  if not importlib.util.find_spec('gcsfs'):
    raise UserError('gs:// needs gcsfs: pip install gcsfs, or .[gcs] or .[tpu]')
  import fsspec
  import gcsfs  # noqa: F401
  import google.api_core.exceptions as api
  import google.auth.exceptions as auth
  from google.cloud import storage

  # TensorStore and other processes write what a kept listing would not show.
  fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
  try:
    # As orbax does, which asks for the kind of bucket it is.
    storage.Client().get_bucket(
        bucket, timeout=_SECONDS,
        retry=storage.retry.DEFAULT_RETRY.with_timeout(_SECONDS))
  except (auth.DefaultCredentialsError, auth.RefreshError) as e:
    if e.retryable:
      raise_failure(e, f'cannot reach gs://{bucket}')
    raise UserError(
        f'gs:// needs credentials ({failure(e)}): gcloud auth application-'
        'default login, or set GOOGLE_APPLICATION_CREDENTIALS') from e
  except api.NotFound as e:
    raise UserError(f'there is no bucket gs://{bucket}: make it with gcloud '
                    f'storage buckets create, or correct its name') from e
  except api.ClientError as e:
    raise UserError(
        f'cannot open gs://{bucket} ({failure(e)}): give the account the roles '
        'storage.objectUser and storage.legacyBucketReader there') from e
  except Exception as e:
    raise_failure(e, f'cannot reach gs://{bucket}')
    raise


def failure(error: Exception) -> str | None:
  """What the store or the way to it failed with, in a line.

  None if an error says something of a file or has nothing to do with a store.
  """
  if 'gcsfs' not in sys.modules:  # nothing here is remote
    return None
  module = type(error).__module__
  text = ' '.join(str(error).split())
  if 'os_error_code=' in text:  # TensorStore's, of a local disk
    return None
  if found := _TENSORSTORE.match(text):
    return found[0].strip()[:400]
  known = module.startswith(CLIENTS) or (
      isinstance(error, OSError) and text.startswith('Forbidden: '))
  return (text or type(error).__name__)[:400] if known else None


def raise_failure(error: Exception, what: str) -> None:
  """Raises a TransientError that says what failed, if `failure` knows why."""
  if why := failure(error):
    raise TransientError(
        f'{what} ({why}): look at the network, and started again it goes on '
        'from the last checkpoint') from error


def write(path: Any, content: bytes) -> None:
  """See `files.write`."""
  path.write_bytes(content)


def append(path: Any, content: bytes) -> None:
  """Writes the object anew: nothing can be added to one."""
  path.write_bytes((path.read_bytes() if path.exists() else b'') + content)


@contextlib.contextmanager
def opened(path: Any) -> Iterator[tuple[BinaryIO | None, int | None]]:
  """Opens an object to read: it and its bytes, None for a directory."""
  status = path.stat()
  if status.is_directory:
    yield None, None
  else:
    with path.open('rb') as f:
      # Whose lines can be read up to a length, which gcsfs' can't.
      yield io.BufferedReader(f), status.length


@contextlib.contextmanager
def locked(path: Any, who: str, lost: Callable[[str], None]) -> Iterator[str]:
  """See `files.locked`; BlockingIOError says who has it.

  An object that is made only where there is none, and written anew in beats.
  One that stays as it is, or whose process on this host is dead, is removed.
  """
  import google.api_core.exceptions as api
  from google.cloud import storage
  name, _, file = str(path).removeprefix('gs://').partition('/')
  blob = storage.Client().bucket(name).blob(file)
  limits: dict[str, Any] = {
      'timeout': _SECONDS,
      'retry': storage.retry.DEFAULT_RETRY.with_timeout(_SECONDS)}

  mine = 0  # the generation that this process wrote; none yet

  def holder() -> str:
    """Who has it; '' if nobody. `blob.generation` is then that one's."""
    try:
      blob.reload(**limits)
      return blob.download_as_bytes(**limits).decode(errors='replace')[:200]
    except api.NotFound:
      return ''

  def take() -> bool:
    """Writes it if nobody else did; a repeated request finds its own."""
    nonlocal mine
    try:
      blob.upload_from_string(who, if_generation_match=mine, **limits)
    except api.PreconditionFailed:
      if holder() != who:
        return False
    mine = blob.generation
    return True

  first, since = None, time.monotonic()
  while not take():
    if not (has_it := holder()):
      continue  # it has just ended
    first = first or blob.generation
    if blob.generation != first:
      raise BlockingIOError(errno.EAGAIN, has_it)
    if _is_dead(has_it) or time.monotonic() - since > _STALE:
      with contextlib.suppress(api.NotFound, api.PreconditionFailed):
        blob.delete(if_generation_match=first, **limits)
    else:
      time.sleep(1)

  ended = threading.Event()
  def beat() -> None:
    while not ended.wait(_BEAT):
      try:
        if not take():
          return lost(f'{path} is now held by {holder() or "nobody"}')
      except Exception as e:  # the store is away: a later beat may reach it
        if not failure(e):
          raise
  thread = threading.Thread(target=beat, daemon=True)
  thread.start()
  try:
    yield ''
  finally:
    ended.set()
    thread.join()
    try:
      blob.delete(if_generation_match=mine, **limits)
    except Exception as e:  # it is another's, or found dead in a while
      if not failure(e):
        raise


def _is_dead(who: str) -> bool:
  """Whether a process of this host is no more."""
  found = re.match(r'process (\d+) on (\S+) ', who)
  if not found or found[2] != socket.gethostname():
    return False
  if int(found[1]) == os.getpid():  # in a container started again
    return True
  try:
    os.kill(int(found[1]), 0)
  except ProcessLookupError:
    return True
  except (OSError, OverflowError):
    return False
  return False


def move(source: Any, target: Any) -> None:
  """Copies all of a directory, then removes it."""
  import fsspec
  store = fsspec.filesystem('gcs')
  found = store.find(str(source))
  above = len(str(source).removeprefix('gs://'))
  store.copy(found, [f'{target}{file[above:]}' for file in found])
  store.rm(found)


def find(pattern: str) -> Iterator[tuple[str, int, str]]:
  """See `files.find`; * and ? stand for no /."""
  place, name = os.path.split(pattern)
  # By way of a file, for a bucket itself is no run directory.
  place = str(as_path(f'{place}/file').parent)
  import fsspec
  listed = fsspec.filesystem('gcs').find(place, maxdepth=1, detail=True)
  for path, about in sorted(listed.items()):
    if fnmatch.fnmatchcase(path.rpartition('/')[2], name):
      yield f'gs://{path}', about['size'], str(
          about.get('generation') or about.get('etag') or about.get('mtime'))


def sizes(folder: Any) -> Iterator[tuple[pathlib.PurePosixPath, int]]:
  """See `files.sizes`."""
  import fsspec
  found = fsspec.filesystem('gcs').find(str(folder), detail=True)
  for file, about in found.items():
    yield pathlib.PurePosixPath(file), about['size']


def remove_leftovers(folder: Any, names: str) -> None:
  """See `files.remove_leftovers`: here `write` leaves none."""
