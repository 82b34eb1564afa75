"""How a run ends that is not simply done, and with which exit status.

Each message is one line that names the fix; `main` prints it, no traceback.
"""


class UserError(Exception):
  """A mistake that the same command makes again, until the user mends it."""
  status = 2


class TransientError(Exception):
  """Something outside failed that may go away: the same command goes on."""
  status = 69  # as EX_UNAVAILABLE of sysexits.h; the launchers start it again


class Preempted(Exception):
  """A run that was asked to stop, and has saved what it had."""
  status = 75  # as EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again
