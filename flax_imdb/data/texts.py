"""A person's own labelled files, as a data set like the others.

`survey` reads them once and says what is there: columns, rows, classes, what is
left out. The tfds builder then reads them again, and writes ArrayRecord files.
Of a row 11 bytes are kept meanwhile, for a moment 40, and no text.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
import types
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from flax_imdb.data import tables
from flax_imdb.data.classes import MOST as MOST_CLASSES, MOST_CHARACTERS
from flax_imdb.data.tables import shown
from flax_imdb.errors import UserError
from flax_imdb.storage import cache, files
from flax_imdb.terminal import ShowProgress, show_nothing

# In capitals or not. A column of one of these names is the one that is meant.
_TEXT_NAMES = frozenset((
    'text', 'texts', 'review', 'reviews', 'sentence', 'content', 'body',
    'comment', 'message', 'tweet', 'document', 'description', 'reviewtext',
    'review_text'))
_LABEL_NAMES = frozenset((
    'label', 'labels', 'class', 'category', 'sentiment', 'target', 'stars',
    'rating', 'polarity', 'topic', 'intent', 'emotion'))
_SAMPLE = 1_000  # rows that tell two columns apart
SPLITS = ('train', 'validation', 'test')
_LEFT_OUT = 255  # in `Survey.sides`, where others are places in SPLITS
_EMPTY = 65_535  # as the label of a row without a text
# Raise it when other rows are left out or held out of the same files.
_VERSION = 2
# Texts that are held out by their hash, about: more tell no more, and would
# take longer to evaluate than to train.
MOST_HELD_OUT = 25_000


@dataclasses.dataclass(frozen=True)
class Survey:
  """What is in the files, and in which split each row goes."""
  parts: dict[str, list[str]]  # a split, and the files that are given for it
  texts: list[str]  # columns; a text is theirs, joined by spaces
  label: str  # column
  classes: tuple[str, ...]  # in the order of the labels 0, 1, 2, ...
  # uint8 [rows of the part's files]: a place in SPLITS, or _LEFT_OUT.
  sides: dict[str, np.ndarray]
  digest: str

  @property
  def count(self) -> int:
    """The rows that are not left out."""
    return sum(int((side != _LEFT_OUT).sum()) for side in self.sides.values())


def given(data: ConfigDict) -> dict[str, list[tuple[str, int, str]]]:
  """The files of each split, as `files.find` has them; looks at no content.

  Raises UserError if a file is missing, is none or is given twice.
  """
  parts = {split: _found(data, f'{split}_file') for split in SPLITS
           if data[f'{split}_file']}
  known: dict[str, str] = {}
  for split, found in parts.items():
    for path, *_ in found:
      real = path if '://' in path else os.path.realpath(path)
      if real in known:
        raise UserError(
            f'{path} is in config.data.{known[real]}_file and in config.data.'
            f'{split}_file: what was learned would be what is tested; give '
            f'another, or leave out --config.data.{split}_file')
      known[real] = split
  return parts


def _found(data: ConfigDict, field: str) -> list[tuple[str, int, str]]:
  pattern, flag = data[field], f'--config.data.{field}'
  try:
    found = files.find(pattern)
  except IsADirectoryError as e:
    raise UserError(
        f'{flag}={pattern} is or holds a directory, {e.filename}: give a file, '
        f"or a pattern such as '{pattern.rstrip('/')}/*.csv'") from e
  except Exception as e:
    files.raise_failure(e, f'cannot read {flag}={pattern}',
                        'see that it is a file that can be read')
    raise
  if not found:
    what = ('no file has a name like that' if set(pattern) & set('*?[') else
            'there is no such file')
    raise UserError(f'{flag}={pattern}: {what}, seen from {os.getcwd()}')
  for path, *_ in found:
    tables.kind(path)
  return found


def digest(data: ConfigDict) -> str:
  """16 hex digits for the files as they are, and all that is made of them.

  Raises UserError as `given`.
  """
  about = [given(data), data.text_field, data.label_field, data.test_fraction,
           tables.VERSION, _VERSION]
  return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def directory(data: ConfigDict) -> pathlib.Path:
  """Where tfds puts the files as a data set, made or not; raises as `given`."""
  return cache.directory() / 'tfds' / f'files-{digest(data)}'


def hashed(text: str, use: str = '') -> int:
  """A number from 0 to 2**64 - 1 that equal texts have in common.

  Divided by 2**64 it says who is held out; for each `use` another.
  """
  return int.from_bytes(hashlib.blake2b(
      text.encode(), digest_size=8, person=use.encode()).digest(), 'big')


def share(fraction: float, n: int) -> np.uint64:
  """What the `hashed` of a text held out is under, of n of which a share is.

  Of many texts a smaller one: about `MOST_HELD_OUT` of them.
  """
  return np.uint64(int(min(fraction, MOST_HELD_OUT / max(n, 1)) * 2**64))


class _Classes:
  """The classes in the order in which they are met.

  Attributes:
    numbers: of each its number in that order.
    places: of each, by its number, and each part the first file and row.
  """

  def __init__(self):
    self.numbers: dict[str, int] = {}
    self.places: dict[tuple[str, int], tuple[str, int]] = {}
    self._type: tuple[type, str] | None = None  # and where it was met

  def number(self, part: str, path: str, row: int, value: Any,
             typed: bool) -> int:
    """The number of a label, perhaps a new one; UserError if it is none.

    `typed` says that the file tells texts from numbers.
    """
    if typed and (self._type is None or type(value) is not self._type[0]):
      self._check_type(tables.place(path, row), value)
    name = _name(value)
    number = self.numbers.get(name)
    if number is None:
      self._check_name(tables.place(path, row), name)
      self.numbers[name] = number = len(self.numbers)
    self.places.setdefault((part, number), (path, row))
    return number

  def _check_type(self, where: str, value: Any) -> None:
    """Raises UserError for a label that is not of the type of the others."""
    if value is None:
      return  # it is missing, whatever the type
    kind = type(value).__name__
    if type(value) not in (str, int, bool):
      raise UserError(f'{where}: the label {shown(str(value))} is of type '
                      f'{kind}: give texts, whole numbers, or true and false')
    if self._type:
      raise UserError(
          f'{where}: the label {shown(str(value))} is of type {kind}, but '
          f'that of {self._type[1]} of type {self._type[0].__name__}: give one '
          'type')
    self._type = type(value), where

  def _check_name(self, where: str, name: str) -> None:
    """Raises UserError for what is not the name of one class more."""
    fix = 'choose another column with --config.data.label_field'
    if not name:
      raise UserError(f'{where}: the label is missing: give it one, or leave '
                      'the row out')
    if len(name) > MOST_CHARACTERS or not name.isprintable():
      raise UserError(
          f'{where}: the label {shown(name)} has more than {MOST_CHARACTERS} '
          f'characters, or some that can not be printed: shorten it, or {fix}')
    if len(self.numbers) == MOST_CLASSES:
      raise UserError(
          f'{where}: the label {shown(name)} is that of class '
          f'{MOST_CLASSES + 1:,}: is this a column of numbers or of texts? If '
          f'so, {fix}')


def _name(label: Any) -> str:
  """What a class is called by its label."""
  if isinstance(label, bool):
    return str(label).lower()
  return '' if label is None else str(label).strip()


def _in_order(names: Sequence[str]) -> list[str]:
  """Names sorted, by their size if all are whole numbers."""
  if all(re.fullmatch(r'[+-]?[0-9]{1,18}', name) for name in names):
    return sorted(names, key=lambda name: (int(name), name))
  return sorted(names)


def survey(data: ConfigDict, announce: Callable[[str], None],
           progress: ShowProgress = show_nothing) -> Survey:
  """Reads the files of config.data once, and says what it found.

  `announce` is told the columns and the first rows at once, and then rows,
  classes and what is left out: empty texts, rows of one part that repeat text
  and label, and all rows of a text that has two labels there, for nobody knows
  which is right. `progress` is told of each row. Raises UserError, with file
  and line, as `tables.read`, and for what is no data set of two classes or
  more.
  """
  key = digest(data)
  parts = {part: [path for path, *_ in found]
           for part, found in given(data).items()}
  first = parts['train'][0]
  texts, label = _columns(data, first)
  for path in itertools.chain(*parts.values()):
    _check_columns(path, [*texts, label])
  announce(f'{first}: text is {" + ".join(map(shown, texts))}, label is '
           f'{shown(label)}; the first rows:')
  for _, text, value in itertools.islice(_rows(first, texts, label), 3):
    announce(f'  {shown(_name(value))}: {shown(text)}')
  classes = _Classes()
  read = {part: _read(part, parts[part], texts, label, classes, progress)
          for part in parts}
  kept = {part: _kept(part, *read[part], announce) for part in parts}
  # int [classes met] rows of each class, by the order in which it was met.
  counts = {part: np.bincount(labels[kept[part]], minlength=len(
      classes.numbers)) for part, (_, labels) in read.items()}
  names = _in_order([name for name, i in classes.numbers.items()
                     if any(count[i] for count in counts.values())])
  for part, count in counts.items():
    for name in names:
      if count[i := classes.numbers[name]] and not counts['train'][i]:
        raise UserError(
            f'{tables.place(*classes.places[part, i])}: the label '
            f'{shown(name)} is in no row to learn from, of config.data.'
            f'train_file: give it some, or leave it out of {part}_file')
    announce(f'{part}: {len(names):,} classes: ' + _several(
        names, [count[classes.numbers[name]] for name in names]))
  _check_classes(first, names)
  sides = {part: np.where(kept[part], SPLITS.index(part), _LEFT_OUT).astype(
      np.uint8) for part in parts}
  if 'test' not in parts and data.test_fraction:
    held_out = _held_out(*read['train'], kept['train'], data.test_fraction)
    sides['train'][held_out] = SPLITS.index('test')
    announce(f'held out to test by a hash of the text: {held_out.sum():,} of '
             f'{kept["train"].sum():,}')
  return Survey(parts, texts, label, tuple(names), sides, key)


def _columns(data: ConfigDict, path: str) -> tuple[list[str], str]:
  """The columns of the text, and that of the label.

  Those of config.data, else those whose names say so, else the only two, of
  which the label's has fewer values. Raises UserError if it is not plain.
  """
  names = tables.columns(path)
  texts = data.text_field.split('+') if data.text_field else [
      x for x in names if x.strip().lower() in _TEXT_NAMES]
  labels = [data.label_field] if data.label_field else [
      x for x in names if x.strip().lower() in _LABEL_NAMES]
  if not data.text_field and len(texts) > 1:
    texts = [x for x in texts if x.strip().lower() == 'text'][:1]
  if not data.label_field and len(labels) > 1:
    labels = [x for x in labels if x.strip().lower() == 'label'][:1]
  if len(names) == 2 and not (texts and labels):
    _check_header(path, names)
    others = [x for x in names if x not in (*texts, *labels)]
    if len(others) == 1:
      texts, labels = texts or others, labels or others
    else:
      texts, labels = _told_apart(path, names)
  if not texts or not labels:
    missing = ' and '.join(
        f'--config.data.{field}' for field, found in
        (('text_field', texts), ('label_field', labels)) if not found)
    raise UserError(
        f'{tables.place(path, 1)} has the columns {_several(names)}: say which '
        f'is the text and which the label with {missing}, or add a line of '
        'names if it is none')
  return texts, labels[0]


def _told_apart(path: str, names: Sequence[str]) -> tuple[list[str], list[str]]:
  """Of two columns the text's and the label's, which has fewer values."""
  rows = [row for _, row in itertools.islice(tables.read(path, names), _SAMPLE)]
  counts = [len({str(row[i]) for row in rows}) for i in range(2)]
  if counts[0] == counts[1]:
    return [], []
  text = int(counts[0] < counts[1])
  return [names[text]], [names[1 - text]]


def _check_header(path: str, names: Sequence[str]) -> None:
  """Raises UserError if what should be the names of two columns are values.

  A number is no name, nor is a sentence, nor what the rows below hold, too.
  """
  if tables.kind(path) not in ('csv', 'tsv'):
    return
  rows = [row for _, row in itertools.islice(tables.read(path, names), _SAMPLE)]
  for i, name in enumerate(names):
    if (name.strip().lstrip('+-').replace('.', '', 1).isdigit()
        or len(name) > tables.SHOWN or any(row[i] == name for row in rows)):
      raise UserError(
          f'{tables.place(path, 1)}: {shown(name)} is no name of a column: '
          'put a line of names above it, such as text,label')


def _check_columns(path: str, wanted: Sequence[str]) -> None:
  """Raises UserError if a file lacks columns."""
  names = tables.columns(path)
  for name in wanted:
    if name not in names:
      raise UserError(f'{path} has no column {shown(name)}: there are '
                      f'{_several(names)}; see --config.data.text_field and '
                      '--config.data.label_field')


def _rows(path: str, texts: Sequence[str],
          label: str) -> Iterator[tuple[int, str, Any]]:
  """The line, the text and the label of each row of a file."""
  for row, (*cells, value) in tables.read(path, [*texts, label]):
    for cell in cells:
      if cell is not None and not isinstance(cell, str):
        raise UserError(
            f'{tables.place(path, row)}: the text {shown(str(cell))} is of '
            f'type {type(cell).__name__}: put it in quotes, or choose the '
            'column with --config.data.text_field')
    text = ' '.join(cell for cell in cells if cell)
    if not text.isascii():
      try:
        text.encode()
      except UnicodeEncodeError as e:
        raise UserError(
            f'{tables.place(path, row)}: the text holds half a character, '
            f'{text[e.start]!r}: mend what wrote it') from e
    if '\0' in text:
      raise UserError(f'{tables.place(path, row)}: the text holds a NUL '
                      'character: mend what wrote it')
    yield row, text, value


def _read(part: str, paths: Sequence[str], texts: Sequence[str], label: str,
          classes: _Classes,
          progress: ShowProgress) -> tuple[np.ndarray, np.ndarray]:
  """Of each row the `hashed` text, uint64 [n], and its class, uint16 [n].

  The class is its number in `classes`, or _EMPTY where there is no text.
  """
  hashes, labels = array('Q'), array('H')
  for path in paths:
    typed = tables.kind(path) in ('json', 'parquet')
    for row, text, value in _rows(path, texts, label):
      if not text.strip():
        hashes.append(0)
        labels.append(_EMPTY)
      else:
        hashes.append(hashed(text))
        labels.append(classes.number(part, path, row, value, typed))
      progress(f'reading {part}', len(labels), 0)
  return np.array(hashes, np.uint64), np.array(labels, np.uint16)


def _kept(part: str, hashes: np.ndarray, labels: np.ndarray,
          announce: Callable[[str], None]) -> np.ndarray:
  """The rows of a part that are kept, bool [n]; says why others are not."""
  kept = labels != _EMPTY
  empty = len(kept) - kept.sum()
  # Rows of a text stand together, by their labels, the first of them in front.
  order = np.lexsort((labels, hashes))
  order = order[kept[order]]
  same_text = np.diff(hashes[order]) == 0
  same_label = np.diff(labels[order]) == 0
  kept[order[1:][same_text & same_label]] = False
  of_text = np.cumsum(np.append(True, ~same_text))[:len(order)]
  contradict = order[np.isin(of_text, of_text[1:][same_text & ~same_label])]
  kept[contradict] = False
  repeated = len(kept) - kept.sum() - empty - len(contradict)
  announce(f'{part}: {len(kept):,} rows; left out: {empty:,} without a text, '
           f'{repeated:,} repeated, {len(contradict):,} whose text has two '
           'labels')
  return kept


def _check_classes(path: str, names: Sequence[str]) -> None:
  """Raises UserError if there is nothing to be learned."""
  if not names:
    raise UserError(f'{path}: there are no rows to learn from')
  if len(names) == 1:
    raise UserError(
        f'{path}: there is one class, {shown(names[0])}, and nothing to tell '
        'apart: choose another column with --config.data.label_field')


def _held_out(hashes: np.ndarray, labels: np.ndarray, kept: np.ndarray,
              fraction: float) -> np.ndarray:
  """The rows that test, bool [n]: a share by the hash of their text.

  The share of `share` of those kept. A class whose rows would all do so, by
  chance, is learned from instead. Raises UserError if none is left.
  """
  held_out = kept & (hashes < share(fraction, int(kept.sum())))
  held_out &= np.isin(labels, labels[kept & ~held_out])
  if not held_out.any():
    raise UserError(
        f'none of the {kept.sum():,} rows is in the share of {fraction} that '
        'is held out to test: give more rows, or --config.data.test_file')
  return held_out


def _several(names: Sequence[str], counts: Sequence[int] | np.ndarray = (),
             most: int = 20) -> str:
  """Some names, and how many there are of each."""
  first = [shown(name) + (f' {counts[i]:,}' if len(counts) else '')
           for i, name in enumerate(names[:most])]
  more = len(names) - most
  return ', '.join(first) + (f' and {more:,} more' if more > 0 else '')


def _shuffle_without_tensorflow() -> None:
  """Lets tfds sort on disk what is more than 64 MB, into the same order.

  By itself it holds 1 GB in memory, and then opens 1,000 files by TensorFlow's
  functions, which it has no other use for.
  """
  from tensorflow_datasets.core import shuffle
  shuffle.MAX_MEM_BUFFER_SIZE = 64 << 20
  shuffle.BUCKETS_NUMBER = 128  # a process may have 256 files open, or more
  shuffle.tf = types.SimpleNamespace(
      io=types.SimpleNamespace(gfile=types.SimpleNamespace(
          GFile=open, exists=os.path.exists, remove=os.remove)),
      errors=types.SimpleNamespace(ResourceExhaustedError=()))


def builder(data: ConfigDict, found: Survey) -> Any:
  """The tfds builder of the files: a class.

  It raises UserError if they have changed since the survey, and leaves nothing.
  """
  import tensorflow_datasets as tfds  # 0.3 s, which a cached run has no use for

  _shuffle_without_tensorflow()
  classes = {name: i for i, name in enumerate(found.classes)}

  class Files(  # type: ignore[call-arg]
      tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The rows that are not left out."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self) -> tfds.core.DatasetInfo:
      return tfds.core.DatasetInfo(
          builder=self, supervised_keys=('text', 'label'),
          description='Labelled texts from files.',
          features=tfds.features.FeaturesDict({
              'text': tfds.features.Text(),
              'label': tfds.features.ClassLabel(names=[*found.classes])}))

    def _split_generators(self, dl_manager):
      del dl_manager  # nothing is downloaded
      there = np.unique(np.concatenate([*found.sides.values()]))
      return {split: self._generate_examples(i)
              for i, split in enumerate(SPLITS) if i in there}

    def _generate_examples(self, side: int):
      for part, sides in found.sides.items():
        if side not in sides:
          continue
        rows = itertools.chain.from_iterable(
            _rows(path, found.texts, found.label) for path in found.parts[part])
        for key, (_, text, label) in enumerate(rows):
          if key < len(sides) and sides[key] == side:
            yield key, {'text': text, 'label': classes.get(_name(label), -1)}
      if digest(data) != found.digest:
        raise UserError(f'{data.train_file} or another file was written while '
                        'it was read: run again')

  Files.name = 'files'
  return Files
