"""A small, fast, exact JAX/Flax trainer for labelled texts.

From Python:

  import flax_imdb

  config = flax_imdb.load_config('configs/quickstart.py')
  config.num_epochs = 1
  flax_imdb.train(config, 'runs/mine')
  run = flax_imdb.load('runs/mine')
  run.predict(['Not bad at all.'])
  run.explain(['Not bad at all.'])
  run.evaluate('test')
  run.history  # a dict of scores an epoch
  run.summary  # what train returned

To import it starts nothing, and does not import jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from ml_collections import ConfigDict

  from flax_imdb.api import OpenedRun

__version__ = '0.1.0'

# The folder train/ would take the place of the function below when it is first
# imported. So it is now, empty as it is.
importlib.import_module('flax_imdb.train')


def load_config(path: str) -> 'ConfigDict':
  """The config of a file, such as 'configs/default.py', to be changed.

  Raises errors.UserError if there is no such file, or it fails.
  """
  from flax_imdb import config
  return config.load_config(path)


def load(workdir: str, step: str | int | None = None) -> 'OpenedRun':
  """Opens a run directory, on a disk or at gs://, to predict and evaluate.

  `step` is best, latest or a number; None for what the run itself evaluated.
  Raises errors.UserError if there is no such run or step, or it is damaged.
  """
  from flax_imdb import api
  return api.OpenedRun(workdir, step)


def train(config: 'ConfigDict', workdir: str,
          quiet: bool = False) -> dict[str, Any]:
  """Trains, or goes on where `workdir` holds a run: the command's own train.

  Returns what summary.json holds; prints what the command prints, unless
  `quiet`. Raises errors.UserError if config, data or directory don't fit,
  TransientError if they may soon, Preempted if a signal asked for it, when the
  last step is saved, and FloatingPointError if the loss is not finite.
  """
  from flax_imdb import api
  return api.train(config, workdir, quiet)
