"""benchmarks/peers.py: what it refuses, and what it makes of times."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from support.command import ROOT, environ


@pytest.fixture
def peers(monkeypatch):
  """The module, which finds its own beside it."""
  monkeypatch.syspath_prepend(ROOT / 'benchmarks')
  return importlib.import_module('peers')


def ways(peers):
  return peers.WAYS['step'][0], peers.WAYS['step'][-1]


def test_no_time_is_printed_where_a_loss_differs(peers, capsys):
  ours, theirs = ways(peers)
  peers.check_losses('step', {ours: 0.7, theirs: 0.7 * (1 + 9e-5)})
  assert 'agree' in capsys.readouterr().out
  for wrong in (0.7 * (1 + 2e-4), float('nan')):
    with pytest.raises(SystemExit, match='step: torch .* has loss'):
      peers.check_losses('step', {ours: 0.7, theirs: wrong})
  assert not capsys.readouterr().out


def test_a_ratio_is_of_the_times_of_one_round(peers, capsys):
  ours, theirs = ways(peers)  # one machine, slower each round
  rows = peers.table('a step', 'ms', {
      ours: [1.0, 2.0, 8.0], theirs: [3.0, 4.0, 24.0]},
      convert=lambda s: 1e3 * s)['rows']
  assert [row['ratio'] for row in rows] == [1, 3]
  assert rows[1]['quartiles'] == [2, 3]
  assert rows[1]['median'] == 4000 and rows[1]['best'] == 3000
  printed = capsys.readouterr().out
  assert 'torch.compile' in printed and '3.00' in printed


def test_what_was_never_reached_has_no_number(peers, capsys):
  ours, theirs = ways(peers)
  found = peers.table('to 0.87', 's', {
      ours: [10.0, 12.0, 11.0], theirs: [20.0, float('inf'), float('inf')]})
  assert 'never' in capsys.readouterr().out
  row = json.loads(json.dumps(peers.finite(found), allow_nan=False))['rows'][1]
  assert row['each'] == [20, None, None] and row['ratio'] is None


def test_each_table_begins_with_ours_and_knows_what_it_gave(peers):
  for name, some in peers.WAYS.items():
    assert some[0].system == peers.OURS and not some[0].setting, name
    texts = [(way.system, way.given(True)) for way in some]
    assert len(set(texts)) == len(texts), name  # no two rows look alike


def test_batches_are_as_wide_as_the_padding_asks_for(peers, tmp_path):
  data = importlib.import_module('peers_data')
  lengths = np.array([[3, 70], [2, 129]], np.int32)
  np.savez(tmp_path / 'epoch.npz', ids=np.ones((2, 2, 500), np.int32),
           lengths=lengths, labels=np.zeros((2, 2), np.float32))
  recipe = {'data': {'bucket_width': 250}}
  for padding, widths in (
      ('trimmed', [70, 129]), ('packed', [70, 129]), ('padded', [500, 500]),
      ('bucketed 64', [128, 192]), ('own', [250, 250])):
    assert [batch['ids'].shape[1] for batch in data.load_batches(
        tmp_path, recipe, padding)] == widths


def test_an_unknown_table_is_one_line():
  done = subprocess.run(
      [sys.executable, 'benchmarks/peers.py', '--only=stop'], cwd=ROOT,
      env=environ(), capture_output=True, text=True, check=False)
  assert done.returncode == 2
  assert done.stderr.strip().splitlines() == [
      "peers.py: argument --only: 'stop' is no table; there are step, epoch, "
      'evaluate, startup, time_to_accuracy, memory']
