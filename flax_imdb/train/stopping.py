"""Early stopping: how good an epoch is, and when no better one will come.

`early_stopping` is that group of the config, see `configs/default.py`.
"""

from ml_collections import ConfigDict

from flax_imdb.checkpoint.manager import Progress


def score(early_stopping: ConfigDict, validation: dict[str, float]) -> float:
  """One number for what `evaluate.score` returned; the larger, the better."""
  found = validation[early_stopping.monitor]
  return -found if early_stopping.monitor == 'loss' else found


def update(early_stopping: ConfigDict, progress: Progress,
           new_score: float) -> None:
  """Takes an epoch's score into the progress; patience 0 never stops."""
  if (progress.reference is None
      or new_score > progress.reference + early_stopping.min_delta):
    progress.reference, progress.waited = new_score, 0
  else:
    progress.waited += 1
  progress.stopped = is_over(early_stopping, progress)


def is_over(early_stopping: ConfigDict, progress: Progress) -> bool:
  """Whether a run ends here; with another patience it might not."""
  return 0 < early_stopping.patience <= progress.waited
