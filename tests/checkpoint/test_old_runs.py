"""A run directory made by 0.1.0, before the package had folders, still works.

Commit c4f41e9 made it, and it was stopped after the second of three epochs; the
figures below are those that this commit reached in the third. On the machine on
which it was made the bits are the same; another's last digits may differ.
"""

import json
import pathlib
import tarfile

import pytest

from flax_imdb import main
from flax_imdb.config import read_config

OLD = pathlib.Path(__file__).with_name('run_of_0.1.0.tar.gz')
VALIDATION = 0.6866308603557078  # loss after the second epoch
LAST_EPOCH = {
    'train': {'loss': 0.6917743104876894, 'accuracy': 0.5252525252525253,
              'n': 99},
    'validation': {'loss': 0.6818726784068384, 'accuracy': 0.6363636363636364,
                   'n': 11}}
TEST = {'loss': 0.6995483163674854, 'accuracy': 0.4444444444444444, 'n': 45}


@pytest.fixture
def workdir(tmp_path):
  with tarfile.open(OLD) as archive:
    archive.extractall(tmp_path, filter='data')
  return tmp_path


def _words(workdir):
  """The flags that ask for the run's own config."""
  config = read_config(workdir / 'config.json')
  fields = {f'{group}.{k}' if group else k: v
            for group in ('', 'data', 'model', 'early_stopping')
            for k, v in (config[group] if group else config).items()
            if not hasattr(v, 'items')}
  return [f'--config.{k}={v}' for k, v in fields.items()]


def test_it_resumes_to_what_its_own_version_would_have_reached(
    workdir, capsys):
  assert main.main([*_words(workdir), f'--workdir={workdir}']) == 0
  assert 'resuming from step 14 of 21' in capsys.readouterr().out
  lines = [json.loads(line) for line in
           (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [7, 14, 21]
  for split, expected in LAST_EPOCH.items():
    assert lines[-1][split] == pytest.approx(expected, rel=1e-6)
  summary = json.loads((workdir / 'summary.json').read_text())
  assert summary['best_step'] == 21
  assert summary['test'] == pytest.approx(TEST, rel=1e-6)


def test_it_is_evaluated_and_predicted_with(workdir, capsys):
  before = {f: f.read_bytes() for f in workdir.rglob('*') if f.is_file()}
  assert main.main(['--mode=eval', '--split=validation', '--step=14',
                    f'--workdir={workdir}']) == 0
  assert f'validation: loss {VALIDATION:.4f}' in capsys.readouterr().out
  assert main.main(['--mode=predict', f'--workdir={workdir}', 'dull']) == 0
  assert capsys.readouterr().out.endswith('dull  (only unknown words)\n')
  after = {f: f.read_bytes() for f in workdir.rglob('*') if f.is_file()}
  assert before == after
