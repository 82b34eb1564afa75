"""What a run directory says beside its checkpoints."""

import json

from flax_imdb.checkpoint import run
from flax_imdb.cluster import processes


def test_a_temperature_is_of_its_step_alone(tmp_path):
  path = tmp_path / 'calibration.json'
  assert run.read_temperature(path, 14) == 1.0  # there is none
  run.write_calibration(str(tmp_path), 14, 2 / 3)
  assert json.loads(path.read_text()) == {'step': 14, 'temperature': 2 / 3}
  assert run.read_temperature(path, 14) == 2 / 3
  assert run.read_temperature(path, 7) == 1.0


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
  run.write_calibration(str(tmp_path), 14, 2.0)
  assert not list(tmp_path.iterdir())
