"""What a person sees: plain lines, bars and a live view on a terminal."""

import contextlib
import io
import re
import shlex
import shutil
import signal
import sys

import numpy as np
import pytest
from rich.text import Text
from support.command import TINY
from support.pseudo_terminal import run_at_terminal, shown

from flax_imdb import terminal as terminals
from flax_imdb.terminal import CompileClock, Terminal, clock


class _Stream(io.StringIO):
  """A standard output that is a terminal, or says so."""
  encoding = 'utf-8'

  def __init__(self, is_terminal=True):
    super().__init__()
    self._is_terminal = is_terminal

  def isatty(self):
    return self._is_terminal


class _View:
  """Two lines."""

  def __rich_console__(self, console, options):
    yield Text('first line of the view')
    yield Text(f'second, {self.figure}' if hasattr(self, 'figure') else '-')

  def update(self, *figures):
    self.figure, = figures

  def line(self):
    return f'in a log: {self.figure}'


@pytest.fixture
def output(monkeypatch):
  """The stream of what `_begin` takes for a terminal of 60 columns."""
  for name in 'NO_COLOR', 'FORCE_COLOR', 'LC_ALL', 'TTY_INTERACTIVE':
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('TERM', 'xterm-256color')
  monkeypatch.setenv('COLUMNS', '60')
  return _Stream()


def _begin(output, quiet=False):
  with contextlib.redirect_stdout(output):
    return Terminal(quiet)


@pytest.fixture
def now(monkeypatch):
  """The time, in a list that a test may change."""
  time = [1000.0]
  monkeypatch.setattr(terminals.time, 'monotonic', lambda: time[0])
  return time


def test_lines_are_plain_when_no_terminal_is_there(capsys):
  with Terminal() as terminal, terminal.showing(_View()):
    terminal.update(3)
    text = '[bold]x[/bold] :bomb: 12 ' + 'word ' * 40 + 'end'
    terminal.announce(text)
    terminal.progress('evaluating', 3, 10)
    terminal.table([('', 'loss'), ('test', '0.5')], ['test: loss 0.5'])
  assert capsys.readouterr() == (f'{text}\ntest: loss 0.5\n', '')


def test_the_view_is_below_what_is_announced_and_goes_when_it_ends(output):
  with _begin(output) as terminal:
    with terminal.showing(_View()):
      terminal.update('three')
      terminal._live.refresh()
      terminal.announce('saved')
      assert shown(output.getvalue(), 60) == (
          ['saved', 'first line of the view', 'second, three'], False)
    terminal.announce('done')
    assert shown(output.getvalue(), 60) == (['saved', 'done'], True)


def test_a_bar_says_how_far_a_pass_is_and_goes_at_its_end(output):
  with _begin(output) as terminal:
    terminal.progress('tokenizing', 0, 200)
    terminal.progress('tokenizing', 50, 200)  # too soon to look again
    terminal._looked_at -= 1
    terminal.progress('tokenizing', 100, 200)
    terminal._live.refresh()
    (line,), cursor = shown(output.getvalue(), 60)
    assert re.fullmatch(r'tokenizing ━+╺?━*  50% \S+ left', line), line
    assert not cursor
    terminal.progress('tokenizing', 200, 200)
    assert shown(output.getvalue(), 60) == ([], True)


def test_a_bar_without_a_total_has_the_time_so_far_until_something_is_said(
    output):
  with _begin(output) as terminal:
    terminal.progress('counting', 0, 0)
    (line,), _ = shown(output.getvalue(), 60)
    assert re.fullmatch('counting ━+ 0:00:00', line)
    terminal.announce('counted')
    assert shown(output.getvalue(), 60) == (['counted'], True)


def test_a_failure_leaves_nothing_that_is_live(output):
  with pytest.raises(ZeroDivisionError), _begin(output) as terminal:
    terminal.progress('counting', 0, 0)
    raise ZeroDivisionError
  assert shown(output.getvalue(), 60) == ([], True)
  assert 'rich' not in type(sys.stdout).__module__


def test_a_bar_that_comes_while_another_stdout_is_there_leaves_both(output):
  """As while tfds prepares, whose banners are caught."""
  with contextlib.redirect_stdout(output):
    with Terminal() as terminal:
      with contextlib.redirect_stdout(io.StringIO()) as caught:
        terminal.progress('preparing', 1, 2)
        print('a banner')
      terminal.progress('preparing', 2, 2)
    assert sys.stdout is output
  assert 'preparing' in output.getvalue()
  assert caught.getvalue() == 'a banner\n'


