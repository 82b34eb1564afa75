"""A run at Weights & Biases: https://docs.wandb.ai.

Its own environment variables say where: WANDB_API_KEY, WANDB_PROJECT (else
flax_imdb), WANDB_MODE=offline, WANDB_DIR (else the run directory).
"""

import os
import pathlib
from typing import Any
import uuid

from ml_collections import ConfigDict

FIX = 'wandb login, or set WANDB_MODE=offline'


class Service:
  """One run; see `loggers.Loggers`."""

  def __init__(self, config: ConfigDict, workdir: str, known: str | None):
    """Begins a run, or goes on with the one of a known id.

    Raises what wandb raises.
    """
    import wandb

    self.id = known or uuid.uuid4().hex
    folder = os.environ.get('WANDB_DIR') or (
        None if '://' in workdir else workdir)
    self._run: Any = wandb.init(
        project=os.environ.get('WANDB_PROJECT') or 'flax_imdb', id=self.id,
        name=pathlib.PurePath(workdir).name, resume='allow', dir=folder,
        config=config.to_dict(),
        # The screen is the program's own; nothing of the checkout is sent.
        settings=wandb.Settings(
            silent=True, console='off', disable_git=True, save_code=False))

  def log(self, step: int, scalars: dict[str, float]) -> None:
    self._run.log(scalars, step=step)

  def log_results(self, step: int, scalars: dict[str, float]) -> None:
    self._run.summary.update(scalars | {'final/step': step})

  def close(self, done: bool) -> None:
    self._run.finish(exit_code=0 if done else 1)
