"""The data sets, as tfds prepares them: texts and labels, without TensorFlow.

Only this, `imdb` and `grammar` talk to tfds, which is imported to prepare or
to read: most runs have a cache, and the fingerprint tells if it is still good.

The program prepares by itself IMDB, the generated reviews and a person's own
files; any other set with a text and a class label is read where tfds has
prepared it.
"""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import io
import itertools
import os
import pathlib
import re
import struct
import time
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from flax_imdb.data import texts
from flax_imdb.errors import UserError
from flax_imdb.storage import cache
from flax_imdb.terminal import ShowProgress, show_nothing

# What the labels 0 and 1 of the sets of `PATHS` are called; tfds says neg, pos.
LABELS = ('negative', 'positive')
# Each such set's directory below its `data_dir`: name, config, version.
PATHS = {'imdb_reviews': 'imdb_reviews/plain_text/1.0.0',
         'grammar_reviews': 'grammar_reviews/1.0.0'}
_FILES = 'files/1.0.0'  # the same of a person's own files
_VERSION = re.compile(r'\d+\.\d+\.\d+')


def data_dir(name: str) -> pathlib.Path:
  """The directory that a data set lies under, made or not.

  Raises UserError if it is not a local one.
  """
  if name == 'grammar_reviews':  # tfds' own directory may be read-only
    return cache.directory() / 'tfds'
  root = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  if '://' in root:
    raise UserError(
        f'TFDS_DATA_DIR is {root}, which only TensorFlow can read: copy '
        f'{PATHS.get(name, name)} to a local directory and set TFDS_DATA_DIR '
        'to that')
  try:
    return pathlib.Path(root).expanduser()
  except RuntimeError as e:
    raise UserError(f'TFDS_DATA_DIR is {root}, and there is no such home '
                    'directory: set it to another') from e


def _prepared(data: ConfigDict) -> pathlib.Path | None:
  """The prepared directory, None if there is none.

  Raises UserError if it is incomplete, or as `texts.given`.
  """
  if data.name in PATHS:
    path = data_dir(data.name) / PATHS[data.name]
  elif data.name == 'files':
    path = texts.directory(data) / _FILES
  elif found := _newest(data.name):
    path = found
  else:
    return None
  if not os.path.exists(path):  # unlike Path.exists, False where forbidden
    return None
  # tfds renames a directory into place when it is complete; one that lacks
  # these was copied by hand, and tfds would take it for prepared.
  for needed in ('dataset_info.json', 'features.json'):
    if not os.access(path / needed, os.R_OK):
      raise UserError(f'{path} is incomplete, it has no readable {needed}: '
                      'delete it and run again')
  return path


def _newest(name: str) -> pathlib.Path | None:
  """The newest version of a set that tfds prepared, such as glue/sst2.

  None if there is none. Raises UserError if it has several configs.
  """
  path = data_dir(name) / name
  try:
    below = sorted(x.name for x in path.iterdir() if x.is_dir())
    versions = [x for x in below if _VERSION.fullmatch(x)]
    if not versions and '/' not in name:
      below = [x for x in below if any(
          _VERSION.fullmatch(y.name) for y in (path / x).iterdir())]
      if len(below) > 1:
        raise UserError(f'config.data.name={name} has several configs: give '
                        f'{" or ".join(f"{name}/{x}" for x in below)}')
      return _newest(f'{name}/{below[0]}') if below else None
  except OSError:
    return None
  return path / max(
      versions, key=lambda x: [*map(int, x.split('.'))]) if versions else None


def fingerprint(data: ConfigDict) -> str | None:
  """16 hex digits that change with the prepared data; None without.

  Looks at names, sizes and dataset_info.json only, and of a person's own files
  at their times, too: it takes a millisecond. Raises UserError if the directory
  is not complete, or these files are not there.
  """
  if not (path := _prepared(data)):
    return None
  files = sorted((file.name, file.stat().st_size) for file in path.iterdir())
  about = repr(files).encode() + (path / 'dataset_info.json').read_bytes()
  if data.name == 'files':
    about += texts.digest(data).encode()
  elif data.text_field or data.label_field:
    about += repr((data.text_field, data.label_field)).encode()
  return hashlib.sha256(about).hexdigest()[:16]


