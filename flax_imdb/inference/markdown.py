"""Markdown of texts that may be a stranger's: in it they mean nothing."""

from collections.abc import Sequence
import re
from typing import Any


def code_span(value: Any) -> str:
  """One of Markdown, also in a table, that shows any text as it is.

  What is not printable, as a line's end or what turns the direction of writing,
  becomes U+FFFD; of an empty text nothing is shown.
  """
  text = printable(str(value)).replace('|', '\\|')
  if not text.strip():
    return ''
  most = max(map(len, re.findall('`+', text)), default=0)
  space = ' ' if text[0] in '` ' or text[-1] in '` ' else ''
  return '`' * (most + 1) + space + text + space + '`' * (most + 1)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table of Markdown, whose cells are Markdown."""
  return '\n'.join(f'| {" | ".join(row)} |' for row in (
      heads, ['---'] * len(heads), *rows)) + '\n'


def printable(text: str) -> str:
  """The same in a line: what can't be printed becomes U+FFFD."""
  return ''.join(c if c.isprintable() else '\ufffd' for c in text)


def commands(*lines: str) -> str:
  """Lines for a shell."""
  return '\n'.join(['```bash', *lines, '```']) + '\n'
