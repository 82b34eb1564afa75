"""The one exception that stands for a mistake of the user."""


class UserError(Exception):
  """A mistake the user can mend; the message is one line and names the fix.

  `main` prints it on stderr without a traceback and exits with status 2.
  """