def prepare(data: ConfigDict, announce: Callable[[str], None],
            progress: ShowProgress = show_nothing) -> str:
  """Makes the prepared directory of the data set of config.data, once.

  Several processes may prepare the same data: each works in a directory of its
  own, the first to finish renames it into place, the others use that.
  `announce` is told in one line what is done, and how long it took, and
  `progress` of each text.

  Returns the `fingerprint`. Raises UserError if the set is not one that is
  prepared here and not there, the archive can't be had or is damaged, or the
  directory can't be written.
  """
  if not _prepared(data):
    if data.name not in (*PATHS, 'files'):
      raise UserError(
          f'{data.name} is not in {data_dir(data.name)}, and to prepare it '
          'takes TensorFlow: pip install tensorflow-cpu tensorflow-datasets && '
          f'tfds build {data.name} --file_format=array_record, elsewhere if '
          'need be, and set TFDS_DATA_DIR to where that is')
    _make(data, announce, progress)
  prepared = fingerprint(data)
  if not prepared:
    raise UserError(f'{data.train_file} or another file was written while it '
                    'was read: run again')
  return prepared


def _make(data: ConfigDict, announce: Callable[[str], None],
          progress: ShowProgress) -> None:
  start = time.perf_counter()
  found = texts.survey(data, announce, progress) if (
      data.name == 'files') else None
  import tensorflow_datasets as tfds

  from flax_imdb.data import grammar, imdb  # which import tfds, too: 0.3 s

  root = texts.directory(data) if found else data_dir(data.name)
  path = root / (_FILES if found else PATHS[data.name])
  tfds.disable_progress_bar()
  try:
    builder: Any = grammar.GrammarReviews
    count = grammar.COUNT
    if found:
      builder, count = texts.builder(data, found), found.count
    elif data.name == 'imdb_reviews':
      imdb.provide_archive(root / 'downloads', announce, progress)
      builder, count = imdb.ImdbReviews, imdb.COUNT
    with contextlib.redirect_stdout(io.StringIO()):  # tfds prints banners
      made = builder(data_dir=root, file_format='array_record')
      _count(made, lambda done: progress('preparing texts', done, count))
      made.download_and_prepare(
          download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  except (OSError, RuntimeError) as e:
    # array_record names the system call: 'write() failed: File too large; ...'
    called = re.search(r'\(\) failed: ([^;]+)', str(e))
    if isinstance(e, RuntimeError) and not called:
      raise
    reason = called[1] if called else getattr(e, 'strerror', 0) or e
    if os.path.exists(path):  # another process was faster
      return
    variable = ('TFDS_DATA_DIR' if data.name == 'imdb_reviews' else
                'XDG_CACHE_HOME')
    raise UserError(
        f'cannot prepare {data.name} in {root} ({reason}): set {variable} to a '
        'directory that can be written to and has room') from e
  finally:
    for below in ('downloads/extracted', 'downloads', 'files', '') if (
        found) else ():
      with contextlib.suppress(OSError):  # it is not there, or not empty
        (root / below).rmdir()
  announce(f'prepared {data.name} in {time.perf_counter() - start:.1f} s')


def _count(builder: Any, tell: Callable[[int], None]) -> None:
  """Lets a tfds builder tell how many examples it has made so far."""
  generate, done = builder._generate_examples, itertools.count(1)
  def counted(*args: Any, **kwargs: Any) -> Iterator[Any]:
    for example in generate(*args, **kwargs):
      yield example
      tell(next(done))
  builder._generate_examples = counted


def class_names(data: ConfigDict) -> tuple[str, ...]:
  """The names of the labels 0, 1, 2, ... of a prepared data set.

  Raises UserError as `read_texts`.
  """
  if data.name in PATHS:
    return LABELS
  with _reading(data) as builder:
    names = builder.info.features[_fields(data, builder)[1]].names
  if len(names) < 2:
    raise UserError(f'{data.name} has one class, {", ".join(names)}: there is '
                    'nothing to tell apart')
  return tuple(names)


def count_texts(data: ConfigDict, split: str) -> int:
  """How many texts a split has, at least 1; raises as `read_texts`."""
  with _reading(data) as builder:
    return _selected(data, builder, split).num_examples


def read_texts(data: ConfigDict, split: str, start: int = 0,
               stop: int | None = None) -> tuple[list[str], np.ndarray]:
  """Reads one split of the prepared data set of config.data, in tfds' order.

  `split` is a tfds expression, such as 'train' or 'train[:10%]', and `start`
  and `stop` say which n of its texts to read, by default all. Returns these,
  and their labels as int16 [n], places in `class_names`, or -1 for none. Raises
  UserError if the set is not prepared or is damaged, the split unknown or
  empty, or there is not one text and one label to be read.
  """
  with _reading(data) as builder:
    selected = _selected(data, builder, split)
    rows = range(selected.num_examples)[start:stop]
    texts_of, label = _fields(data, builder)
    if builder.info.file_format.value == 'tfrecord':
      decode = builder.info.features.deserialize_example_np
      examples = [decode(record) for record in itertools.islice(
          (record for instruction in selected.file_instructions
           for record in _tfrecords(instruction)), rows.start, rows.stop)]
    else:
      # One batched call takes half the time of n single ones.
      examples = builder.as_data_source(split).__getitems__(rows)
    texts = [' '.join(example[field].decode() for field in texts_of)
             for example in examples]
    labels = np.array([example[label] for example in examples], np.int16)
  return texts, labels


def _selected(data: ConfigDict, builder: Any, split: str) -> Any:
  """What tfds knows of a split; UserError if it is unknown or empty."""
  splits = builder.info.splits
  try:
    selected = splits[split]
  except ValueError as e:
    raise UserError(f'unknown split {split!r}: {data.name} has '
                    f'{", ".join(splits)}, and slices of them such as '
                    "'train[:10%]'") from e
  if selected.num_examples <= 0:  # tfds gives 'train[5:3]' -2
    raise UserError(f'split {split!r} of {data.name} selects no reviews')
  return selected


@contextlib.contextmanager
def _reading(data: ConfigDict) -> Iterator[Any]:
  """The tfds builder of a prepared set; whatever fails there is a UserError."""
  if not (path := _prepared(data)):
    raise UserError(f'{data.name} is not prepared: run with --mode=prepare')
  import tensorflow_datasets as tfds

  # For a damaged file tfds, protobuf and array_record raise seven types that
  # have only Exception in common; the chained error keeps the details.
  try:
    yield tfds.builder_from_directory(path)
  except UserError:
    raise
  except Exception as e:
    reason = str(e).partition('\n')[0]
    raise UserError(
        f'{path} is damaged ({reason}): delete it and run again') from e


def _fields(data: ConfigDict, builder: Any) -> tuple[list[str], str]:
  """The features that hold text, and the one that is the label.

  Those of config.data, or what tfds says is learned from what, or the only ones
  of their types. Raises UserError if there is none, or there are several.
  """
  import tensorflow_datasets as tfds
  features = builder.info.features
  supervised = builder.info.supervised_keys or ('', '')
  found = []
  for field, kind, key in (
      ('text_field', tfds.features.Text, supervised[0]),
      ('label_field', tfds.features.ClassLabel, supervised[1])):
    known = sorted(
        name for name, x in features.items() if isinstance(x, kind))
    chosen = '' if data.name == 'files' else data[field]  # joined already
    wanted = chosen.split('+') if chosen else (
        [key] if key in known else known)
    if not chosen and len(wanted) != 1 or not {*wanted} <= {*known} or (
        field == 'label_field' and len(wanted) > 1):
      of = f'--config.data.{field}={chosen}: {data.name}'
      raise UserError(
          f'{of} has no such feature: choose {", ".join(known)}' if known and (
              chosen) else
          f'{data.name} has several features of a kind: give --config.data.'
          f'{field}, one of {", ".join(known)}' if known else
          f'{data.name} has no {kind.__name__} among its features, '
          f'{", ".join(features)}: choose another data set')
    found.append(wanted)
  texts, (label,) = found
  return texts, label


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
