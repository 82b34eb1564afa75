r"""Your own labelled texts: CSV, TSV, JSON lines or Parquet.

python -m flax_imdb.main --config=configs/texts.py \
    --config.data.train_file=reviews.csv

not measured
"""

from ml_collections import ConfigDict

from flax_imdb.config import packaged


def get_config() -> ConfigDict:
  """configs/default.py on files, of which at most 256,000 texts are read."""
  config = packaged('default')
  config.data.name = 'files'  # by flax_imdb/data/texts.py
  config.data.validation_by = 'text'  # a hash: equal texts are on one side
  config.max_steps_per_epoch = 2_000  # 128,000 texts: a part of a large file
  return config
