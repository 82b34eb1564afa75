"""What a run directory says beside its checkpoints."""

import json

import pytest

from flax_imdb.checkpoint import records, run
from flax_imdb.cluster import processes
from flax_imdb.errors import UserError


def test_a_temperature_is_of_its_step_alone(tmp_path):
  path = tmp_path / 'calibration.json'
  assert records.read_temperature(path, 14) == 1.0  # there is none
  records.write_calibration(str(tmp_path), 14, 2 / 3)
  assert json.loads(path.read_text()) == {'step': 14, 'temperature': 2 / 3}
  assert records.read_temperature(path, 14) == 2 / 3
  assert records.read_temperature(path, 7) == 1.0


def test_a_finished_run_is_opened_with_its_temperature(trained):
  workdir, _ = trained
  found = json.loads((workdir / 'calibration.json').read_text())
  restored = run.restore(str(workdir), None)
  assert restored.step == found['step']
  assert restored.temperature == found['temperature'] != 1
  other, = {7, 14} - {restored.step}
  assert run.restore(str(workdir), str(other)).temperature == 1.0


def test_of_several_processes_the_first_one_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(processes, 'index', lambda: 1)
  records.write_calibration(str(tmp_path), 14, 2.0)
  assert not list(tmp_path.iterdir())


def test_the_names_of_the_classes_are_those_of_labels_json(trained, tmp_path):
  workdir, _ = trained
  assert json.loads((workdir / 'labels.json').read_text()) == [
      'negative', 'positive']
  assert run.restore(str(workdir), None).labels == ('negative', 'positive')
  assert records.read_labels(str(tmp_path)) == ('negative', 'positive')  # older
  (tmp_path / 'labels.json').write_text('["Börse", "b", "c"]')
  assert records.read_labels(str(tmp_path)) == ('Börse', 'b', 'c')


@pytest.mark.parametrize('content', [
    b'', b'{}', b'"ab"', b'7', b'null', b'["a"]', b'["a", "a"]', b'["a", 7]',
    b'["a", ["b"]]', b'{"a": 1, "b": 2}', b'["a", "b"', b'\xff', b'[' * 9999,
    b'["a", "\\u001b[2J"]', b'["a", "\\ud800"]', b'["a", ""]',
    json.dumps(['a', 'b' * 201]).encode(),
    json.dumps([str(i) for i in range(1001)]).encode(),
    b'["a", "b"]' + b' ' * (1 << 20)])
def test_names_of_a_stranger_are_refused_in_one_line(tmp_path, content):
  (tmp_path / 'labels.json').write_bytes(content)
  with pytest.raises(UserError) as caught:
    records.read_labels(str(tmp_path))
  assert str(tmp_path / 'labels.json') in str(caught.value)
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 400


def test_a_history_ends_where_a_run_was_killed(tmp_path):
  assert records.read_history(str(tmp_path)) == []
  (tmp_path / 'metrics.jsonl').write_text('{"epoch": 1}\n{"epoch": 2}\n{"ep')
  assert records.read_history(str(tmp_path)) == [{'epoch': 1}, {'epoch': 2}]


def test_a_run_that_has_not_ended_has_no_summary(tmp_path):
  with pytest.raises(UserError, match='no summary.json yet: train it'):
    records.read_summary(str(tmp_path))


@pytest.mark.parametrize('name, read', [
    ('metrics.jsonl', records.read_history),
    ('summary.json', records.read_summary), ('data.json', records.read_data)])
@pytest.mark.parametrize('content', [
    b'\n', b'[]\n', b'7\n', b'{"a": 1\n', b'\xff\n', b'[' * 99_999 + b'\n',
    b'{}\n' + b' ' * (1 << 24)])
def test_an_account_of_a_stranger_is_refused_in_one_line(
    tmp_path, name, read, content):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError) as caught:
    read(str(tmp_path))
  assert str(tmp_path / name) in str(caught.value)
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 400
