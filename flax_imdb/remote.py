"""Run directories in an object store: gs://BUCKET/DIR.

Their paths are `epath.Path`s, which go through gcsfs, as orbax' own do; the
arrays go through TensorStore, which talks to the store by itself. All that is
imported for a remote directory only.
"""

from collections.abc import Iterator
import functools
import importlib.util
import logging
import os
import pathlib
import re
import sys
from typing import Any

from flax_imdb.errors import UserError

# Without the characters that mean something in a pattern or a URL: orbax would
# write what follows a # or ? to another place.
_NAME = re.compile(r'gs://([a-z0-9][a-z0-9._-]+[a-z0-9])((?:/[^/#?*\[\]]+)+)')
_SECONDS = 10  # that a request of `_reach` may take, and its repetitions
# Whose errors mean that the store was not reached, or refused.
_CLIENTS = ('gcsfs', 'google.api_core', 'google.auth', 'google.cloud',
            'aiohttp', 'requests')
_TENSORSTORE = re.compile(
    '(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED'
    '|RESOURCE_EXHAUSTED)[^[]*')


class StoreError(Exception):
  """The store or the way to it failed; a run started again may go on."""


def is_remote(path: str | os.PathLike[str]) -> bool:
  """True for what has a scheme, such as gs://; looks at the text only."""
  return '://' in os.fspath(path)


def name(path: str) -> str:
  """A remote directory's name as all write it, without a / at its end.

  Raises:
    UserError: it is none of Google Cloud Storage, or one that not all clients
      read in the same way.
  """
  found = re.sub('(?<!:)/+', '/', path).rstrip('/')
  parts = found.split('/')
  if not _NAME.fullmatch(found) or not found.isprintable() or (
      {'.', '..'} & set(parts)):
    raise UserError(
        f'{path}: remote directories are not supported but for '
        'gs://BUCKET/DIR, with none of # ? * [ ] in it')
  return found


def path(where: str) -> Any:
  """The `epath.Path` of a remote directory, whose bucket is to be reached.

  Raises:
    UserError: as `name`; a package or credentials are missing, or the bucket
      can't be reached or is not there.
  """
  where = name(where)
  # TensorFlow, where it is installed, would be imported to reach the store.
  os.environ.setdefault('EPATH_USE_TF', 'false')
  # Another protocol, which needs other rights, for other kinds of buckets.
  os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
  _reach(where.split('/')[2])
  from etils import epath
  return epath.Path(where)


@functools.cache
def _reach(bucket: str) -> None:
  """Raises a UserError if a bucket can't be reached, once for each."""
  if not importlib.util.find_spec('gcsfs'):
    raise UserError('gs:// needs gcsfs: pip install gcsfs, or .[gcs] or .[tpu]')
  import fsspec
  import gcsfs  # noqa: F401
  import google.api_core.exceptions as api
  import google.auth.exceptions as auth
  from google.cloud import storage

  for client in _CLIENTS:  # they print the errors that they also raise
    logging.getLogger(client).setLevel(logging.CRITICAL)
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

  None for errors that say something of a file, such as that it is missing, and
  for all that has nothing to do with a store.
  """
  if 'gcsfs' not in sys.modules:  # nothing here is remote
    return None
  module = type(error).__module__
  text = ' '.join(str(error).split())
  if 'os_error_code=' in text:  # TensorStore's, of a local disk
    return None
  if found := _TENSORSTORE.match(text):
    return found[0].strip()[:400]
  if module.startswith(_CLIENTS) or (
      isinstance(error, OSError) and text.startswith('Forbidden: ')):
    return (text or type(error).__name__)[:400]
  return None


def raise_failure(error: Exception, what: str) -> None:
  """Raises a StoreError that says what failed, if `failure` knows why."""
  if why := failure(error):
    raise StoreError(f'{what} ({why}): look at the network, and started again '
                     'it goes on from the last checkpoint') from error


def sizes(folder: Any) -> Iterator[tuple[pathlib.PurePosixPath, int]]:
  """Yields name and size in bytes of all files below a remote directory."""
  import fsspec

  found = fsspec.filesystem('gcs').find(str(folder), detail=True)
  for file, about in found.items():
    yield pathlib.PurePosixPath(file), about['size']


def move(source: Any, target: Any) -> None:
  """Copies all of a remote directory, then removes it; errors as `failure`."""
  import fsspec

  store = fsspec.filesystem('gcs')
  found = store.find(str(source))
  above = len(str(source).removeprefix('gs://'))
  store.copy(found, [f'{target}{file[above:]}' for file in found])
  store.rm(found)
