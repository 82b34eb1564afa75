"""What was counted once is read from the cache, to the bit, or not at all."""

import dataclasses
import os

import numpy as np
import pytest

from flax_imdb.config import load_config
from flax_imdb.data import classes, counting
from flax_imdb.data.reviews import Reviews
from flax_imdb.storage import npz

LINEAR = 'words+bigrams+log_odds+linear'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """Where n-grams are cached: nothing is at first."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  return tmp_path / 'flax_imdb/ngrams'


def _config(inputs=LINEAR):
  config = load_config('configs/default.py')
  config.model.inputs = inputs
  config.data.update(bigrams=1000, log_odds_ngrams=1000)
  return config


def _reviews(class_count=2):
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 9, 60)
  return Reviews(
      rng.integers(4, 11, lengths.sum()).astype(np.uint16),
      np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
      rng.integers(0, class_count, 60).astype(np.int16))


def _fit(config, reviews=None, data='of these reviews', **kwargs):
  """((known, reviews), what was announced)."""
  said = []
  return counting.fit_or_read(
      config, _reviews() if reviews is None else reviews, data, said.append,
      **kwargs), said


def _arrays(found):
  known, reviews = found
  return {name: getattr(known, name) for name in (
      'pairs', 'keys', 'log_odds', 'weights')} | reviews.features


def _assert_equal(found, want):
  for name, array in _arrays(want).items():
    assert _arrays(found)[name].dtype == array.dtype, name
    np.testing.assert_array_equal(_arrays(found)[name], array)
  assert (found[0].order, found[0].inputs) == (want[0].order, want[0].inputs)


@pytest.mark.parametrize('inputs', [
    'words+bigrams', 'words+log_odds', 'words+log_odds+linear', LINEAR])
@pytest.mark.parametrize('class_count', [2, 3])
def test_what_is_cached_is_read_and_the_same(inputs, class_count, monkeypatch):
  config, reviews = _config(inputs), _reviews(class_count)
  want = counting.fit(config, reviews, class_count=class_count)
  first, said = _fit(config, reviews, class_count=class_count)
  assert said[0].startswith('counted n-grams in ')
  monkeypatch.setattr(counting, 'fit', None)
  second, said = _fit(config, reviews, class_count=class_count)
  assert said[0].startswith('read n-grams in ') and len(said) == 1
  _assert_equal(first, want)
  _assert_equal(second, want)


def test_labels_of_a_teacher_are_cached_as_well(monkeypatch):
  reviews = dataclasses.replace(_reviews(), labels=classes.shares(
      _reviews().labels, 2).astype(np.float32))
  want, _ = _fit(_config(), reviews)
  monkeypatch.setattr(counting, 'fit', None)
  _assert_equal(_fit(_config(), reviews)[0], want)


@pytest.mark.parametrize('change', [
    {'model.inputs': 'words+bigrams+log_odds'}, {'data.bigrams': 20},
    {'data.log_odds_order': 2}, {'data.log_odds_order': 1},
    {'data.log_odds_ngrams': 30},
    {'class_weights': 'balanced'}, {'data.name': 'other'}])
def test_another_config_is_counted_anew(change):
  _fit(_config())
  config = _config()
  config.update_from_flattened_dict(change)
  found, said = _fit(config)
  assert said[0].startswith('counted')
  _assert_equal(found, counting.fit(config, _reviews()))


def test_other_reviews_and_classes_are_counted_anew():
  _fit(_config())
  assert _fit(_config(), data='of others')[1][0].startswith('counted')
  assert _fit(_config(), class_count=3)[1][0].startswith('counted')


def test_pairs_that_are_there_already_are_kept():
  (known, _), _ = _fit(_config())
  assert _fit(_config(), pairs=known.pairs)[1][0].startswith('read')
  others = known.pairs[::2].copy()
  found, said = _fit(_config(), pairs=others)
  assert said[0].startswith('counted')
  _assert_equal(found, counting.fit(_config(), _reviews(), others))
  found, said = _fit(_config(), pairs=others)
  assert said[0].startswith('read')
  _assert_equal(found, counting.fit(_config(), _reviews(), others))
  again, _ = _fit(_config())  # a run of its own, with its own pairs
  _assert_equal(again, counting.fit(_config(), _reviews()))


def _flip(path):
  content = path.read_bytes()
  path.unlink()  # what is mapped of it stays
  path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])


def _rewrite(**change):
  def rewrite(path):
    arrays = npz.read_arrays(path, 1 << 20)
    path.unlink()
    npz.write_arrays(path, **arrays | {
        name: of(arrays[name]) for name, of in change.items()})
  return rewrite


@pytest.mark.parametrize('damage', [
    _flip,
    _rewrite(token_bigrams=lambda x: x + 1000),
    _rewrite(token_bigrams=lambda x: x - 1000),
    _rewrite(token_bigrams=lambda x: x[1:]),
    _rewrite(token_log_odds=lambda x: x[:, 1:]),
    _rewrite(token_log_odds=lambda x: x * np.float32(np.nan)),
    _rewrite(keys=lambda x: x[::-1]),
    _rewrite(weights=lambda x: x[1:]),
], ids=['bit', 'above', 'below', 'tokens', 'orders', 'nan', 'keys', 'weights'])
def test_a_damaged_file_is_announced_and_made_again(damage, folder):
  want, _ = _fit(_config())
  want = want[0], want[1][:]
  path, = folder.iterdir()
  good = path.read_bytes()
  damage(path)
  found, said = _fit(_config())
  assert 'damaged' in said[0] and str(path) in said[0] and len(said) == 2
  _assert_equal(found, want)
  assert path.read_bytes() == good


def test_a_run_goes_on_where_nothing_can_be_cached(folder):
  folder.parent.mkdir()
  folder.write_text('no folder')
  found, said = _fit(_config())
  assert 'cannot write' in said[0] and said[0].endswith('; going on without')
  assert said[1].startswith('counted n-grams in ')
  _assert_equal(found, counting.fit(_config(), _reviews()))


def test_what_was_cached_first_makes_room(folder, monkeypatch):
  _fit(_config())
  path, = folder.iterdir()
  os.utime(path, (1, 1))
  monkeypatch.setattr(counting, '_MOST_CACHED', 3 * path.stat().st_size // 2)
  _fit(_config(), data='of others')
  (other,) = folder.iterdir()
  assert other != path
  monkeypatch.setattr(counting, '_MOST_CACHED', 100)
  _fit(_config(), data='of many')
  assert list(folder.iterdir()) == [other]  # too large itself
