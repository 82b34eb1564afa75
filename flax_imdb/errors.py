"""How a run ends that is not simply done, and with which exit status.

Each message is one line that names the fix; `main` prints it, no traceback.
"""

# What each exit status means. docs/troubleshooting.md has the same table, and
# what is in launch/ acts by it: it starts again on those of AGAIN, and never on
# that of a mistake.
STATUSES = {
    0: 'done',
    1: 'the run failed by itself',
    2: 'a mistake, which the same command makes again',
    69: 'something outside failed that may go away: start it again',
    75: 'stopped by a signal and saved: start it again',
    130: 'interrupted with nothing to save',
}
AGAIN = (69, 75)


class UserError(Exception):
  """A mistake that the same command makes again, until the user mends it."""
  status = 2


class TransientError(Exception):
  """Something outside failed that may go away: the same command goes on."""
  status = 69  # EX_UNAVAILABLE of sysexits.h


class Terminated(TransientError):
  """A run that was asked to stop when there was nothing new to save."""
  status = 75  # as `Preempted`


class ChildError(Exception):
  """A run that another process trained failed; `status` is what that gave."""

  def __init__(self, message: str, status: int):
    super().__init__(message)
    self.status = status


class Preempted(Exception):
  """A run that was asked to stop, and has saved what it had."""
  status = 75  # EX_TEMPFAIL of sysexits.h
