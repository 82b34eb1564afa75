"""The ids cache: ragged, whole, keyed by all it depends on, never stale."""

import errno
import shutil

import numpy as np
import pytest
from support import data_sets

from flax_imdb.config import load_config
from flax_imdb.data import encoding, sources, tokenizer as tokenizer_module
from flax_imdb.data.reviews import (
  encode_reviews,
  joined,
  load_splits,
  training_tokenizer,
)
from flax_imdb.data.tokenizer import encode, fit_tokenizer
from flax_imdb.errors import TransientError, UserError
from flax_imdb.storage import files

NAME = 'grammar_reviews'


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """The directory of cached ids, empty; the reviews are prepared."""
  sources.prepare(data_sets.of(NAME), print)
  # Of the folder of all data sets another test may be writing another part.
  shutil.copytree(sources.data_dir(NAME) / NAME,
                  tmp_path / 'flax_imdb/tfds' / NAME)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  return tmp_path / 'flax_imdb' / 'ids'


@pytest.fixture
def config():
  config = load_config('configs/quickstart.py')
  config.data.train_split = 'train[:60]'
  config.data.test_split = 'test[:7]'
  config.data.validation_fraction = 0.25
  return config


@pytest.fixture
def no_reading(cache, monkeypatch):
  """Call it to make every later look at the prepared texts an error."""
  def forbid():
    def read(*args):
      raise AssertionError(f'read{args}')
    monkeypatch.setattr(sources, 'read_texts', read)
  return forbid


def _load(config, split='test'):
  """(reviews, what was announced)."""
  said = []
  tokenizer = training_tokenizer(config, lambda line: None)
  return load_splits(config, tokenizer, said.append, [split])[split], said


def _newest(cache):
  """The ids that were written last: of the test split."""
  return max(cache.glob('*.npz'), key=lambda path: path.stat().st_mtime_ns)


def _rows(reviews):
  return [reviews.ids[a:b].tolist() for a, b in
          zip(reviews.offsets[:-1], reviews.offsets[1:], strict=True)]


def _assert_equal(a, b):
  assert _rows(a) == _rows(b)
  for name in ('ids', 'offsets', 'labels'):
    assert getattr(a, name).dtype == getattr(b, name).dtype
  np.testing.assert_array_equal(a.labels, b.labels)


def test_ids_are_the_tokenizers_at_full_length(cache, config):
  config.data.max_length = 2  # batches cut, the cache does not
  tokenizer = training_tokenizer(config, print)
  texts, labels = sources.read_texts(data_sets.of(NAME), 'test[:7]')
  want = encode(tokenizer, texts)
  for again in range(2):  # fresh, then from the cache
    reviews, said = _load(config)
    assert _rows(reviews) == [row.tolist() for row in want]
    np.testing.assert_array_equal(reviews.labels, labels)
    assert reviews.offsets[0] == 0 and len(reviews) == 7
    assert reviews.offsets[-1] == len(reviews.ids)
    assert len(said) == (0 if again else 1)
    assert reviews.ids.dtype == np.uint16


def test_of_each_part_it_is_told_how_far_it_is(cache, config, monkeypatch):
  monkeypatch.setattr(encoding, '_ALONE_PART', 25)
  told = []
  def tell(*words):
    told.append(words)
  tokenizer = training_tokenizer(config, print, tell)
  assert told == [('tokenizing train[:60]', n, 60) for n in (0, 25, 50, 60)]
  told.clear()
  load_splits(config, tokenizer, print, ['train', 'test'], progress=tell)
  assert told == [('encoding test[:7]', n, 7) for n in (0, 7)]
  told.clear()
  config.data.validation_by = 'groups'
  training_tokenizer(config, print, tell)
  assert told[:2] == [('grouping by names', 0, 0),
                      ('tokenizing train[:60]', 0, 60)]


