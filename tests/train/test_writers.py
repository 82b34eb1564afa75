"""What a run writes can be read back, and is cut where a run resumes."""

import json
import os
import pathlib
import resource
import struct

import pytest
from tensorboardX.proto import event_pb2

from flax_imdb.errors import UserError
from flax_imdb.train.writers import Writers

LINES = [{'epoch': i, 'step': 5 * i, 'train': {'loss': 1 / i, 'n': 80}}
         for i in (1, 2, 3)]


def _write(workdir, lines=LINES, step=0):
  writers = Writers(str(workdir), step)
  for line in lines:
    writers.write(line, {'reviews_per_second': 2.5})


def events_of(path):
  """The TensorBoard events of a file."""
  events, data, at = [], path.read_bytes(), 0
  while at < len(data):
    (length,) = struct.unpack_from('<Q', data, at)
    events.append(event_pb2.Event.FromString(data[at + 12:at + 12 + length]))
    at += length + 16  # a length, its CRC, the event, its CRC
  assert at == len(data)
  return events


def _events(workdir):
  """Those of a directory, file by file."""
  paths = sorted(pathlib.Path(workdir).glob('events.out.tfevents.*'))
  return [event for path in paths for event in events_of(path)]


def test_every_line_is_json_and_holds_no_rates(tmp_path):
  _write(tmp_path)
  text = (tmp_path / 'metrics.jsonl').read_text()
  assert [json.loads(line) for line in text.splitlines()] == LINES
  assert text.endswith('\n') and 'per_second' not in text


def test_a_line_is_on_disk_when_write_returns(tmp_path):
  writers = Writers(str(tmp_path), 0)
  for i, line in enumerate(LINES):
    writers.write(line, {})
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert json.loads(lines[-1]) == line and len(lines) == i + 1
    assert _events(tmp_path)[-1].step == line['step']


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
    Writers(str(tmp_path), 5)
  assert path.read_text() == f'{line}\n'  # nothing is lost


def test_a_disk_that_fails_keeps_the_old_lines(tmp_path, monkeypatch):
  _write(tmp_path)
  path = tmp_path / 'metrics.jsonl'
  before = path.read_bytes()
  def full(*args):
    raise OSError('disk full')
  monkeypatch.setattr(os, 'replace', full)
  with pytest.raises(UserError, match='cannot write .*jsonl'):
    Writers(str(tmp_path), 5)
  assert path.read_bytes() == before


def test_a_full_disk_is_told_and_the_half_line_is_cut_later(tmp_path):
  writers = Writers(str(tmp_path), 0)
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
  writers = Writers(str(tmp_path), 10)
  assert not _events(tmp_path)  # its library is slow to import: not at start
  writers.write({'step': 12, 'loss': 1.0}, {})
  starts = [e.step for e in _events(tmp_path)
            if e.session_log.status == event_pb2.SessionLog.START]
  assert starts == [11]  # TensorBoard forgets what earlier files say from there


def test_a_resumed_run_keeps_the_events_before_its_step(tmp_path):
  _write(tmp_path, LINES[:2])
  _write(tmp_path, LINES[2:], 10)  # within a second of the first
  steps = {e.step for e in _events(tmp_path) if e.summary.value}
  assert steps == {5, 10, 15}
