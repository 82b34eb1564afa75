"""Pseudo-labels: kept with what they are of, and never read for another."""

import numpy as np
import pytest
from support import data_sets

from flax_imdb.config import load_config
from flax_imdb.data import pseudo_labels, sources
from flax_imdb.data.pseudo_labels import PseudoLabels
from flax_imdb.errors import UserError

PROBABILITIES = np.array([0.0, 0.25, 1.0], np.float32)


@pytest.fixture
def source():
  sources.prepare(data_sets.of('grammar_reviews'), print)
  config = load_config('configs/quickstart.py')
  config.data.unlabelled_split = 'train[:3]'
  return pseudo_labels.source(config)


def _saved(path, of, probabilities=PROBABILITIES):
  pseudo_labels.save(
      PseudoLabels(probabilities, of, [{'run': 'a', 'step': 3}]), path)
  return path


def test_what_is_saved_is_read_again(tmp_path, source):
  path = _saved(tmp_path / 'pseudo_labels.npz', source)
  found = pseudo_labels.load(path, source, 3)
  np.testing.assert_array_equal(found.probabilities, PROBABILITIES)
  assert found.teachers == [{'run': 'a', 'step': 3}]
  assert found.of == source and len(source['fingerprint']) == 16


@pytest.mark.parametrize('change', [
    {'split': 'train[:4]'}, {'name': 'imdb_reviews'},
    {'fingerprint': '0' * 16}])
def test_those_of_other_reviews_are_refused(change, tmp_path, source):
  path = _saved(tmp_path / 'pseudo_labels.npz', source | change)
  with pytest.raises(UserError, match='delete it, and training makes it again'):
    pseudo_labels.load(path, source, 3)


def test_as_many_as_there_are_are_read(tmp_path, source):
  n = (1 << 24) + 20_000
  path = _saved(tmp_path / 'pseudo_labels.npz', source, np.zeros(n, np.float32))
  assert len(pseudo_labels.load(path, source, n).probabilities) == n
  with pytest.raises(UserError, match='more than .* delete it, and training'):
    pseudo_labels.load(path, source, 3)


def test_another_number_is_refused(tmp_path, source):
  path = _saved(tmp_path / 'pseudo_labels.npz', source)
  with pytest.raises(UserError, match='has labels of 3 reviews'):
    pseudo_labels.load(path, source, 4)


def _rewritten(path, **arrays):
  with np.load(path) as f:
    arrays = dict(f) | arrays
  np.savez(path, **arrays)


@pytest.mark.parametrize('change', [
    lambda path: path.write_bytes(path.read_bytes()[:-60]),
    lambda path: _rewritten(path, about=np.zeros(5, np.uint8)),
    lambda path: _rewritten(path, about=np.frombuffer(b'[]', np.uint8)),
    lambda path: _rewritten(path, probabilities=np.zeros(3)),
    lambda path: _rewritten(path, probabilities=np.array([0, 0, 2], 'f4')),
    lambda path: _rewritten(path, probabilities=np.full(3, np.nan, 'f4'))],
    ids=['truncated', 'no text', 'a list', 'float64', 'large', 'nan'])
def test_what_is_damaged_is_one_line(change, tmp_path, source):
  path = _saved(tmp_path / 'pseudo_labels.npz', source)
  change(path)
  with pytest.raises(UserError, match='is damaged .* delete it'):
    pseudo_labels.load(path, source, 3)
