"""Texts to ids, in one pass and parts, so that any number of them fits.

A part is read and its words are numbered by a process of their own where there
are many texts: both cores work, and this one only joins what they found. What
stays in memory is a part a process, the distinct words, and 18 bytes a text;
the ids go to a file, and are read from there as a map.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import concurrent.futures.process
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import signal
import tempfile
import threading
import time

from ml_collections import ConfigDict
import numpy as np
from tokenizers import Tokenizer

from flax_imdb import environment
from flax_imdb.data import sources
from flax_imdb.data.texts import hashed
from flax_imdb.data.tokenizer import (
  encode,
  ids_of,
  number_words,
  reads_marks,
  unescapes,
)
from flax_imdb.errors import TransientError
from flax_imdb.storage import files, npz
from flax_imdb.terminal import ShowProgress

_PART = 8_192  # texts
# With fewer, other processes take longer to start than they save; parts are
# then smaller, for a bar moves by them.
_ALONE, _ALONE_PART = 60_000, 2_048
_PARENT_SECONDS = 2  # between looks whether it is still there


@dataclasses.dataclass(frozen=True)
class Part:
  """Some consecutive texts of a split, m of them."""
  words: list[str]  # distinct, in the order they come; the first is the start
  numbers: np.ndarray  # int32 [tokens], places in `words`
  lengths: np.ndarray  # int64 [m] tokens of each text
  labels: np.ndarray  # int16 [m]
  # uint64 [m], which equal texts share; [0] where no hash says who validates.
  hashes: np.ndarray


def read_parts(data: ConfigDict, split: str, marks: bool) -> Iterator[Part]:
  """Reads a split, `marks` as of `number_words`.

  Raises UserError as `read_texts`, and TransientError if a process is killed.
  """
  n = sources.count_texts(data, split)
  number = functools.partial(_read_part, data, split, marks)
  cores = environment.available_cores()
  alone = n < _ALONE or cores == 1
  size = _ALONE_PART if alone else _PART
  ranges = iter([(start, start + size) for start in range(0, n, size)])
  if alone:
    yield from itertools.starmap(number, ranges)
    return
  # Not forked: threads of jax may hold locks.
  with concurrent.futures.ProcessPoolExecutor(
      cores, multiprocessing.get_context('spawn'), _as_child,
      (os.getpid(),)) as pool:
    running = [pool.submit(number, *rows)
               for rows in itertools.islice(ranges, 2 * cores)]
    try:
      while running:
        part = running.pop(0).result()
        running += [pool.submit(number, *rows)
                    for rows in itertools.islice(ranges, 1)]
        yield part
    except concurrent.futures.process.BrokenProcessPool as e:
      raise TransientError(
          'a process that reads texts has ended, perhaps for lack of memory, '
          'or in a script for lack of if __name__ == "__main__": start again'
          ) from e
    finally:
      pool.shutdown(cancel_futures=True)


def _read_part(data: ConfigDict, split: str, marks: bool, start: int,
               stop: int) -> Part:
  texts, labels = sources.read_texts(data, split, start, stop)
  words, numbers, lengths = number_words(texts, marks)
  return Part(words, numbers, lengths, labels, _hashes(data, texts))


def _hashes(data: ConfigDict, texts: Sequence[str]) -> np.ndarray:
  if data.validation_by != 'text':
    return np.zeros(0, np.uint64)
  # Not those that hold out to test: of what is left these have no share.
  return np.array([hashed(text, 'validation') for text in texts], np.uint64)


def _as_child(parent: int) -> None:
  """A signal is the parent's to heed, and none outlives it, killed or not."""
  for number in signal.SIGINT, signal.SIGTERM:
    signal.signal(number, signal.SIG_IGN)

  def leave() -> None:
    while os.getppid() == parent:
      time.sleep(_PARENT_SECONDS)
    os._exit(1)
  threading.Thread(target=leave, daemon=True).start()