def test_a_bar_stands_for_each_compilation():
  said = []
  compiled = CompileClock(progress=lambda *words: said.append(words))
  function = compiled.wrap(lambda state, batch: said.append('compiled'))
  for _ in range(2):
    function(None, {'ids': np.zeros((2, 3))})
  assert said == [('compiling a batch shape', 0, 0), 'compiled',
                  ('compiling a batch shape', 1, 1), 'compiled']


def test_a_log_has_a_line_each_ten_seconds_of_a_long_pass(now):
  output = _Stream(is_terminal=False)
  with _begin(output) as terminal:
    for i in range(1, 61):
      now[0] += 0.5
      terminal.progress('evaluating', i, 60)
    lines = output.getvalue().splitlines()
    # The last item ends the pass, of which its function tells.
    assert [re.sub(', .* left', '', line) for line in lines] == [
        'evaluating: 20 of 60', 'evaluating: 40 of 60']
    with terminal.showing(_View()):
      for i in range(1, 101):
        now[0] += 0.25
        terminal.update(i)
        if i == 30:
          terminal.announce('a line, after which ten seconds begin anew')
    assert output.getvalue().splitlines()[2:] == [
        'in a log: 1', 'a line, after which ten seconds begin anew',
        'in a log: 70']


@pytest.mark.parametrize('variables', [
    {'TERM': 'dumb'}, {'FORCE_COLOR': '1'}], ids=lambda x: next(iter(x)))
def test_nothing_is_live_on_a_dumb_terminal_or_in_a_coloured_log(
    variables, output, monkeypatch):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  if 'FORCE_COLOR' in variables:
    output._is_terminal = False
  with _begin(output) as terminal, terminal.showing(_View()):
    terminal.update(3)
    terminal.progress('evaluating', 3, 10)
    terminal.table([('', 'loss'), ('test', '0.5')], ['test: loss 0.5'])
  assert output.getvalue() == 'test: loss 0.5\n'


def test_quiet_prints_nothing(output, now):
  with _begin(output, quiet=True) as terminal, terminal.showing(_View()):
    now[0] += 1000
    terminal.update(3)
    terminal.progress('evaluating', 3, 10)
    terminal.table([('', 'loss'), ('test', '0.5')], ['test: loss 0.5'])
    terminal.announce('done')
  assert output.getvalue() == ''


def test_lines_break_between_words_but_for_what_is_to_be_copied(output):
  with _begin(output) as terminal:
    terminal.announce('word  ' * 15 + '/a/path' * 12)
    terminal.announce('--flag=value' + ' --flag=value' * 6, whole=True)
  *lines, whole = output.getvalue().splitlines()
  assert lines == [('word  ' * 10).rstrip(), '  ' + ('word  ' * 5).rstrip(),
                   '  ' + '/a/path' * 12]
  assert whole == '--flag=value' + ' --flag=value' * 6


def _colours(text):
  return [x for x in re.findall(r'\x1b\[([\d;]*)m', text) if re.search(
      r'(?:^|;)(?:[349]\d|10\d)(?:;|$)', x)]


@pytest.mark.parametrize('no_color', [False, True])
def test_no_color_is_heeded(no_color, output, monkeypatch):
  if no_color:
    monkeypatch.setenv('NO_COLOR', '1')
  with _begin(output) as terminal:
    terminal.progress('evaluating', 0, 10)
    terminal._bar.update(terminal._bar.tasks[0].id, completed=5)
    terminal._live.refresh()
  assert '50%' in output.getvalue()
  assert bool(_colours(output.getvalue())) != no_color


@pytest.mark.parametrize(('encoding', 'variables', 'is_ascii'), [
    ('utf-8', {}, False), ('ascii', {}, True), ('latin-1', {}, True),
    ('utf-8', {'LC_ALL': 'C'}, True)])
def test_bars_and_tables_are_ascii_where_the_terminal_is_not_of_utf_8(
    encoding, variables, is_ascii, output, monkeypatch):
  output.encoding = encoding
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  with _begin(output) as terminal:
    terminal.progress('a pass with a name too long for any terminal', 0, 10)
    terminal.progress('counting', 0, 0)
    terminal.table([('', 'loss'), ('test', '0.5')], ['test: loss 0.5'])
  assert output.getvalue().isascii() == is_ascii


