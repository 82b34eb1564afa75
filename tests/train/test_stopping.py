"""Early stopping: what counts as better, and when it ends a run."""

from ml_collections import ConfigDict
import pytest

from flax_imdb.checkpoint.manager import Progress
from flax_imdb.train import stopping


def _updates(scores, patience, min_delta):
  early_stopping = ConfigDict({'patience': patience, 'min_delta': min_delta})
  progress, stopped = Progress(), []
  for score in scores:
    stopping.update(early_stopping, progress, score)
    stopped.append(progress.stopped)
  return stopped, progress


def test_early_stopping_counts_the_epochs_since_a_better_one():
  stopped, progress = _updates([-3, -4, -2, -2, -5], 2, 0.0)
  assert stopped == [False, False, False, False, True]
  assert (progress.reference, progress.waited) == (-2, 2)


def test_early_stopping_wants_more_than_min_delta():
  # Each is better than the one before, none by more than 0.5 than the first.
  stopped, progress = _updates([0.0, 0.25, 0.5, 0.5625], 3, 0.5)
  assert stopped == [False] * 4
  assert (progress.reference, progress.waited) == (0.5625, 0)
  assert _updates([0.0, 0.25, 0.375, 0.5], 3, 0.5)[0][-1]


def test_patience_0_never_stops():
  stopped, progress = _updates([1.0] + [0.0] * 9, 0, 0.0)
  assert not any(stopped) and progress.waited == 9


@pytest.mark.parametrize(('monitor', 'score'), [
    ('loss', -0.25), ('accuracy', 0.5), ('macro_f1', 0.4)])
def test_the_better_the_monitored_figure_the_larger_the_score(monitor, score):
  validation = {
      'loss': 0.25, 'accuracy': 0.5, 'macro_f1': 0.4, 'n': 4}
  assert stopping.score(ConfigDict({'monitor': monitor}), validation) == score
