"""Reviews as ragged token ids: the splits of a data set, kept in the cache.

It is keyed by all that its content depends on: a stale file is never read.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import time

from ml_collections import ConfigDict
import numpy as np
from tokenizers import Tokenizer

from flax_imdb.cluster import processes
from flax_imdb.data import groups, sources, texts
from flax_imdb.data.encoding import Encoded, Part, encode_split, read_parts
from flax_imdb.data.tokenizer import (
  VERSION,
  Vocabulary,
  encode,
  load_tokenizer,
  save_tokenizer,
  word_index_tokenizer,
)
from flax_imdb.errors import UserError
from flax_imdb.fields import validation_split
from flax_imdb.storage import cache, files, npz
from flax_imdb.terminal import ShowProgress, show_nothing

SPLITS = ('train', 'validation', 'test')

Announce = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Reviews:
  """The n reviews of a split; review i is ids[offsets[i]:offsets[i + 1]]."""
  ids: np.ndarray  # unsigned [tokens of all reviews]
  offsets: np.ndarray  # int64 [n + 1]
  # int16 [n]: a place in `sources.class_names`, -1 unknown. Or float32, to
  # train with, as pseudo-labels say it: [n], the probability of 1; or of more
  # than two classes [n, K].
  labels: np.ndarray
  # What `ngrams` adds, an array a token: bigrams int32 [tokens], the row of an
  # embedding of word pairs; log_odds float32 [tokens, features].
  features: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  # float32 [n] logits of a linear model, or [n, K] of more than two classes,
  # where there is one; not to train with.
  linear: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, rows: slice | np.ndarray) -> 'Reviews':
    """Some reviews: a contiguous slice, a view of the tokens, or int [m]."""
    if isinstance(rows, slice):
      start, stop, _ = rows.indices(len(self))
      offsets = self.offsets[start:max(start, stop) + 1]
      tokens = slice(offsets[0], offsets[-1])
      return Reviews(self.ids[tokens], offsets - offsets[0], self.labels[rows],
                     {k: v[tokens] for k, v in self.features.items()},
                     None if self.linear is None else self.linear[rows])
    starts, lengths = self.offsets[rows], np.diff(self.offsets)[rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    # Of each token kept: its place in its review, and where that began.
    place = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return Reviews(self.ids[place], offsets, self.labels[rows],
                   {k: v[place] for k, v in self.features.items()},
                   None if self.linear is None else self.linear[rows])

  def lengths(self, max_length: int) -> np.ndarray:
    """int64 [n] tokens of each review once cut at `max_length`."""
    return np.minimum(np.diff(self.offsets), max_length)


def joined(reviews: Reviews, others: Reviews) -> Reviews:
  """All reviews of both, which have no features yet."""
  return Reviews(
      np.concatenate([reviews.ids, others.ids]),
      np.concatenate([reviews.offsets,
                      others.offsets[1:] + reviews.offsets[-1]]),
      np.concatenate([reviews.labels, others.labels]))


def encode_reviews(tokenizer: Tokenizer, texts: Sequence[str],
                   labels: np.ndarray | None = None) -> Reviews:
  """Encodes n texts at full length; labels int16 [n], without them all 0."""
  rows = encode(tokenizer, texts)
  # Two bytes an id, as of the files of `encoding`.
  dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
  return Reviews(
      ids=np.concatenate(rows).astype(dtype) if rows else np.zeros(0, dtype),
      offsets=np.cumsum([0] + [len(row) for row in rows], dtype=np.int64),
      labels=np.zeros(len(rows), np.int16) if labels is None else labels)


def training_tokenizer(
    config: ConfigDict, announce: Announce,
    progress: ShowProgress = show_nothing) -> Tokenizer:
  """The tokenizer of the training reviews, validation left out.

  And of those without labels, if there are. Or that of data.word_index.
  `announce` is told what took time, and `progress` while it does; UserError if
  the data set, or that file, can't be had.
  """
  data = config.data
  if data.word_index:
    return word_index_tokenizer(data.word_index, data.vocab_size)
  with processes.one_at_a_time():
    fingerprint = sources.prepare(data, announce, progress)
    path = cache.path(
        'ids', f'{data.name}-tokenizer', '.json', fingerprint, data.train_split,
        data.unlabelled_split, validation_split(data),
        data.validation_fraction, data.validation_by, data.vocab_size,
        data.punctuation, groups.VERSION, VERSION)
    if files.exists(path, cache.FIX):
      try:
        return load_tokenizer(path, data.vocab_size)
      except UserError as e:
        announce(f'{e}; making it again')
    start, vocabulary, fitted = time.perf_counter(), Vocabulary(), 0
    splits = {data.train_split: _validating(
        data, fingerprint, announce, progress)}
    if data.unlabelled_split:
      splits[data.unlabelled_split] = _none_validates
    with contextlib.ExitStack() as stack:
      encoded = {}
      for split, validates in splits.items():
        encoded[split] = stack.enter_context(Encoded(path.parent))
        n = sources.count_texts(data, split)
        progress(f'tokenizing {split}', 0, n)
        for part in read_parts(data, split, data.punctuation):
          held_out = validates(len(encoded[split]), part)
          counts = np.bincount(
              part.numbers[np.repeat(~held_out, part.lengths)],
              minlength=len(part.words))
          fitted += int((~held_out).sum())
          encoded[split].add(
              part, vocabulary.add(part.words, counts), held_out)
          progress(f'tokenizing {split}', len(encoded[split]), n)
      tokenizer, table = vocabulary.learn(data.vocab_size, data.punctuation)
      save_tokenizer(tokenizer, path)
      # For `load_splits`, so that these texts are read once. A word that was
      # forgotten once has an id in later texts alone: then they are read again.
      kept = {} if vocabulary.forgot else encoded
      for split, ids in kept.items():
        ids.write(_ids_path(data, fingerprint, tokenizer, split),
                  tokenizer.get_vocab_size(), table)
      count = sum(map(len, kept.values()))
    announce(f'fitted the tokenizer, {tokenizer.get_vocab_size():,} ids, on '
             f'{fitted:,} reviews and encoded {count:,} in '
             f'{time.perf_counter() - start:.1f} s, cached in {path.parent}')
    return tokenizer


def load_splits(config: ConfigDict, tokenizer: Tokenizer, announce: Announce,
                splits: Sequence[str] = SPLITS, class_count: int = 2,
                progress: ShowProgress = show_nothing) -> dict[str, Reviews]:
  """Reads the splits that are asked for, of `SPLITS` and 'unlabelled'.

  Validation is a split of its own, or a part of the training reviews, see
  `_validating`. Their ids are mapped, not read into memory. The labels that
  unlabelled reviews may have are not read. `announce` and `progress` as in
  `training_tokenizer`. Raises UserError if the data can't be had, a split is
  empty, or one with labels lacks some or has others than those of the classes.
  """
  with processes.one_at_a_time():
    data = config.data
    fingerprint = sources.prepare(data, announce, progress)
    encoded = functools.partial(
        _encoded, data, fingerprint, tokenizer, announce, progress, class_count)
    found = {}
    own = validation_split(data)
    if 'train' in splits or 'validation' in splits and not own:
      reviews, count = encoded(data.train_split)
      found = {'train': reviews[:len(reviews) - count],
               'validation': reviews[len(reviews) - count:]}
    if 'validation' in splits and own:
      found['validation'], _ = encoded(own)
    if 'test' in splits:
      found['test'], _ = encoded(data.test_split)
    if 'unlabelled' in splits:
      reviews, _ = encoded(data.unlabelled_split)
      found['unlabelled'] = dataclasses.replace(
          reviews, labels=np.full(len(reviews), -1, np.int16))
  for split in splits:
    field = ('test_split' if split == 'test' else 'validation_split' if (
        split == 'validation' and own) else 'train_split')
    if not len(found[split]):
      raise UserError(f'the {split} split has no reviews: see config.data.'
                      f'{field} and config.data.validation_fraction')
    if split != 'unlabelled' and found[split].labels.min() < 0:
      raise UserError(
          f'config.data.{field}={data[field] or own} has reviews without '
          'labels: give them as config.data.unlabelled_split')
    if (most := found[split].labels.max()) >= class_count:
      raise UserError(
          f'config.data.{field}={data[field] or own} has a label {most}, and '
          f'there are {class_count} classes, from 0 on: prepare {data.name} '
          'again')
  return {split: found[split] for split in splits}


def reviews_sha256(reviews: Reviews) -> str:
  """One string for ids and labels, in hex; run directories hold it."""
  digest = hashlib.sha256()
  for array in (reviews.ids, reviews.offsets, reviews.labels):
    digest.update(np.ascontiguousarray(array).data)
  return digest.hexdigest()


def _validating(
    data: ConfigDict, fingerprint: str, announce: Announce,
    progress: ShowProgress) -> Callable[[int, Part], np.ndarray]:
  """Makes a function that says which training reviews validate.

  By rows the last ones in tfds' order, which tfds has shuffled once and for
  all; by groups whole ones, as `groups` has them; by text those whose hash is
  in the share: of equal texts all or none. Its arguments are those of
  `encode_split`.
  """
  fraction = data.validation_fraction
  if not fraction or validation_split(data):
    return _none_validates
  n = sources.count_texts(data, data.train_split)
  if data.validation_by == 'text':
    least = texts.share(fraction, n)
    return lambda start, part: part.hashes < least
  if data.validation_by == 'rows':
    chosen = np.arange(n) >= n - round(n * fraction)
  else:
    chosen = _groups(data, fingerprint, n, announce, progress)
  return lambda start, part: chosen[start:start + len(part.labels)]


def _none_validates(start: int, part: Part) -> np.ndarray:
  return np.zeros(len(part.labels), bool)


def _groups(data: ConfigDict, fingerprint: str, n: int, announce: Announce,
            progress: ShowProgress) -> np.ndarray:
  """Bool [n], which of the training reviews validate, from the cache or not."""
  path = cache.path(
      'ids', f'{data.name}-validation', '.npz', fingerprint, data.train_split,
      data.validation_fraction, groups.VERSION)
  count = round(n * data.validation_fraction)
  def checked(arrays: dict[str, np.ndarray]) -> np.ndarray:
    validates = arrays['validates']
    if validates.shape != (n,) or validates.sum() != count:
      raise ValueError(f'not {count} of {n}')
    return validates > 0
  validates = npz.cached(path, checked, announce)
  if validates is None:
    start = time.perf_counter()
    progress('grouping by names', 0, 0)
    found, _ = sources.read_texts(data, data.train_split)
    validates = groups.validation_rows(found, data.validation_fraction)
    npz.write_arrays(path, validates=validates.astype(np.uint8))
    announce(f'grouped {n:,} reviews by the names in them in '
             f'{time.perf_counter() - start:.1f} s')
  return validates


def _encoded(data: ConfigDict, fingerprint: str, tokenizer: Tokenizer,
             announce: Announce, progress: ShowProgress, class_count: int,
             tfds_split: str) -> tuple[Reviews, int]:
  """All reviews of a tfds split, and how many at their end validate.

  From the cache if it holds them.
  """
  path = _ids_path(data, fingerprint, tokenizer, tfds_split)
  def made(arrays: dict[str, np.ndarray]) -> tuple[Reviews, int]:
    count, = arrays['validation']
    return Reviews(
        arrays['ids'], arrays['offsets'], arrays['labels']), int(count)
  def checked(arrays: dict[str, np.ndarray]) -> tuple[Reviews, int]:
    reviews, count = made(arrays)
    _check_reviews(reviews, tokenizer.get_vocab_size(), class_count)
    npz.release(reviews.ids)  # of which all was read
    if not 0 <= count <= len(reviews):
      raise ValueError(f'{count} of {len(reviews)} reviews validate')
    return reviews, count
  found = npz.cached(path, checked, announce)
  if found is None:
    start = time.perf_counter()
    validates = (_validating(data, fingerprint, announce, progress)
                 if tfds_split == data.train_split else _none_validates)
    n = encode_split(data, tfds_split, tokenizer, path, validates, progress)
    announce(f'encoded {n:,} reviews of {data.name} {tfds_split} in '
             f'{time.perf_counter() - start:.1f} s, cached in {path.parent}')
    found = made(npz.map_arrays(path))
  return found


def _check_reviews(
    reviews: Reviews, vocab_size: int, class_count: int) -> None:
  """Raises ValueError where jax, which clips an index, would read on."""
  ids, offsets, labels = reviews.ids, reviews.offsets, reviews.labels
  if ((ids.ndim, offsets.shape, offsets.dtype, labels.ndim, labels.dtype)
      != (1, (len(labels) + 1,), np.int64, 1, np.int16)
      or ids.dtype.kind != 'u' or ids.max(initial=0) >= vocab_size
      or offsets[0] != 0 or offsets[-1] != len(ids)
      or (np.diff(offsets) < 1).any()  # a review has at least its start
      or labels.min(initial=0) < -1 or labels.max(initial=0) >= class_count):
    raise ValueError('its ids, offsets or labels are no reviews')


def _ids_path(data: ConfigDict, fingerprint: str, tokenizer: Tokenizer,
              tfds_split: str) -> pathlib.Path:
  divided = (tfds_split == data.train_split and not validation_split(data)
             and data.validation_fraction and (
                 data.validation_fraction, data.validation_by, groups.VERSION))
  return cache.path('ids', data.name, '.npz', fingerprint, tfds_split, divided,
                    tokenizer.to_str(), VERSION)
