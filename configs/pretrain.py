"""Learns words of IMDB's 75,000 reviews from their neighbours, without labels.

python -m flax_imdb.main --config=configs/pretrain.py

writes what --config.init_from=runs/pretrain begins a run with labels with. It
takes 14 minutes on one CPU core beside other work, and ends with 5.48 nats and
0.164 of the words of unseen reviews. It is no gain: runs that began with such a
one had 0.876 on validation, runs that began at random 0.891 (RESULTS.md).
"""

from ml_collections import ConfigDict

from flax_imdb.config import packaged


def get_config() -> ConfigDict:
  """The layers of configs/words.py in segments; begin runs with init_from."""
  config = packaged('words')
  config.objective = 'language_model'  # the next word, and the one before
  config.num_epochs = 2  # passes over 72,500 reviews
  config.global_batch_size = 64  # reviews a step
  config.eval_batch_size = 0  # as many: the states of all words are kept
  config.adam_epsilon = 1e-8  # added to the root in Adam's denominator
  config.warmup_epochs = 0.1  # linear rise from 0, in epochs
  config.data.unlabelled_split = 'unsupervised'  # 50,000 reviews more
  config.data.validation_by = 'groups'  # that share names
  config.data.max_length = 1000  # tokens
  config.data.segment_length = 100  # tokens read in one
  config.data.train_segments = 0  # all of a review
  config.model.recurrence = 'scan'  # all segments are as long
  config.model.word_dropout = 0.1  # share of words read as unknown
  config.model.embedding_dropout = 0.1  # share of features off for all words
  config.model.pooled_dropout = 0.1  # share of features of states off
  return config
