"""The pictures of README and docs/: a terminal, and pages in a browser.

  pip install -e '.[docs,report,serve]'   # and tmux, chromium, chromium-driver
  python docs/pictures.py --workdir=runs/default

makes them anew in docs/pictures/. A terminal's is what tmux shows of a program
that runs in it, a page's what Chromium draws of it, so nothing is painted that
a user doesn't see. The workdir is a finished run of configs/default.py.
"""

import argparse
from collections.abc import Iterator
import contextlib
import io
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time

from rich.console import Console
from rich.text import Text

PICTURES = pathlib.Path(__file__).parent / 'pictures'
COLUMNS, ROWS = 92, 26
_SECONDS = 300  # that a program may take to show what is waited for
REVIEW = ('I wanted to love it, and the first half hour is wonderful, but the '
          'rest is dull and far too long.')


@contextlib.contextmanager
def terminal(columns: int = COLUMNS, rows: int = ROWS) -> Iterator:
  """A terminal of its own: tmux(*words) -> what tmux prints."""
  socket = tempfile.mktemp(prefix='tmux_')
  def tmux(*words: str) -> str:
    return subprocess.run(
        ['tmux', '-S', socket, *words], check=True, capture_output=True,
        text=True).stdout
  tmux('-f', os.devnull, 'new-session', '-d', '-x', str(columns), '-y',
       str(rows), 'env PS1= TERM=screen-256color COLORTERM=truecolor bash '
       '--norc --noprofile')
  try:
    yield tmux
  finally:
    tmux('kill-server')


def draw(name: str, command: str, until: str, title: str,
         shown: str | None = None) -> None:
  """Draws a terminal, once `until`, a regular expression, stands in it.

  It is what `command` shows, written there as `shown`.
  """
  with terminal() as tmux:
    tmux('send-keys', f'clear; {command}', 'Enter')
    start = time.monotonic()
    while not re.search(until, screen := tmux('capture-pane', '-p', '-e')):
      if time.monotonic() - start > _SECONDS:
        sys.exit(f'{command} does not show {until!r}:\n{screen}')
      time.sleep(0.2)
  console = Console(record=True, width=COLUMNS, file=io.StringIO(),
                    force_terminal=True, color_system='truecolor')
  lines = screen.rstrip().splitlines()
  console.print(Text.from_ansi('\n'.join([f'$ {shown or command}', *lines])))
  svg = re.sub(r'@font-face {.*?}', '', console.export_svg(title=title),
               flags=re.DOTALL)  # they would be asked for elsewhere
  (PICTURES / f'{name}.svg').write_text(svg, 'utf-8')
  print(f'docs/pictures/{name}.svg')


def main() -> None:
  """Draws all of them."""
  parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False)
  parser.add_argument('--workdir', required=True)
  args = parser.parse_args()
  python = f'{shlex.quote(sys.executable)} -m flax_imdb.main'
  draw('explain', f'{python} --mode=predict --explain --workdir='
       f'{shlex.quote(args.workdir)} {shlex.quote(REVIEW)}', 'gap',
       'which words decided',
       f'python -m flax_imdb.main --mode=predict --explain "{REVIEW}"')


if __name__ == '__main__':
  main()
