"""IMDB with labels only, a few minutes for the best: three LSTMs and n-grams.

python -m flax_imdb.main --config=configs/best.py
"""

from ml_collections import ConfigDict

from flax_imdb.config import packaged


def get_config() -> ConfigDict:
  """configs/default.py, of which three predict with a linear model."""
  config = packaged('default')
  config.data.validation_fraction = 0.05  # of the training split
  config.model.inputs = 'words+bigrams+log_odds+linear'  # see data/linear.py
  config.model.members = 3  # LSTMs side by side, of which the mean predicts
  return config
