"""Real IMDB, where TFDS_DATA_DIR has it: all of it is read, and encoded."""

import os
import pathlib

import numpy as np
import pytest

from flax_imdb import builders
from flax_imdb import config as config_lib
from flax_imdb import dataset

pytestmark = pytest.mark.skipif(
    not pathlib.Path(os.environ.get('TFDS_DATA_DIR', 'none'),
                     'imdb_reviews').is_dir(),
    reason='needs TFDS_DATA_DIR with imdb_reviews')


def test_the_complete_data_set_is_read():
  for split, n in (('train', 25_000), ('test', 25_000)):
    texts, labels = builders.read('imdb_reviews', split)
    assert len(texts) == n and labels.sum() == n // 2
    assert min(map(len, texts)) > 0


def test_ids_cover_the_reviews():
  config = config_lib.load('configs/notebook.py')
  tokenizer = dataset.fit_tokenizer(config, print)
  reviews = dataset.load(config, tokenizer, 'train', print)
  validation = dataset.load(config, tokenizer, 'validation', print)
  assert (len(reviews), len(validation)) == (17_500, 7_500)
  assert tokenizer.get_vocab_size() == 10_000
  assert 215 < reviews.lengths(500).mean() < 225
  ids = reviews.ids[:reviews.offsets[-1]]
  assert 0.03 < np.mean(ids == 2) < 0.08
  assert ids.max() == 9_999 and (ids != 0).all() and (ids != 3).all()
  assert (ids[reviews.offsets[:-1]] == 1).all()
