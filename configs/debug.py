"""Finds the line at fault: no jit, stops at the first NaN, tiny.

python -m flax_imdb.main --config=configs/debug.py

takes about 20 s on a CPU, two training steps long. Its accuracy means nothing.
"""

from ml_collections import ConfigDict

from flax_imdb.config import packaged


def get_config() -> ConfigDict:
  """configs/words.py, so small that it runs without compilation."""
  config = packaged('words')
  config.debug = True  # print() and breakpoint() work inside the model
  config.ema_decay = 0.0  # no averaged weights
  config.num_epochs = 1  # passes over 16 reviews
  config.global_batch_size = 8  # reviews a step
  config.eval_batch_size = 0  # as many
  config.data.name = 'grammar_reviews'  # generated: no network
  config.data.train_split = 'train[:24]'  # of which 8 validate
  config.data.test_split = 'test[:8]'  # tfds split
  config.data.validation_fraction = 0.333  # of the training split
  config.data.vocab_size = 100  # token ids
  config.data.max_length = 10  # tokens
  config.data.bucket_width = 5  # tokens
  config.model.bidirectional = False  # one direction
  config.model.embedding_dim = 4  # features a word
  config.model.width = 4  # units
  config.model.hidden_dim = 4  # units of the dense layer
  config.model.recurrence = 'scan'  # there is no loop without jit
  return config
