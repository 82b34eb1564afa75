"""What `sources` is asked for: config.data of a data set."""

from ml_collections import ConfigDict

from flax_imdb.config import packaged


def of(name: str, **fields: str) -> ConfigDict:
  """config.data of configs/default.py with another data set, and fields."""
  data = packaged('default').data
  data.update(name=name, **fields)
  return data


def config_of(data: ConfigDict) -> ConfigDict:
  """Configs/default.py with another config.data, as `of` makes them."""
  config = packaged('default')
  config.data = data
  return config
