"""The data sets, as tfds prepares them: texts and labels, without TensorFlow.

Only this, `imdb` and `grammar` talk to tfds, which is imported to prepare or
to read: most runs have a cache, and the fingerprint tells if it is still good.
"""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import io
import os
import pathlib
import re
import struct
import time
from typing import Any

import numpy as np

from flax_imdb.errors import UserError
from flax_imdb.storage import cache

# Each data set's directory below its `data_dir`: name, config, version.
PATHS = {'imdb_reviews': 'imdb_reviews/plain_text/1.0.0',
         'grammar_reviews': 'grammar_reviews/1.0.0'}


def data_dir(name: str) -> pathlib.Path:
  """The directory that `PATHS[name]` lies under, made or not.

  Raises UserError if the name is unknown, or the directory not a local one.
  """
  if name not in PATHS:
    raise UserError(f'unknown data set {name!r}: known are {", ".join(PATHS)}')
  if name == 'grammar_reviews':  # tfds' own directory may be read-only
    return cache.directory() / 'tfds'
  root = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  if '://' in root:
    raise UserError(
        f'TFDS_DATA_DIR is {root}, which only TensorFlow can read: copy '
        f'{PATHS[name]} to a local directory and set TFDS_DATA_DIR to that')
  try:
    return pathlib.Path(root).expanduser()
  except RuntimeError as e:
    raise UserError(f'TFDS_DATA_DIR is {root}, and there is no such home '
                    'directory: set it to another') from e


def _prepared(name: str) -> pathlib.Path | None:
  """The prepared directory, None if there is none; UserError if incomplete."""
  path = data_dir(name) / PATHS[name]
  if not os.path.exists(path):  # unlike Path.exists, False where forbidden
    return None
  # tfds renames a directory into place when it is complete; one that lacks
  # these was copied by hand, and tfds would take it for prepared.
  for needed in ('dataset_info.json', 'features.json'):
    if not os.path.exists(path / needed):
      raise UserError(f'{path} is incomplete, it has no readable {needed}: '
                      'delete it and run again')
  return path


def fingerprint(name: str) -> str | None:
  """16 hex digits that change with the prepared data; None without.

  Looks at names, sizes and dataset_info.json only: it takes a millisecond.
  Raises UserError if the name is unknown or the directory is not complete.
  """
  if not (path := _prepared(name)):
    return None
  files = sorted((file.name, file.stat().st_size) for file in path.iterdir())
  about = repr(files).encode() + (path / 'dataset_info.json').read_bytes()
  return hashlib.sha256(about).hexdigest()[:16]


def prepare(name: str, announce: Callable[[str], None]) -> str:
  """Makes the prepared directory of a data set, a key of `PATHS`, once.

  Several processes may prepare the same data: each works in a directory of its
  own, the first to finish renames it into place, the others use that.
  `announce` is told in one line what is done, and how long it took.

  Returns the `fingerprint`. Raises UserError if the name is unknown, the
  archive can't be had or is damaged, or the directory can't be written.
  """
  if not _prepared(name):
    _download_and_prepare(name, announce)
  prepared = fingerprint(name)
  assert prepared
  return prepared


def _download_and_prepare(name: str, announce: Callable[[str], None]) -> None:
  start = time.perf_counter()
  import tensorflow_datasets as tfds

  from flax_imdb.data import grammar, imdb  # which import tfds, too: 0.3 s

  root = data_dir(name)
  tfds.disable_progress_bar()
  try:
    builder: Any = grammar.GrammarReviews
    if name == 'imdb_reviews':
      imdb.provide_archive(root / 'downloads', announce)
      builder = imdb.ImdbReviews
    with contextlib.redirect_stdout(io.StringIO()):  # tfds prints banners
      builder(data_dir=root, file_format='array_record').download_and_prepare(
          download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  except (OSError, RuntimeError) as e:
    # array_record names the system call: 'write() failed: File too large; ...'
    called = re.search(r'\(\) failed: ([^;]+)', str(e))
    if isinstance(e, RuntimeError) and not called:
      raise
    reason = called[1] if called else getattr(e, 'strerror', 0) or e
    if _prepared(name):  # another process was faster
      return
    variable = 'TFDS_DATA_DIR' if name == 'imdb_reviews' else 'XDG_CACHE_HOME'
    raise UserError(
        f'cannot prepare {name} in {root} ({reason}): set {variable} to a '
        'directory that can be written to and has room') from e
  announce(f'prepared {name} in {time.perf_counter() - start:.1f} s')


def read_texts(name: str, split: str) -> tuple[list[str], np.ndarray]:
  """Reads one split of a prepared data set, a key of `PATHS`, in tfds' order.

  `split` is a tfds expression, such as 'train' or 'train[:10%]'. Returns the n
  texts, and their labels as int8 [n]: 0 negative, 1 positive, -1 none. Raises
  UserError if the set is not prepared or is damaged, or the split unknown or
  empty.
  """
  if not (path := _prepared(name)):
    raise UserError(f'{name} is not prepared: run with --mode=prepare')
  import tensorflow_datasets as tfds

  # For a damaged file tfds, protobuf and array_record raise seven types that
  # have only Exception in common; the chained error keeps the details.
  try:
    builder = tfds.builder_from_directory(path)
    splits = builder.info.splits
    try:
      selected = splits[split]
    except ValueError as e:
      raise UserError(f'unknown split {split!r}: {name} has '
                      f'{", ".join(splits)}, and slices of them such as '
                      "'train[:10%]'") from e
    if (n := selected.num_examples) <= 0:  # tfds gives 'train[5:3]' -2
      raise UserError(f'split {split!r} of {name} selects no reviews')
    if builder.info.file_format.value == 'tfrecord':
      decode = builder.info.features.deserialize_example_np
      examples = [decode(record) for instruction in selected.file_instructions
                  for record in _tfrecords(instruction)]
    else:
      # One batched call takes half the time of n single ones.
      examples = builder.as_data_source(split).__getitems__(range(n))
    texts = [example['text'].decode() for example in examples]
    labels = np.array([example['label'] for example in examples], np.int8)
  except UserError:
    raise
  except Exception as e:
    reason = str(e).partition('\n')[0]
    raise UserError(
        f'{path} is damaged ({reason}): delete it and run again') from e
  return texts, labels


def _tfrecords(instruction: Any) -> Iterator[bytes]:
  """The records that a tfds FileInstruction selects from its file.

  A record is its length (uint64), a CRC of that, the bytes, and their CRC. The
  CRCs are not checked: CRC-32C in Python would take longer than the training.
  """
  data = pathlib.Path(instruction.filename).read_bytes()
  spans, at = [], 0
  while at + 12 <= len(data):
    (length,) = struct.unpack_from('<Q', data, at)
    spans.append(slice(at + 12, at + 12 + length))
    at += length + 16
  if at != len(data) or len(spans) != instruction.examples_in_shard:
    raise UserError(f'{instruction.filename} is damaged (not the '
                    f'{instruction.examples_in_shard} records expected): '
                    'delete its directory and run again')
  chosen = spans[instruction.skip:instruction.skip + instruction.take]
  return (data[span] for span in chosen)
