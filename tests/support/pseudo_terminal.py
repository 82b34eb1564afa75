"""A terminal without a person: the real command line on it, what it shows."""

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import time

from support.command import ROOT, STRICT, environ

_CONTROL = re.compile(r'\x1b\[([?\d;]*)([A-Za-z])')
_SECONDS = 200
# It becomes the program whose terminal this is: so Ctrl-C is a signal to it.
_BEGIN = '''
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
'''


def run_at_terminal(*argv, columns=80, keys=(), **env):
  """Runs the command line on a terminal of 24 lines; (status, all it wrote).

  Of `keys`, pairs, the second is typed once the first, a regular expression, is
  found in what came since the last one was.
  """
  own, its = os.openpty()
  fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack('4H', 24, columns, 0, 0))
  process = subprocess.Popen(
      [sys.executable, '-c', _BEGIN, sys.executable, *STRICT, '-m',
       'flax_imdb.main', *argv], cwd=ROOT,
      env=environ(**{'TERM': 'xterm-256color', 'NO_COLOR': None,
                     'COLUMNS': None, 'LC_ALL': None} | env),
      stdin=its, stdout=its, stderr=its)
  os.close(its)
  output, seen, end = b'', 0, time.monotonic() + _SECONDS
  keys = list(keys)
  try:
    while time.monotonic() < end:
      try:
        chunk = os.read(own, 1 << 16)
      except OSError:  # Linux' way to say that nobody is there any more
        break
      output += chunk
      text = output.decode(errors='replace')
      if keys and re.search(keys[0][0], text[seen:]):
        seen = len(text)
        os.write(own, keys.pop(0)[1].encode())
    assert not keys, f'{keys[0][0]} was never seen: {text}'
    return process.wait(timeout=20), output.decode()
  finally:
    process.kill()
    process.wait()
    os.close(own)


def shown(output, columns):
  """The lines that a terminal shows after `output`, and whether a cursor.

  Trailing blanks and lines without anything are left out.
  """
  lines, row, column, cursor, at = [[]], 0, 0, True, 0
  while at < len(output):
    if control := _CONTROL.match(output, at):
      number, letter = control.groups()
      if letter == 'A':
        row = max(0, row - int(number or 1))
      elif letter == 'K':
        assert number == '2'
        lines[row] = []
      elif letter in 'hl' and number == '?25':
        cursor = letter == 'h'
      at = control.end()
      continue
    if output[at] == '\r':
      column = 0
    elif output[at] == '\n':  # a terminal driver makes \r\n of it
      row, column = row + 1, 0
    else:
      if column == columns:  # only now does a terminal begin another line
        row, column = row + 1, 0
        lines += [[] for _ in range(row + 1 - len(lines))]
      lines[row] += [' '] * (column + 1 - len(lines[row]))
      lines[row][column] = output[at]
      column += 1
    lines += [[] for _ in range(row + 1 - len(lines))]
    at += 1
  found = [''.join(line).rstrip() for line in lines]
  return [line for line in found if line], cursor