class Encoded:
  """Ids of a split on their way to a file; use it as a context.

  `validates` are bool [m] of each part, the texts that are put last.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    self._folder = folder
    self._lengths: list[np.ndarray] = []
    self._labels: list[np.ndarray] = []
    self._validates: list[np.ndarray] = []

  def __enter__(self) -> 'Encoded':
    with files.writing(self._folder):
      self._folder.mkdir(parents=True, exist_ok=True)
      # Without a name: none is left by a process that is killed.
      self._file = tempfile.TemporaryFile(dir=self._folder)
    return self

  def __exit__(self, *error: object) -> None:
    self._file.close()

  def __len__(self) -> int:
    return sum(map(len, self._labels))

  def add(self, part: Part, ids: np.ndarray, validates: np.ndarray) -> None:
    """Adds the texts of a part; int32 [words], the id of each word."""
    with files.writing(self._folder):
      self._file.write(ids[part.numbers].data)
    self._lengths.append(part.lengths)
    self._labels.append(part.labels)
    self._validates.append(validates)

  def write(self, path: pathlib.Path, vocab_size: int,
            table: np.ndarray | None = None) -> None:
    """Writes the file; int32 [ids] is what each id of `add` has become.

    Its arrays are those of `Reviews`, and validation, int64 [1], the texts at
    the end that validate. Errors as of `files.replacing`.
    """
    # Two bytes an id halve the file and the memory.
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)

    def of(whose: bool) -> Iterator[np.ndarray]:
      with files.writing(path):
        self._file.seek(0)
      for lengths, validates in zip(
          self._lengths, self._validates, strict=True):
        with files.writing(path):
          content = self._file.read(int(lengths.sum()) * 4)
        ids = np.frombuffer(content, np.int32)
        ids = ids[np.repeat(validates == whose, lengths)]
        yield (ids if table is None else table[ids]).astype(dtype)
    lengths, labels, validates = map(
        np.concatenate, (self._lengths, self._labels, self._validates))
    order = np.argsort(validates, kind='stable')
    offsets = np.concatenate([[0], np.cumsum(lengths[order])])
    npz.write_parts(path, {
        'ids': ((int(offsets[-1]),), dtype,
                itertools.chain(of(False), of(True))),
        'offsets': (offsets.shape, np.dtype(np.int64), [offsets]),
        'labels': (labels.shape, np.dtype(np.int16), [labels[order]]),
        'validation': (
            (1,), np.dtype(np.int64), [validates.sum(keepdims=True)])})


def encode_split(
    data: ConfigDict, split: str, tokenizer: Tokenizer, path: pathlib.Path,
    validates: Callable[[int, Part], np.ndarray],
    progress: ShowProgress) -> int:
  """Writes the ids of a split, by a tokenizer that is there; returns n.

  `validates` says of the texts before a part, and of the part, which of its
  texts validate: bool [m]. `progress` is told of each part. Raises as
  `read_texts` and `files.replacing`.
  """
  if unescapes(tokenizer):
    ids = ids_of(tokenizer)
    parts: Iterable[Part] = read_parts(data, split, reads_marks(tokenizer))
  else:  # of version 1, whose rules the library knows alone
    parts = _by_library(data, split, tokenizer)
    every = np.arange(tokenizer.get_vocab_size(), dtype=np.int32)
    def ids(words: Sequence[str]) -> np.ndarray:
      return every
  n = sources.count_texts(data, split)
  with Encoded(path.parent) as encoded:
    progress(f'encoding {split}', 0, n)
    for part in parts:
      encoded.add(part, ids(part.words), validates(len(encoded), part))
      progress(f'encoding {split}', len(encoded), n)
    encoded.write(path, tokenizer.get_vocab_size())
    return len(encoded)


def _by_library(
    data: ConfigDict, split: str, tokenizer: Tokenizer) -> Iterator[Part]:
  """As `read_parts`, but the numbers are ids."""
  for start in range(0, sources.count_texts(data, split), _PART):
    texts, labels = sources.read_texts(data, split, start, start + _PART)
    rows = encode(tokenizer, texts)
    yield Part([], np.concatenate(rows), np.array([len(row) for row in rows]),
               labels, _hashes(data, texts))
