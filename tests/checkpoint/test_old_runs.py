"""Run directories that other versions made still work, and bit for bit.

0.1.0 made one before the package had folders, commit c4f41e9, with jax 0.10.2;
the others are of the same config, made with the oldest and the newest jax that
are tested, and with their versions of orbax, 0.11.30 and 0.12.8. Each was
stopped after the second of three epochs; the figures of the training below are
those that c4f41e9 reached in the third. On the machine on which it was made the
bits are the same; another's last digits, and another jax', may differ. What is
evaluated are averages, which go on with shares of the newest weights that
c4f41e9 did not give them: of those the figures are this version's.
"""

import hashlib
import json
import pathlib
import tarfile

import jax
import numpy as np
from orbax.checkpoint import v1
import pytest

from flax_imdb import main
from flax_imdb.checkpoint import run
from flax_imdb.checkpoint.manager import Checkpoints
from flax_imdb.cluster import devices
from flax_imdb.config import read_config
from flax_imdb.model import classifier
from flax_imdb.train.optimizer import build_optimizer
from flax_imdb.train.step import state_shapes

# By run directory: the start of the SHA-256 over the arrays of each item, as
# read by the version that wrote them.
ARRAYS = {
    'run_of_0.1.0': {
        'model': '8087d3b64c7b906d', 'training': '79915e455d51be88'},
    'run_of_jax_0.10.1': {
        'model': 'bab521b5933b92e9', 'training': 'f01ceccd9b427a14'},
    'run_of_jax_0.12.0.1': {
        'model': '101a2114d0a00d2a', 'training': 'e5204a4293791793'},
}
VALIDATION = 0.6866308603557078  # loss after the second epoch
LAST_EPOCH = {
    'train': {'loss': 0.6917743104876894, 'accuracy': 0.5252525252525253,
              'n': 99},
    'validation': {'loss': 0.6818309770, 'accuracy': 0.6363636363636364,
                   'n': 11}}  # c4f41e9: 0.6818727
TEST = {'loss': 0.6995820470, 'accuracy': 0.4444444444444444, 'n': 45}


@pytest.fixture(params=ARRAYS)
def workdir(request, tmp_path):
  file = pathlib.Path(__file__).with_name(f'{request.param}.tar.gz')
  path = tmp_path / request.param
  with tarfile.open(file) as archive:
    archive.extractall(path, filter='data')
  return path


def _hashes(items):
  """As in ARRAYS."""
  hashes = {}
  for name, tree in items.items():
    sha = hashlib.sha256()
    for x in jax.tree.leaves(tree):
      sha.update(np.ascontiguousarray(x).tobytes())
    hashes[name] = sha.hexdigest()[:16]
  return hashes


def test_every_bit_of_the_arrays_comes_back(workdir):
  config = read_config(workdir / 'config.json')
  shapes = state_shapes(config, classifier.build_model(config),
                        build_optimizer(config, 21)).to_items()
  with Checkpoints(str(workdir), read_only=True) as checkpoints:
    items, _ = checkpoints.restore(14, shapes)
  assert _hashes(devices.to_host(items)) == ARRAYS[workdir.name]


def test_every_bit_of_the_arrays_can_be_read_with_v1_of_orbax(workdir):
  load = getattr(v1, 'load', None) or v1.load_pytree  # in orbax 0.11
  items = {name: load(workdir / 'checkpoints' / '14', checkpointable_name=name)
           for name in ('model', 'training')}
  assert _hashes(items) == ARRAYS[workdir.name]


def _words(workdir):
  """The flags that ask for the run's own config."""
  config = read_config(workdir / 'config.json')
  fields = {f'{group}.{k}' if group else k: v
            for group in ('', 'data', 'model', 'early_stopping')
            for k, v in (config[group] if group else config).items()
            if not hasattr(v, 'items')}
  return [f'--config.{k}={v}' for k, v in fields.items()]


def test_it_resumes_to_the_steps_that_its_own_version_would_have_done(
    workdir, capsys):
  assert main.main([*_words(workdir), f'--workdir={workdir}']) == 0
  assert 'resuming from step 14 of 21' in capsys.readouterr().out
  lines = [json.loads(line) for line in
           (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [7, 14, 21]
  for split, expected in LAST_EPOCH.items():
    got = {key: lines[-1][split][key] for key in expected}
    assert got == pytest.approx(expected, rel=1e-6)
  summary = json.loads((workdir / 'summary.json').read_text())
  assert summary['best_step'] == 21
  assert {key: summary['test'][key] for key in TEST} == pytest.approx(
      TEST, rel=1e-6)
  assert list(summary['test']['classes']) == ['negative', 'positive']


def test_it_is_evaluated_and_predicted_with(workdir, capsys):
  before = {f: f.read_bytes() for f in workdir.rglob('*') if f.is_file()}
  assert main.main(['--mode=eval', '--split=validation', '--step=14',
                    f'--workdir={workdir}']) == 0
  assert f'validation: loss {VALIDATION:.4f}' in capsys.readouterr().out
  assert main.main(['--mode=predict', f'--workdir={workdir}', 'dull']) == 0
  assert capsys.readouterr().out.endswith('dull  (only unknown words)\n')
  restored = run.restore(str(workdir), None)
  assert restored.temperature == 1.0
  assert restored.labels == ('negative', 'positive')
  after = {f: f.read_bytes() for f in workdir.rglob('*') if f.is_file()}
  assert before == after
