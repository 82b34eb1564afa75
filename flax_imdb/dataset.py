"""tfds -> tokenizer and ragged token ids, both kept in a cache.

The cache is keyed by everything that its content depends on, and written to a
temporary name and renamed: a stale or half-written file is never read.
"""

from collections.abc import Callable
import hashlib
import io
import json
import pathlib
import time

from ml_collections import ConfigDict
import numpy as np
from tokenizers import Tokenizer

from flax_imdb import builders
from flax_imdb import files
from flax_imdb import npz
from flax_imdb import processes
from flax_imdb import tokenizer as tokenizer_lib
from flax_imdb.batches import Reviews
from flax_imdb.environment import cache_dir
from flax_imdb.errors import UserError

Announce = Callable[[str], None]


def prepare(config: ConfigDict, announce: Announce) -> str:
  """Downloads or generates the data set unless it is there.

  Args:
    config: the whole config; `config.data` is used.
    announce: called with one line about each thing that takes time.

  Returns:
    The fingerprint of the prepared data.

  Raises:
    UserError: it can't be had; says what to do.
  """
  name = config.data.name
  builders.prepare(name, announce)
  fingerprint = builders.fingerprint(name)
  assert fingerprint
  return fingerprint


@processes.one_at_a_time()
def fit_tokenizer(config: ConfigDict, announce: Announce) -> Tokenizer:
  """The tokenizer of the training reviews, validation left out.

  Args and errors: as `prepare`.
  """
  data = config.data
  path = _cache_path(
      f'{data.name}-tokenizer', prepare(config, announce), data.train_split,
      data.validation_fraction, data.vocab_size, tokenizer_lib.VERSION)
  path = path.with_suffix('.json')
  if path.exists():
    try:
      return tokenizer_lib.load(path, data.vocab_size)
    except UserError as e:
      announce(f'{e}; making it again')
  start = time.perf_counter()
  texts, labels = builders.read(data.name, data.train_split)
  train, _ = _divide(len(labels), data.validation_fraction)
  tokenizer = tokenizer_lib.fit(texts[train], data.vocab_size)
  tokenizer_lib.save(tokenizer, path)
  announce(f'fitted the tokenizer, {tokenizer.get_vocab_size():,} ids, on '
           f'{train.stop:,} reviews in {time.perf_counter() - start:.1f} s')
  return tokenizer


@processes.one_at_a_time()
def load(config: ConfigDict, tokenizer: Tokenizer, split: str,
         announce: Announce) -> Reviews:
  """Token ids of the 'train', 'validation' or 'test' split.

  Args:
    config: the whole config; `config.data` is used.
    tokenizer: encodes the reviews.
    split: validation is the last part of the training reviews in tfds' order,
      which tfds has shuffled once and for all.
    announce: called with one line about each thing that takes time.

  Raises:
    UserError: the data can't be had, or the split is empty.
  """
  data = config.data
  field = 'test_split' if split == 'test' else 'train_split'
  reviews = _encoded(config, tokenizer, data[field], announce)
  if split != 'test':
    train, validation = _divide(len(reviews), data.validation_fraction)
    reviews = reviews[train if split == 'train' else validation]
  if not len(reviews):
    raise UserError(f'the {split} split has no reviews: see config.data.{field}'
                    ' and config.data.validation_fraction')
  return reviews


def _divide(n: int, validation_fraction: float) -> tuple[slice, slice]:
  """The slices of n training rows that train and that validate."""
  train = n - round(n * validation_fraction)
  return slice(0, train), slice(train, n)


def _encoded(config: ConfigDict, tokenizer: Tokenizer, tfds_split: str,
             announce: Announce) -> Reviews:
  """All reviews of a tfds split, from the cache if it holds them."""
  name = config.data.name
  path = _cache_path(name, prepare(config, announce), tfds_split,
                     tokenizer.to_str(), tokenizer_lib.VERSION)
  path = path.with_suffix('.npz')
  if path.exists():
    try:
      # It is not packed: what claims to be larger than the file is damaged.
      return _checked(npz.read(path, path.stat().st_size),
                      tokenizer.get_vocab_size())
    except npz.ERRORS as e:
      announce(f'{path} is damaged ({e}); making it again')
  start = time.perf_counter()
  texts, labels = builders.read(name, tfds_split)
  rows = tokenizer_lib.encode(tokenizer, texts)
  # Two bytes an id halve the file and the memory.
  dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
  reviews = Reviews(
      ids=np.concatenate(rows).astype(dtype) if rows else np.zeros(0, dtype),
      offsets=np.cumsum([0] + [len(row) for row in rows], dtype=np.int64),
      labels=labels)
  content = io.BytesIO()
  np.savez(content, ids=reviews.ids, offsets=reviews.offsets, labels=labels)
  files.write(path, content.getvalue())
  announce(f'encoded {len(reviews):,} reviews of {name} {tfds_split} in '
           f'{time.perf_counter() - start:.1f} s, cached in {path.parent}')
  return reviews


def _checked(arrays: dict[str, np.ndarray], vocab_size: int) -> Reviews:
  """Raises ValueError where jax, which clips an index, would read on."""
  reviews = Reviews(arrays['ids'], arrays['offsets'], arrays['labels'])
  ids, offsets, labels = reviews.ids, reviews.offsets, reviews.labels
  if ((ids.ndim, offsets.shape, offsets.dtype, labels.ndim, labels.dtype)
      != (1, (len(labels) + 1,), np.int64, 1, np.int8)
      or ids.dtype.kind != 'u' or ids.max(initial=0) >= vocab_size
      or offsets[0] != 0 or offsets[-1] != len(ids)
      or (np.diff(offsets) < 1).any()  # a review has at least its start
      or not np.isin(labels, (0, 1)).all()):
    raise ValueError('its ids, offsets or labels are no reviews')
  return reviews


def _cache_path(name: str, *key) -> pathlib.Path:
  """A name for something that depends on `key`; the suffix is to be added."""
  digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
  return cache_dir() / 'ids' / f'{name}-{digest}'
