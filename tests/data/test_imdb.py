"""Real IMDB, where TFDS_DATA_DIR has it: all of it is read, and encoded."""

import os
import pathlib

import numpy as np
import pytest
from support import data_sets

from flax_imdb.config import load_config
from flax_imdb.data import sources
from flax_imdb.data.reviews import load_splits, training_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not pathlib.Path(os.environ.get('TFDS_DATA_DIR', 'none'),
                     'imdb_reviews').is_dir(),
    reason='needs TFDS_DATA_DIR with imdb_reviews')]


def test_the_complete_data_set_is_read():
  for split, n in (('train', 25_000), ('test', 25_000)):
    texts, labels = sources.read_texts(data_sets.of('imdb_reviews'), split)
    assert len(texts) == n and labels.sum() == n // 2
    assert min(map(len, texts)) > 0


def test_ids_cover_the_reviews():
  config = load_config('configs/notebook.py')
  tokenizer = training_tokenizer(config, print)
  splits = load_splits(config, tokenizer, print)
  reviews, validation = splits['train'], splits['validation']
  assert (len(reviews), len(validation)) == (17_500, 7_500)
  assert tokenizer.get_vocab_size() == 10_000
  assert 215 < reviews.lengths(500).mean() < 225
  ids = reviews.ids[:reviews.offsets[-1]]
  assert 0.03 < np.mean(ids == 2) < 0.08
  assert ids.max() == 9_999 and (ids != 0).all() and (ids != 3).all()
  assert (ids[reviews.offsets[:-1]] == 1).all()
