"""The reviews to predict: words, a file or standard input."""

from collections.abc import Sequence
import sys

from flax_imdb.errors import UserError

# Bytes: some 50,000 reviews of IMDB. They are read whole, so that a mistake in
# the last one is told before the first is predicted.
_MOST_BYTES = 64 << 20
# The longest review of IMDB has 14,000; a million take 80 MB to encode.
_MOST_CHARACTERS = 1 << 20


def read(words: Sequence[str], file: str | None) -> list[str]:
  """Reads the reviews, one from the words or one a line.

  Args:
    words: of one review; empty to read lines.
    file: None for standard input.

  Raises:
    UserError: both are given; the lines can't be read, are none, are too many,
      too long or not UTF-8.
  """
  if words:
    if file:
      raise UserError('give a review after the flags or --input, not both')
    return [' '.join(words)]
  source = file or 'standard input'
  try:
    if file:
      with open(file, 'rb') as f:
        raw = f.read(_MOST_BYTES + 1)  # a pipe may never end
    else:  # None if it is closed
      raw = sys.stdin.buffer.read(_MOST_BYTES + 1) if sys.stdin else b''
    if len(raw) > _MOST_BYTES:
      raise UserError(f'{source} has more than {_MOST_BYTES:,} bytes: divide '
                      'it, for instance with split -C 64M')
    text = raw.decode('utf-8')
  except OSError as e:
    raise UserError(f'cannot read {source} ({e.strerror})') from e
  except UnicodeDecodeError as e:
    line = raw[:e.start].count(b'\n') + 1
    raise UserError(f'{source} is not UTF-8 in line {line}: convert it, for '
                    'instance with iconv -t UTF-8') from e
  if not text:
    raise UserError(f'{source} is empty: give one review a line')
  # Not splitlines(), which also splits where a review has a form feed.
  lines = text.replace('\r\n', '\n').removesuffix('\n').split('\n')
  for number, review in enumerate(lines, 1):
    if len(review) > _MOST_CHARACTERS:
      raise UserError(
          f'{source} has {len(review):,} characters in line {number}, more '
          f'than {_MOST_CHARACTERS:,}: give one review a line')
  return lines
