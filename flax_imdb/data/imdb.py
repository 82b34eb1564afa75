"""IMDB: its archive and its tfds builder; neither needs TensorFlow."""

from collections.abc import Callable, Iterator
import http.client
import io
import pathlib
import re
import socket
import tarfile
import threading
from typing import Any, BinaryIO
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zlib

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import resource
from tensorflow_datasets.core.download.checksums import compute_url_info
from tensorflow_datasets.datasets.imdb_reviews import (
  imdb_reviews_dataset_builder as stock,
)

from flax_imdb.errors import TransientError, UserError
from flax_imdb.terminal import ShowProgress, show_nothing

_PROBE_SECONDS = 3  # tfds alone tries a dead network for 204 s
_STALL_SECONDS = 30  # the longest silence in a download
_CHUNK_BYTES = 1 << 16
COUNT = 100_000  # reviews of the archive, half of them without a label
_REVIEW = re.compile(r'aclImdb/(train|test)/(neg|pos|unsup)/[^/]+\.txt')


def provide_archive(downloads: pathlib.Path, announce: Callable[[str], None],
                    progress: ShowProgress = show_nothing) -> None:
  """Puts IMDB's archive where tfds, in `downloads`, looks for it.

  tfds' own downloader has no timeout, makes ten retries and leaves a broken
  download lying about; this one gives up at once and leaves nothing. `announce`
  is told in one line what is downloaded, and `progress` of its bytes. Raises
  TransientError if the network or the server failed, UserError if the archive
  is another, which it would be again, and OSError if it can't be written.
  """
  ((url, info),) = ImdbReviews.url_infos.items()
  cached = resource.get_dl_fname(url, info.checksum)
  if any(resource.is_locally_cached(folder / cached)
         for folder in (downloads / ImdbReviews.name, downloads)):
    return  # stock tfds has downloaded it, and checked it
  # The place for archives put there by hand; stock tfds looks there too.
  archive = downloads / 'manual' / info.filename
  if archive.exists():
    if compute_url_info(archive).checksum != info.checksum:
      raise UserError(f'{archive} has the wrong SHA-256: delete it, run again')
    return
  fix = (f'run again, put {info.filename} in {archive.parent}, set '
         f'TFDS_DATA_DIR to a directory that holds {ImdbReviews.name}, or use '
         '--config=configs/quickstart.py, which needs no network')
  archive.parent.mkdir(parents=True, exist_ok=True)
  part = archive.with_name(f'incomplete.{uuid.uuid4().hex}')
  try:
    _probe(url)
    announce(f'downloading {url} ({info.size / 1e6:.0f} MB)')
    opener = urllib.request.build_opener()  # urlopen's keeps an old proxy
    with (opener.open(url, timeout=_STALL_SECONDS) as response,
          part.open('wb') as file):
      while chunk := response.read(_CHUNK_BYTES):
        file.write(chunk)
        progress('downloading', file.tell(), info.size)
    got = compute_url_info(part)
    if got.size < int(response.headers.get('Content-Length') or 0):
      raise ConnectionError(f'the connection closed after {got.size} bytes')
    if got.checksum != info.checksum:
      raise UserError(
          f'{url} sent another file than expected (its SHA-256 starts with '
          f'{got.checksum[:8]}, not {info.checksum[:8]}): {fix}')
    part.replace(archive)
  except (urllib.error.URLError, http.client.HTTPException, ConnectionError,
          TimeoutError) as e:
    if isinstance(e, urllib.error.HTTPError):
      e.close()  # it holds the connection
    raise TransientError(f'cannot download {url} ({e}): {fix}') from e
  finally:
    part.unlink(missing_ok=True)


def _probe(url: str) -> None:
  """Raises ConnectionError if the host, or the proxy to it, takes none.

  UserError if what the environment has for a proxy is none.
  """
  parts = urllib.parse.urlsplit(url)
  proxy = urllib.request.getproxies().get(parts.scheme)
  try:
    if proxy and not urllib.request.proxy_bypass(parts.netloc):
      parts = urllib.parse.urlsplit(proxy if '://' in proxy else f'//{proxy}')
    host = parts.hostname
    port = parts.port or (443 if parts.scheme == 'https' else 80)
  except ValueError:  # which quotes it, and a password that may be in it
    raise UserError(f'what {parts.scheme}_proxy is in the environment is no '
                    'address: correct or unset it') from None
  failure: str | None = f'no answer in {_PROBE_SECONDS} s'

  def connect():
    nonlocal failure
    try:
      socket.create_connection((host, port), timeout=_PROBE_SECONDS).close()
      failure = None
    except OSError as e:
      failure = e.strerror or str(e)

  # In a thread, since no timeout reaches the look-up of a name.
  thread = threading.Thread(target=connect, daemon=True)
  thread.start()
  thread.join(_PROBE_SECONDS)
  if failure is not None:
    raise ConnectionError(f'{host}:{port}: {failure}')


def read_archive(path: Any) -> Iterator[tuple[str, BinaryIO]]:
  """Yields name and content of all reviews; UserError if it is damaged."""
  try:
    with tarfile.open(path, 'r|gz') as archive:
      for member in archive:
        if member.isfile() and _REVIEW.fullmatch(member.name):
          content = archive.extractfile(member)
          assert content  # a regular file has one
          yield member.name, io.BytesIO(content.read())
  except (tarfile.TarError, EOFError, zlib.error) as e:
    raise UserError(
        f'{path} is damaged ({e}): delete it and run again') from e


class ImdbReviews(  # type: ignore[call-arg]
    stock.Builder, skip_registration=True):
  """tfds' own imdb_reviews, which reads what this prepares, and vice versa."""

  name = 'imdb_reviews'
  # tfds looks for these two beside the class: without them it would neither
  # find the description nor, silently, check the archive's SHA-256.
  pkg_dir_path = tfds.core.Path(stock.__file__).parent
  url_infos = stock.Builder.url_infos

  def _split_generators(self, dl_manager):
    dl_manager.iter_archive = read_archive  # the stock one needs TensorFlow
    return super()._split_generators(dl_manager)
