"""Keeps a failed save or restore from printing dozens of tracebacks.

When one array fails, orbax raises and closes its event loop; those of the other
arrays still end, and each complains that it is closed, or that nobody asked for
its own error.
"""

import logging
import sys


def drop() -> None:
  """Drops these complaints, and no others, from now on."""
  if getattr(sys.unraisablehook, '__name__', '') == 'drop_late':
    return
  hook = sys.unraisablehook
  def drop_late(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      hook(unraisable)
  sys.unraisablehook = drop_late
  logging.getLogger('asyncio').addFilter(_was_asked_for)


def _was_asked_for(record: logging.LogRecord) -> bool:
  return 'was never retrieved' not in record.getMessage()