def test_where_words_were_forgotten_ids_are_still_those_of_encode(
    cache, config, monkeypatch):
  monkeypatch.setattr(encoding, '_ALONE_PART', 7)
  monkeypatch.setattr(tokenizer_module, '_MOST_WORDS', 20)
  tokenizer = training_tokenizer(config, print)
  texts, _ = sources.read_texts(data_sets.of(NAME), 'train[:60]')
  reviews, _ = _load(config, 'train')
  want = encode(tokenizer, texts)[:len(reviews)]
  assert _rows(reviews) == [row.tolist() for row in want]


def test_validation_is_the_last_part_of_the_training_split(cache, config):
  tokenizer = training_tokenizer(config, print)
  texts, labels = sources.read_texts(data_sets.of(NAME), 'train[:60]')
  want = [row.tolist() for row in encode(tokenizer, texts)]
  train, validation = (_load(config, s)[0] for s in ('train', 'validation'))
  assert (len(train), len(validation)) == (45, 15)
  assert _rows(train) == want[:45] and _rows(validation) == want[45:]
  np.testing.assert_array_equal(
      np.concatenate([train.labels, validation.labels]), labels)
  assert len(list(cache.glob('*.npz'))) == 1  # they share a file


def test_unlabelled_reviews_give_words_and_no_labels(
    cache, config, no_reading):
  alone = training_tokenizer(config, print)
  config.data.unlabelled_split = 'train[500:600]'
  texts, labels = sources.read_texts(data_sets.of(NAME), 'train[500:600]')
  tokenizer = training_tokenizer(config, print)
  assert tokenizer.get_vocab_size() > alone.get_vocab_size()
  no_reading()  # the same pass has encoded them
  reviews, _ = _load(config, 'unlabelled')
  assert _rows(reviews) == [row.tolist() for row in encode(tokenizer, texts)]
  assert {*labels.tolist()} == {0, 1} and {*reviews.labels.tolist()} == {-1}
  assert reviews.labels.dtype == np.int16


@pytest.mark.parametrize('field', ['train_split', 'test_split'])
def test_a_split_with_labels_has_all_of_them(
    cache, config, field, monkeypatch):
  read = sources.read_texts
  def without(data, split, *rows):
    texts, labels = read(data, split, *rows)
    none = np.full_like(labels, -1)
    return texts, none if split == config.data[field] else labels
  monkeypatch.setattr(sources, 'read_texts', without)
  with pytest.raises(UserError, match=f'data.{field}=.*unlabelled_split'):
    for split in ('train', 'test'):
      _load(config, split)


def test_joined_reviews_are_those_of_both(cache, config):
  a, b = (_load(config, split)[0] for split in ('train', 'test'))
  both = joined(a, b)
  assert _rows(both) == _rows(a) + _rows(b)
  np.testing.assert_array_equal(
      both.labels, np.concatenate([a.labels, b.labels]))
  assert both.ids.dtype == a.ids.dtype and both.offsets.dtype == np.int64


@pytest.mark.parametrize(('fraction', 'sizes'), [
    (0.3, (42, 18)), (0.01, (59, 1)), (0.333, (40, 20))])
def test_sizes_of_the_division(cache, config, fraction, sizes):
  config.data.validation_fraction = fraction
  assert tuple(len(_load(config, split)[0])
               for split in ('train', 'validation')) == sizes


def test_the_second_load_reads_the_cache_alone(cache, config, no_reading):
  first, said = _load(config)
  assert len(said) == 1 and '7 reviews' in said[0] and str(cache) in said[0]
  no_reading()
  second, said = _load(config)
  _assert_equal(first, second)
  assert said == []


def test_training_texts_are_read_once_to_fit_and_to_encode(
    cache, config, no_reading):
  said = []
  tokenizer = training_tokenizer(config, said.append)
  assert '45 reviews and encoded 60' in said[0] and str(cache) in said[0]
  texts, labels = sources.read_texts(data_sets.of(NAME), 'train[:60]')
  no_reading()
  splits = load_splits(config, tokenizer, pytest.fail, ['train', 'validation'])
  want = encode_reviews(tokenizer, texts, labels)
  _assert_equal(splits['train'], want[:45])
  _assert_equal(splits['validation'], want[45:])


