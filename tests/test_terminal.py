"""What a person sees: plain lines, and a live one on a terminal."""

import io

from rich.console import Console

from flax_imdb.terminal import Terminal


def test_lines_are_plain_when_no_terminal_is_there(capsys):
  terminal = Terminal()
  terminal.start(0, 10)
  terminal.update(3, 'live')
  text = '[bold]x[/bold] :bomb: 12 ' + 'word ' * 40 + 'end'
  terminal.announce(text)
  terminal.stop()
  assert capsys.readouterr() == (f'{text}\n', '')


def _screen(output, width):
  """The lines a terminal shows after `output`, trailing blanks left out."""
  lines, row, column, i = [''], 0, 0, 0
  while i < len(output):
    if output[i] == '\x1b':
      end = next(j for j in range(i + 2, len(output)) if output[j].isalpha())
      if output[i + 2:end + 1] == '1A':
        row -= 1
      elif output[i + 2:end + 1] == '2K':
        lines[row] = ''
      i = end + 1
      continue
    if output[i] == '\n':
      row, column = row + 1, 0
      lines += [''] * (row + 1 - len(lines))
    elif output[i] == '\r':
      column = 0
    else:
      lines[row] = (lines[row].ljust(column)[:column] + output[i]
                    + lines[row][column + 1:])
      column += 1
    i += 1
  assert all(len(line) <= width for line in lines)
  return [line.rstrip() for line in lines if line.strip()]


def test_the_live_line_is_below_what_is_announced_and_stop_removes_it():
  terminal, file = Terminal(), io.StringIO()
  terminal._console = Console(force_terminal=True, file=file, width=70)
  terminal.start(0, 10)
  terminal.update(3, 'epoch 1  step 3/10')
  terminal._live.refresh()
  terminal.announce('saved')
  first, live = _screen(file.getvalue(), 70)
  assert first == 'saved' and live.startswith('epoch 1  step 3/10')
  terminal.stop()
  terminal.update(4, 'never')
  terminal.announce('done')
  assert _screen(file.getvalue(), 70) == ['saved', 'done']
