"""What a run writes can be read back, and is cut where a run resumes."""

import io
import json
import os
import pathlib
import resource
import struct

import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2

from flax_imdb import metrics
from flax_imdb.errors import UserError

LINES = [{'epoch': i, 'step': 5 * i, 'train': {'loss': 1 / i, 'n': 80}}
         for i in (1, 2, 3)]


def _write(workdir, lines=LINES, step=0):
  writers = metrics.Writers(str(workdir), step)
  for line in lines:
    writers.write(line, {'reviews_per_second': 2.5})
  writers.close()


def _events(workdir):
  """The TensorBoard events of a directory, file by file."""
  events = []
  for path in sorted(pathlib.Path(workdir).glob('events.out.tfevents.*')):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (length,) = struct.unpack_from('<Q', data, at)
      events.append(event_pb2.Event.FromString(data[at + 12:at + 12 + length]))
      at += length + 16  # a length, its CRC, the event, its CRC
    assert at == len(data)
  return events


def test_every_line_is_json_and_holds_no_rates(tmp_path):
  _write(tmp_path)
  text = (tmp_path / 'metrics.jsonl').read_text()
  assert [json.loads(line) for line in text.splitlines()] == LINES
  assert text.endswith('\n') and 'per_second' not in text


def test_a_line_is_on_disk_when_write_returns(tmp_path):
  writers = metrics.Writers(str(tmp_path), 0)
  for i, line in enumerate(LINES):
    writers.write(line, {})
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert json.loads(lines[-1]) == line and len(lines) == i + 1
    assert _events(tmp_path)[-1].step == line['step']
  writers.close()


@pytest.mark.parametrize(('step', 'kept'), [
    (0, 0), (4, 0), (5, 1), (9, 1), (10, 2), (15, 3), (99, 3)])
def test_what_lies_beyond_the_step_is_cut(tmp_path, step, kept):
  _write(tmp_path)
  before = (tmp_path / 'metrics.jsonl').read_bytes().splitlines(True)
  _write(tmp_path, [{'step': 100}], step)
  after = (tmp_path / 'metrics.jsonl').read_bytes().splitlines(True)
  assert after == [*before[:kept], b'{"step": 100}\n']
  assert not list(tmp_path.glob('*.tmp'))


@pytest.mark.parametrize('half', ['{"step": 15, "tr', '{"step": 15}', '\0\0'])
def test_a_half_written_last_line_is_removed(tmp_path, half):
  _write(tmp_path, LINES[:2])
  path = tmp_path / 'metrics.jsonl'
  whole = path.read_bytes()
  path.write_text(whole.decode() + half)
  _write(tmp_path, [], 99)
  assert path.read_bytes() == whole


@pytest.mark.parametrize('line', ['junk', '{}', '[1]', '\0\0'])
def test_a_damaged_line_is_the_users_to_mend(tmp_path, line):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(f'{line}\n')
  with pytest.raises(UserError, match='metrics.jsonl'):
    metrics.Writers(str(tmp_path), 5)
  assert path.read_text() == f'{line}\n'  # nothing is lost


def test_a_disk_that_fails_keeps_the_old_lines(tmp_path, monkeypatch):
  _write(tmp_path)
  path = tmp_path / 'metrics.jsonl'
  before = path.read_bytes()
  def full(*args):
    raise OSError('disk full')
  monkeypatch.setattr(os, 'replace', full)
  with pytest.raises(UserError, match='cannot write .*metrics.jsonl'):
    metrics.Writers(str(tmp_path), 5)
  assert path.read_bytes() == before


def test_a_full_disk_is_told_and_the_half_line_is_cut_later(tmp_path):
  writers = metrics.Writers(str(tmp_path), 0)
  writers.write(LINES[0], {})
  whole = (tmp_path / 'metrics.jsonl').read_bytes()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 9, limits[1]))
  try:
    with pytest.raises(UserError, match=r'metrics.jsonl \(File too large\): '):
      writers.write(LINES[1], {})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == (
      whole + json.dumps(LINES[1]).encode()[:9])
  writers.close()
  _write(tmp_path, LINES[1:], 5)
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == LINES


def test_tensorboard_events_have_tags_values_and_steps(tmp_path):
  _write(tmp_path)
  got = {(e.step, v.tag): v.simple_value
         for e in _events(tmp_path) for v in e.summary.value}
  for line in LINES:
    step = line['step']
    assert got[step, 'train/loss'] == pytest.approx(line['train']['loss'])
    assert got[step, 'train/n'] == 80
    assert got[step, 'reviews_per_second'] == 2.5
  assert {step for step, _ in got} == {5, 10, 15}


def test_a_resumed_run_purges_the_events_beyond_its_step(tmp_path):
  writers = metrics.Writers(str(tmp_path), 10)
  assert not _events(tmp_path)  # its library is slow to import: not at start
  writers.write({'step': 12, 'loss': 1.0}, {})
  writers.close()
  starts = [e.step for e in _events(tmp_path)
            if e.session_log.status == event_pb2.SessionLog.START]
  assert starts == [11]  # TensorBoard forgets what earlier files say from there


def test_a_resumed_run_keeps_the_events_before_its_step(tmp_path):
  _write(tmp_path, LINES[:2])
  _write(tmp_path, LINES[2:], 10)  # within a second of the first
  steps = {e.step for e in _events(tmp_path) if e.summary.value}
  assert steps == {5, 10, 15}


def test_means_divide_by_the_weight():
  sums = {'loss': 6.0, 'correct': 3.0, 'weight': 4.0, 'grad_norm': 9.0}
  assert metrics.means(sums) == {'loss': 1.5, 'accuracy': 0.75, 'n': 4}


def test_lines_are_plain_when_no_terminal_is_there(capsys):
  terminal = metrics.Terminal()
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
  terminal, file = metrics.Terminal(), io.StringIO()
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
