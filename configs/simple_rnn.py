"""The notebook's recipe with a SimpleRNN, to compare gradients with.

python -m flax_imdb.main --config=configs/simple_rnn.py

takes about 3 minutes on 2 CPU cores. Test accuracy 0.504 after 20 epochs: it
learns by heart a little, and nothing about reviews (RESULTS.md).
"""

from ml_collections import ConfigDict

from flax_imdb.config import packaged


def get_config() -> ConfigDict:
  """configs/notebook.py with another cell."""
  config = packaged('notebook')
  config.model.cell = 'simple_rnn'  # h' = tanh(x W + h R + b)
  return config
