"""A plain LSTM with all terms of the loss, as in the literature; for a TPU.

python -m flax_imdb.main --config=configs/record.py

was never run as it stands: there was no accelerator. So there is no time and no
accuracy to expect here; Sachan, Zaheer & Salakhutdinov 2019 report 0.957 on
test. What was done instead: its step was compiled for four chips of a TPU v5e
(--mode=compile), of whose 16 GiB each it takes 2.5, and ten steps of 8 reviews
of 200 tokens, all with labels, were run on a CPU.

It is their recipe as far as there are fields. They begin with word vectors that
were learned before, on whose scale a norm of 5 is small. The embeddings here
begin a hundredth as large as features of variance 1: try smaller norms, too.
Their Adam has decays of 0 and 0.98, and their dropout is another at each word.
"""

from ml_collections import ConfigDict

from flax_imdb.config import packaged


def get_config() -> ConfigDict:
  """configs/words.py, wide and long, with all terms of the loss."""
  config = packaged('words')
  config.num_epochs = 50  # passes over 22,500 reviews and 50,000 without labels
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
  config.data.unlabelled_split = 'unsupervised'  # tfds split
  config.data.validation_by = 'groups'  # that share names
  config.data.max_length = 1000  # tokens of a review, read in one
  config.data.bucket_width = 200  # tokens; five widths to compile
  config.model.embedding_dim = 256  # theirs: 300, which a TPU pads to 384
  config.model.width = 512  # units a direction
  config.model.recurrence = 'scan'  # what the estimate is of
  config.model.pooling = 'max'  # of the states
  config.model.hidden_dim = 0  # the logit is of the pooled states
  config.model.word_dropout = 0.0  # no words read as unknown
  config.model.embedding_dropout = 0.5  # share of features off for all words
  config.model.pooled_dropout = 0.5  # share of pooled features off
  return config