def test_a_tokenizer_without_its_ids_is_taken_and_they_are_made(cache, config):
  first, _ = _load(config, 'train')
  (path,) = cache.glob('*.npz')
  path.unlink()  # as a kill between the two leaves it
  second, said = _load(config, 'train')
  assert len(said) == 1 and 'encoded 60 reviews' in said[0]
  _assert_equal(first, second)


@pytest.mark.parametrize('damage', [
    lambda data: b'', lambda data: data[:40], lambda data: data[:-100],
    lambda data: data[:600] + bytes([data[600] ^ 1]) + data[601:],
    # zip's directory claims that the ids are encrypted, or packed as bzip2 is
    lambda data: data.replace(b'PK\1\2-\3-\0\0', b'PK\1\2-\3-\0\1', 1),
    lambda data: data.replace(b'PK\1\2-\3-\0\0\0', b'PK\1\2-\3-\0\0\0\x0c', 1),
], ids=['empty', 'head', 'tail', 'bit', 'encrypted', 'compressed'])
def test_damaged_ids_are_announced_and_made_again(cache, config, damage):
  first, _ = _load(config)
  path = _newest(cache)
  good = path.read_bytes()
  assert damage(good) != good
  path.unlink()  # what is mapped of it stays
  path.write_bytes(damage(good))
  second, said = _load(config)
  _assert_equal(first, second)
  assert len(said) == 2 and 'damaged' in said[0] and str(path) in said[0]
  assert path.read_bytes() == good


@pytest.mark.parametrize('content', ['', '{', None])
def test_a_damaged_tokenizer_is_announced_and_made_again(
    cache, config, content):
  first = training_tokenizer(config, print)
  (path,) = cache.glob('*.json')
  path.write_text(path.read_text()[:-9] if content is None else content)
  said = []
  second = training_tokenizer(config, said.append)
  assert second.to_str() == first.to_str()
  assert len(said) == 2 and str(path) in said[0] and '\n' not in said[0]
  assert training_tokenizer(config, pytest.fail).to_str() == first.to_str()


def test_only_whole_files_are_left_and_temporary_ones_not_read(cache, config):
  first, _ = _load(config)
  path = _newest(cache)
  assert len(list(cache.iterdir())) == 3  # ids of two splits and tokenizer
  path.rename(f'{path}.123.tmp')  # as a kill before the rename leaves it
  second, said = _load(config)
  assert len(said) == 1
  _assert_equal(first, second)


@pytest.mark.parametrize(('field', 'value', 'files'), [
    ('vocab_size', 50, ('ids', 'ids', 'tokenizer')),
    ('train_split', 'train[60:120]', ('ids', 'ids', 'tokenizer')),
    ('validation_fraction', 0.5, ('ids', 'ids', 'tokenizer')),
    ('test_split', 'test[7:14]', ('ids',)),
    ('max_length', 7, ()), ('bucket_width', 7, ())])
def test_what_a_file_depends_on_is_in_its_name(
    cache, config, field, value, files):
  first, _ = _load(config)
  before = set(cache.iterdir())
  config.data[field] = value
  second, said = _load(config)
  kinds = {'.npz': 'ids', '.json': 'tokenizer'}
  added = sorted(kinds[f.suffix] for f in set(cache.iterdir()) - before)
  assert added == list(files)
  assert (_rows(first) != _rows(second)) == ('ids' in files)
  want = encode(training_tokenizer(config, print), sources.read_texts(
      data_sets.of(NAME), config.data.test_split)[0])
  assert _rows(second) == [row.tolist() for row in want]


def test_other_prepared_data_are_read_anew(cache, config, no_reading):
  _load(config)
  info = sources.data_dir(NAME) / sources.PATHS[NAME] / 'dataset_info.json'
  info.write_text(info.read_text() + '\n')
  _, said = _load(config)
  assert len(said) == 1 and len(list(cache.glob('*.npz'))) == 4
  assert len(list(cache.glob('*.json'))) == 2


