"""The recipe with which a plain LSTM went furthest on IMDB; for accelerators.

python -m flax_imdb.main --config=configs/record.py
"""

from ml_collections import ConfigDict

from flax_imdb.config import packaged


def get_config() -> ConfigDict:
  """configs/words.py, wide and long, with all terms of the loss."""
  config = packaged('words')
  config.num_epochs = 50  # passes over 22,500 reviews
  config.global_batch_size = 256  # reviews a step
  config.adam_epsilon = 1e-8  # added to the root in Adam's denominator
  config.learning_rate = 1e-3  # Adam's own
  config.schedule = 'constant'  # theirs halves where validation stands still
  config.warmup_epochs = 0.0  # none
  config.ema_decay = 0.999  # a step's share that averaged weights keep
  config.adversarial_norm = 5.0  # of what is added to embedded inputs
  config.virtual_adversarial_norm = 5.0  # the same without labels
  config.entropy_weight = 1.0  # of predictions without a label
  config.early_stopping.monitor = 'accuracy'  # of validation
  config.data.validation_by = 'groups'  # that share names
  config.data.max_length = 1000  # tokens of a review, read in one
  config.data.bucket_width = 200  # tokens; five widths to compile
  config.model.embedding_dim = 256  # theirs are 300: 2.3 times a TPU's lanes
  config.model.width = 512  # units a direction
  config.model.pooling = 'max'  # of the states
  config.model.hidden_dim = 0  # the logit is of the pooled states
  config.model.word_dropout = 0.0  # no words read as unknown
  config.model.embedding_dropout = 0.5  # share of features off for all words
  config.model.pooled_dropout = 0.5  # share of pooled features off
  return config
