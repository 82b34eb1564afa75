"""The pictures of README and docs/: a terminal, and pages in a browser.

  pip install -e '.[report,serve,test]'   # and tmux, chromium, chromium-driver
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
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

PICTURES = pathlib.Path(__file__).parent / 'pictures'
COLUMNS, ROWS = 92, 26
PROGRAM = sys.executable, '-m', 'flax_imdb.main'
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


@contextlib.contextmanager
def browser(width: int, height: int) -> Iterator[webdriver.Chrome]:
  """Chromium without a window, of so many CSS pixels."""
  os.environ['SE_OFFLINE'] = 'true'  # or selenium looks for a newer driver
  options = webdriver.ChromeOptions()
  for word in ('headless=new', 'no-sandbox', 'hide-scrollbars',
               f'window-size={width},{height}'):
    options.add_argument(f'--{word}')
  driver = webdriver.Chrome(options)
  try:
    yield driver
  finally:
    driver.quit()


def draw_report(workdir: str) -> None:
  """Draws the upper part of the page about a run."""
  subprocess.run([*PROGRAM, '--mode=report', f'--workdir={workdir}'],
                 check=True, stdout=subprocess.DEVNULL)
  with browser(1000, 1150) as driver:
    driver.get(pathlib.Path(workdir, 'report/index.html').resolve().as_uri())
    save(driver, 'report')


def draw_server(workdir: str) -> None:
  """Draws the page on which a review is typed, when it is answered."""
  with subprocess.Popen(
      [*PROGRAM, '--mode=serve', '--port=0', f'--workdir={workdir}'],
      stdout=subprocess.PIPE, text=True) as server:
    assert server.stdout
    address = next(found[0] for line in server.stdout
                   if (found := re.search(r'http://[\d.:]+', line)))
    with browser(1000, 760) as driver:
      driver.get(address)
      driver.find_element('css selector', 'textarea').send_keys(REVIEW)
      WebDriverWait(driver, _SECONDS).until(
          lambda driver: len(driver.find_elements('css selector', 'mark')) > 2)
      time.sleep(1)  # the pointer moves
      save(driver, 'serve')
    server.terminate()


def save(driver: webdriver.Chrome, name: str) -> None:
  """Saves what the browser shows."""
  (PICTURES / f'{name}.png').write_bytes(driver.get_screenshot_as_png())
  print(f'docs/pictures/{name}.png')


def main() -> None:
  """Draws all of them."""
  parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False)
  parser.add_argument('--workdir', required=True)
  workdir = parser.parse_args().workdir
  program = shlex.join(PROGRAM)
  with tempfile.TemporaryDirectory() as folder:
    draw('run', f'{program} --workdir={folder}/default',
         r'epoch 2/2 .* [5-9]\d%', 'a run of configs/default.py',
         'python -m flax_imdb.main')
  draw('explain', shlex.join([
      *PROGRAM, '--mode=predict', '--explain', f'--workdir={workdir}', REVIEW]),
       'gap', 'which words decided',
       f'python -m flax_imdb.main --mode=predict --explain "{REVIEW}"')
  draw_report(workdir)
  draw_server(workdir)


if __name__ == '__main__':
  main()