def test_the_vocabulary_comes_from_the_training_rows_alone(
    cache, config, monkeypatch):
  texts = {'train[:60]': ['seen good'] * 3 + ['held good'],
           'test[:7]': ['tested good']}
  monkeypatch.setattr(sources, 'read_texts', lambda data, split, *rows: (
      texts[split], np.zeros(len(texts[split]), np.int16)))
  monkeypatch.setattr(
      sources, 'count_texts', lambda data, split: len(texts[split]))
  assert set(training_tokenizer(config, print).get_vocab()) == {
      '[PAD]', '[START]', '[UNK]', '[UNUSED]', 'seen', 'good'}
  good = training_tokenizer(config, print).token_to_id('good')
  for split in ('validation', 'test'):
    assert _rows(_load(config, split)[0]) == [[1, 2, good]]


def test_a_cache_that_can_not_be_written_is_the_users_to_mend(cache, config):
  cache.write_text('a file where the directory should be')
  with pytest.raises(UserError, match='XDG_CACHE_HOME'):
    training_tokenizer(config, print)
  tokenizer = fit_tokenizer(['a'], 9)
  with pytest.raises(UserError, match='XDG_CACHE_HOME'):
    load_splits(config, tokenizer, print, ['test'])


def test_a_full_disk_may_be_mended_meanwhile_and_leaves_nothing(
    cache, config, monkeypatch):
  def full(descriptor):
    raise OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr(files.os, 'fsync', full)
  with pytest.raises(TransientError, match='No space left .*XDG_CACHE_HOME'):
    training_tokenizer(config, print)
  assert not [f for f in cache.rglob('*') if f.is_file() and 'ids' in f.parts]


@pytest.mark.parametrize(('split', 'fraction'), [
    ('validation', 0.0), ('validation', 0.001), ('train', 0.999)])
def test_an_empty_split_is_the_users_to_mend(cache, config, split, fraction):
  config.data.validation_fraction = fraction
  with pytest.raises(UserError, match=f'{split}.*validation_fraction'):
    _load(config, split)


def test_groups_that_validate_are_cached_and_made_again_if_damaged(
    cache, config):
  config.data.validation_by = 'groups'
  first, _ = _load(config, 'validation')
  assert len(first) == 15
  (path,) = cache.glob('*validation*.npz')
  good = path.read_bytes()
  path.unlink()
  np.savez(path, validates=np.ones(60, np.uint8))  # whole, and not these
  for damaged in (True, False):
    ids, = {*cache.glob('*.npz')} - {path}
    ids.unlink()
    second, said = _load(config, 'validation')
    _assert_equal(first, second)
    if damaged:
      assert str(path) in said[0] and 'damaged (not 15 of 60)' in said[0]
      assert 'grouped 60 reviews' in said[1] and path.read_bytes() == good
    assert len(said) == (3 if damaged else 1) and 'encoded' in said[-1]


def test_a_process_that_is_killed_is_one_line_and_leaves_nothing(
    cache, config, monkeypatch):
  class Pool(encoding.concurrent.futures.ThreadPoolExecutor):
    def __init__(self, *args):
      super().__init__(1)
    def submit(self, *args):
      future = encoding.concurrent.futures.Future()
      future.set_exception(
          encoding.concurrent.futures.process.BrokenProcessPool('killed'))
      return future
  monkeypatch.setattr(
      encoding.concurrent.futures, 'ProcessPoolExecutor', Pool)
  monkeypatch.setattr(encoding, '_ALONE', 1)
  monkeypatch.setattr(encoding.environment, 'available_cores', lambda: 2)
  with pytest.raises(TransientError, match='process that reads texts'):
    training_tokenizer(config, print)
  assert list(cache.iterdir()) == []


def test_parts_of_other_processes_make_the_same_ids(
    cache, config, monkeypatch):
  alone = {s: _load(config, s)[0] for s in ('train', 'validation', 'test')}
  words = training_tokenizer(config, print).to_str()
  shutil.rmtree(cache)
  monkeypatch.setattr(encoding, '_PART', 4)
  monkeypatch.setattr(encoding, '_ALONE', 1)
  monkeypatch.setattr(encoding.environment, 'available_cores', lambda: 2)
  assert training_tokenizer(config, print).to_str() == words
  for split, reviews in alone.items():
    _assert_equal(reviews, _load(config, split)[0])
