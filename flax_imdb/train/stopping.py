"""Early stopping: which epoch is the best, and when no better one will come."""

import dataclasses

from ml_collections import ConfigDict

from flax_imdb.checkpoint.manager import Progress


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
  """The fields of `config.early_stopping`, see `configs/default.py`."""
  monitor: str
  patience: int
  min_delta: float
  restore_best: bool

  @classmethod
  def of(cls, config: ConfigDict) -> 'EarlyStopping':
    """As the config says."""
    return cls(**config.early_stopping.to_dict())

  def score(self, validation: dict[str, float]) -> float:
    """One number for what `evaluate.score` returned; the larger, the better."""
    if self.monitor == 'loss':
      return -validation['loss']
    return validation['accuracy']

  def update(self, progress: Progress, score: float) -> None:
    """Takes in an epoch's score; patience 0 never stops."""
    if (progress.reference is None
        or score > progress.reference + self.min_delta):
      progress.reference, progress.waited = score, 0
    else:
      progress.waited += 1
    progress.stopped = 0 < self.patience <= progress.waited
