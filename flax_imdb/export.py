"""A run directory to what other programs read."""

import pathlib

from flax_imdb import keras_weights
from flax_imdb import parallel
from flax_imdb import run
from flax_imdb.errors import UserError


def export_keras(workdir: str, which: str | None) -> str:
  """Writes keras.npz: what model.set_weights() of the notebook's model takes.

  Args:
    workdir: the run directory.
    which: as in `run.restore`.

  Returns:
    One line that says what was written.

  Raises:
    UserError: the run can't be opened, or Keras' model can't be like it.
  """
  restored = run.restore(workdir, which)
  if restored.config.model.pooling != 'last':
    raise UserError('Keras has no place for this model: it needs '
                    'config.model.pooling=last, as in configs/notebook.py')
  path = pathlib.Path(workdir, 'keras.npz')
  keras_weights.write(path, parallel.to_host(restored.params))
  return f'wrote step {restored.step} to {path}'
