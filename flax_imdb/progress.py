"""What a run remembers beside its state, from one checkpoint to the next."""

import dataclasses
from typing import Any

_NUMBER = (int, float)
_KINDS = {'reference': (*_NUMBER, type(None)), 'waited': (int,),
          'stopped': (bool,), 'seconds': _NUMBER}


@dataclasses.dataclass
class Progress:
  """What a run remembers beside its state; a part of every checkpoint.

  Attributes:
    reference: the score that the next one must beat by `min_delta`; None
      before the first. The larger, the better.
    waited: epochs since one did.
    stopped: early stopping has ended the run.
    seconds: spent on training and validation, over all resumes.
  """
  reference: float | None = None
  waited: int = 0
  stopped: bool = False
  seconds: float = 0.0

  def update(self, score: float, patience: int, min_delta: float) -> None:
    """Takes in an epoch's score; patience 0 never stops."""
    if self.reference is None or score > self.reference + min_delta:
      self.reference, self.waited = score, 0
    else:
      self.waited += 1
    self.stopped = 0 < patience <= self.waited


def check(saved: dict[str, Any]) -> None:
  """Checks that `Progress(**saved)` is one that a run can have had.

  Raises:
    ValueError: a field is unknown, of another type or no number of this world.
  """
  for name, value in saved.items():
    if type(value) not in _KINDS.get(name, ()) or not (
        -1e15 < (value or 0) < 1e15):
      raise ValueError(f'its progress has {name}={value!r:.20}')