def test_a_table_fits_forty_columns(output, monkeypatch):
  monkeypatch.setenv('COLUMNS', '40')
  rows = [('', 'loss', 'accuracy', 'reviews'),
          ('validation', '0.1234', '0.9876', '225,000')]
  with _begin(output) as terminal:
    terminal.table(rows, [])
  lines, _ = shown(output.getvalue(), 40)
  assert [line.split() for line in (lines[0], lines[-1])] == [
      list(rows[0][1:]), list(rows[1])]
  assert all(len(line) <= 40 for line in output.getvalue().splitlines()
             if '\x1b' not in line)


def test_who_leaves_at_once_gives_the_cursor_back(output, monkeypatch):
  monkeypatch.setattr(output, 'fileno', lambda: 7, raising=False)
  monkeypatch.setattr(terminals.os, 'write', lambda where, what: (
      output.write(what.decode())))
  with _begin(output) as terminal:
    terminal.leave()
    assert output.getvalue() == ''
    terminal.progress('counting', 0, 0)
    assert not shown(output.getvalue(), 60)[1]
    terminal.leave()
    assert shown(output.getvalue(), 60)[1]


@pytest.mark.parametrize(('seconds', 'text'), [
    (0.4, '0:00:00'), (65, '0:01:05'), (36_610, '10:10:10')])
def test_a_clock(seconds, text):
  assert clock(seconds) == text


@pytest.mark.parametrize(('columns', 'variables'), [
    (80, {}), (40, {'PYTHONIOENCODING': 'ascii', 'NO_COLOR': '1'})])
def test_ctrl_c_leaves_one_line_with_the_command_that_goes_on(
    columns, variables, tmp_path):
  """And before that the view is there, of which nothing is left."""
  argv = [*TINY, '--config.num_epochs=400', f'--workdir={tmp_path}']
  status, output = run_at_terminal(
      *argv, columns=columns, keys=[('best: epoch 1,', '\x03')], **variables)
  assert status == 75
  for found in (
      r'epoch 1/400 ', r'run +\S* +0% ', r'train +0\.\d{4} ',
      r'validation +0\.\d{4} ', r'step \d+ of 2,800 +[\d,]+ reviews/s',
      r'[\d,]+ tokens/s', r'memory \d\.\d\d GB  2 x cpu',
      'recurrence: loop on'):
    assert re.search(found, re.sub(r'\x1b\[[\d;]*m', '', output)), found
  assert output.isascii() == bool(variables)
  assert bool(_colours(output)) != bool(variables)
  lines, cursor = shown(output, columns)
  assert cursor
  whole = ''.join(line.ljust(columns) for line in lines)
  assert not re.search('tokens/s|━|memory|left', whole)
  said = re.search(
      r'stopped by SIGINT after step \d+ of 2800, which is saved: the same '
      r'command goes on from there: python -m flax_imdb.main (.*)', whole)[1]
  assert shlex.split(said) == argv


def test_a_run_ends_with_a_table_and_what_to_type_next(tmp_path, trained):
  shutil.copytree(trained[0], tmp_path / 'run')
  argv = [*TINY, f'--workdir={tmp_path}/run']
  status, output = run_at_terminal(*argv)
  assert status == 0
  lines, cursor = shown(output, 80)
  assert cursor and not any('━' in line for line in lines)
  rows = {line.split()[0]: line.split()[1:] for line in lines
          if re.match(r' (train|validation|test) ', line)}
  assert list(rows) == ['train', 'validation', 'test']
  assert [row[-1] for row in rows.values()] == ['99', '11', '45']
  said = dict(re.findall(r'(\w+): loss (\S+)', trained[1]))
  assert rows['test'][0] == said['test']
  text = ''.join(lines)
  assert 's of training; the run lies in' in text
  for mode in 'predict', 'report', 'serve':
    assert f'python -m flax_imdb.main --mode={mode} --workdir=' in text


def test_a_bar_of_the_data_is_taken_away_by_a_signal(tmp_path):
  status, output = run_at_terminal(
      *TINY, f'--workdir={tmp_path}/run', columns=80,
      keys=[('preparing|tokenizing', '\x03')],
      XDG_CACHE_HOME=str(tmp_path / 'cache'))
  assert status == 130
  lines, cursor = shown(output, 80)
  assert cursor and not re.search('━', ''.join(lines)), lines
  assert 'error: interrupted' in ''.join(lines)


def test_an_interrupt_waits_until_a_drawing_is_whole():
  drawn = False
  with pytest.raises(KeyboardInterrupt):
    with terminals._uninterrupted():
      signal.raise_signal(signal.SIGINT)
      drawn = True
  assert drawn and signal.getsignal(signal.SIGINT) is signal.default_int_handler
