"""examples/tour.ipynb runs, and what is kept of it is what it shows."""

import json
import re
import socket
import sys

import nbclient
import nbformat
import pytest
from support.command import ROOT

TOUR = ROOT / 'examples' / 'tour.ipynb'
# What these print is the same on any machine.
DETERMINED = ('setup', 'text', 'ids', 'table')


def _code():
  return [cell for cell in nbformat.read(TOUR, as_version=4).cells
          if cell.cell_type == 'code']


def _kinds(cell):
  """What a cell shows: streams by name, all else by types of content."""
  return {output.get('name') or frozenset(output.get('data', {}))
          for output in cell.outputs}


def _printed(cell):
  return ''.join(output.get('text', '') for output in cell.outputs)


def test_each_cell_was_run_in_its_order_and_shows_something():
  cells = _code()
  assert len(cells) > 15
  assert [cell.execution_count for cell in cells] == [
      *range(1, len(cells) + 1)]
  for cell in cells:
    assert cell.outputs, cell.id
    for output in cell.outputs:
      assert output.output_type != 'error', cell.id
      assert output.get('name') != 'stderr', cell.id  # a warning


def test_what_is_kept_is_small_and_tells_nothing_of_a_machine():
  assert TOUR.stat().st_size < 1 << 20
  for cell in _code():
    for output in cell.outputs:
      output.get('data', {}).pop('image/png', None)
    shown = json.dumps(cell.outputs)
    assert not re.search(
        r'/(tmp|home|root|work|Users|usr|opt|mnt|var|proc)/', shown), cell.id
    assert socket.gethostname() not in shown, cell.id


@pytest.mark.slow
def test_the_tour_runs_and_tells_the_truth(tmp_path, monkeypatch):
  kernel = tmp_path / 'jupyter' / 'kernels' / 'this' / 'kernel.json'
  kernel.parent.mkdir(parents=True)
  kernel.write_text(json.dumps({
      'argv': [sys.executable, '-m', 'ipykernel_launcher', '-f',
               '{connection_file}'],
      'display_name': 'this interpreter', 'language': 'python'}))
  monkeypatch.setenv('JUPYTER_PATH', str(tmp_path / 'jupyter'))
  monkeypatch.setenv('JUPYTER_RUNTIME_DIR', str(tmp_path / 'runtime'))
  monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  monkeypatch.delenv('NPROC', raising=False)  # for two devices
  notebook = nbformat.read(TOUR, as_version=4)
  nbclient.NotebookClient(
      notebook, timeout=1200, kernel_name='this',
      resources={'metadata': {'path': str(tmp_path)}}).execute()

  executed = [cell for cell in notebook.cells if cell.cell_type == 'code']
  for cell, kept in zip(executed, _code(), strict=True):
    assert _kinds(cell) == _kinds(kept), f'{cell.id}: see CONTRIBUTING.md'
    if cell.id in DETERMINED:
      assert _printed(cell) == _printed(kept), f'{cell.id}: see CONTRIBUTING.md'
  assert {cell.id for cell in executed} >= {*DETERMINED}
  accuracy = {
      path.parent.name: json.loads(path.read_text())['test']['accuracy']
      for path in tmp_path.glob('runs/grammar_reviews/*/summary.json')}
  assert accuracy['notebook'] < 0.6 < 0.9 < accuracy['masked']
  assert accuracy['simple_rnn'] < 0.8
