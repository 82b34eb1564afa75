"""benchmarks/accelerators.py --run, on a CPU: that it works, not how fast."""

import importlib
import json
import subprocess
import sys

import jax
from jax.experimental import rnn
import jax.numpy as jnp
import numpy as np
import pytest
from support.command import ROOT, STRICT, environ
from support.models import drawn_params

from flax_imdb.config import load_config
from flax_imdb.errors import UserError
from flax_imdb.model import classifier, joint

DEVICE = jax.local_devices()[0]


@pytest.fixture
def run(monkeypatch):
  """benchmarks/accelerators_run.py."""
  monkeypatch.setenv('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # it sets that
  monkeypatch.syspath_prepend(ROOT / 'benchmarks')
  return importlib.import_module('accelerators_run')


class Played:
  """A system that a form's name alone tells what it does."""

  def __init__(self, form, *_):
    self.form, self.steps = form, 0
    if form == 'refused':
      raise UserError('no such chip')

  def step(self, batch):
    self.steps += 1
    if self.form == 'large':
      raise RuntimeError('RESOURCE_EXHAUSTED: 99 GiB')
    if self.form == 'later' and self.steps > 5:
      raise RuntimeError('it broke\nat some place')

  def wait(self):
    wrong = {'wrong': 2e-4, 'nan': float('nan')}.get(self.form, 5e-5)
    return 0.7 * (1 + wrong * (self.steps == 3 and self.form != 'scan'))

  def logits(self, batch):
    return np.full(len(batch['labels']), 1e-3 * (self.form == 'evaluates'))

  def peak_mib(self, batch):
    return None


def test_what_can_not_be_timed_is_a_row_that_says_why(
    run, monkeypatch, capsys):
  monkeypatch.setattr(run.forms, 'make', Played)
  monkeypatch.setattr(run, 'init_state', lambda *_: {'step': 0})
  monkeypatch.setattr(run, 'MIN_SECONDS', 0)
  forms = ['scan', 'refused', 'large', 'wrong', 'nan', 'evaluates', 'later',
           'well']
  rows = {row['form']: row for row in run.measure(
      forms, run.config_of(4, 6, 5), DEVICE, rounds=3)}
  assert list(rows) == forms
  assert {form for form in forms if 'step_ms' in rows[form]} == {'scan', 'well'}
  assert {form for form in forms if rows[form].get('failed')} == {
      'wrong', 'nan', 'evaluates', 'later'}
  assert rows['refused']['why'] == 'no such chip'
  assert rows['large']['why'] == 'does not fit: RESOURCE_EXHAUSTED: 99 GiB'
  assert rows['later']['why'] == 'it broke'
  assert '0.700140' in rows['wrong']['why']
  assert rows['wrong']['why'].endswith('off by 2.0e-04')
  assert 'it broke\nat some place' in capsys.readouterr().err
  for row in rows.values():
    assert row.get('why', 'well ' * (row['form'] == 'well')) in run.line(row)


def test_without_the_scan_nothing_is_compared(run, monkeypatch, capsys):
  def make(form, *others):
    return Played('large' if form == 'scan' else form)
  monkeypatch.setattr(run.forms, 'make', make)
  monkeypatch.setattr(run, 'init_state', lambda *_: {'step': 0})
  rows = run.measure(['scan', 'well'], run.config_of(4, 6, 5), DEVICE, rounds=1)
  assert 'does not fit' in rows[0]['why'] and 'step_ms' not in rows[1]


def test_the_roofline_of_a_chip(run, monkeypatch):
  """By hand: 128 reviews of 500 tokens, width 32, on a v5e."""
  monkeypatch.setattr(run.forms, 'make', Played)
  monkeypatch.setattr(run, 'init_state', lambda *_: {'step': 0})
  monkeypatch.setitem(run.PEAKS, DEVICE.device_kind, run.PEAKS['TPU v5e'])
  row, = run.measure(['scan'], run.config_of(32, 128, 500), DEVICE, rounds=1)
  seconds = row['step_ms'] / 1e3
  flops = 6 * 128_000 * 8192  # 128 x 64 weights
  assert row['tflops'] == pytest.approx(flops / seconds / 1e12)
  moved = 128_000 * 4 * (96 + 160)  # takes longer: 0.16 ms against 0.03
  assert row['roofline'] == pytest.approx(100 * moved / 819e9 / seconds)
  assert row['epoch_s'] == pytest.approx(176 * seconds)


@pytest.mark.parametrize('flag, said', [
    ('--forms=scan,lstm', 'choose of scan,joint'), ('--rounds=0', 'at least 1'),
    ('--batches=8,', 'invalid numbers value'), ('--widths=0', 'model.width'),
    ('--json=/no/where/x.json', 'writable directory')])
def test_what_would_fail_later_is_refused_at_once(run, capsys, flag, said):
  with pytest.raises(SystemExit) as stopped:
    run.main([flag])
  assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_cudnn_gets_our_weights_as_jax_packs_them(run, monkeypatch):
  """jax' reference of cuDNN's layer gives what our scan does, and the slope."""
  def lstm(x, h, c, weights, lengths, e, width, layers, dropout, both):
    return rnn.lstm_ref(
        x, h, c, *rnn.unpack_lstm_weights(weights, e, width, layers, both),
        lengths, e, width, layers, dropout, both)
  monkeypatch.setattr(rnn, 'lstm', lstm)
  config = load_config('configs/words.py')
  config.data.vocab_size = 20
  config.model.update(embedding_dim=4, width=3)
  model = classifier.build_model(config)
  cudnn = run.forms.Cudnn(**{
      k: getattr(model, k)
      for k in classifier.SentimentClassifier.__annotations__})
  params = drawn_params(model)
  ids = np.random.default_rng(0).integers(4, 20, (4, 6))
  lengths = jnp.array([1, 6, 3, 5], jnp.int32)

  def loss(params, model):
    return model.apply({'params': params}, ids, lengths) @ jnp.arange(1., 5)
  ours, theirs = jax.jit(lambda params: [
      jax.value_and_grad(loss)(params, m) for m in (model, cudnn)])(params)
  assert abs(ours[0]) > 1e-3
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
               ours, theirs)


@pytest.mark.slow  # compiles six programs
def test_the_command_line_times_equal_forms(tmp_path):
  out, picture = tmp_path / 'rows.json', tmp_path / 'roofline.png'
  process = subprocess.run(
      [sys.executable, *STRICT, 'benchmarks/accelerators.py', '--run',
       '--batches=8', '--widths=8', '--length=12', '--rounds=2',
       '--forms=joint,interpret,kernel,cudnn', f'--json={out}',
       f'--picture={picture}'], cwd=ROOT, capture_output=True, text=True,
      env=environ(JAX_NUM_CPU_DEVICES=None, PYTHONPATH=str(ROOT)), check=False)
  assert process.returncode == 0, process.stderr
  rows = json.loads(out.read_text())
  assert [row['form'] for row in rows] == [
      'scan', 'joint', 'interpret', 'kernel', 'cudnn']
  lines = process.stdout.splitlines()
  assert [text.split()[0] for text in lines[2:]] == [
      row['form'] for row in rows]
  for row in rows[:3]:
    np.testing.assert_allclose(row['losses'], rows[0]['losses'], rtol=1e-5)
    assert row['step_ms'] > 0 and row['evaluate_ms'] > 0
    assert row['first_step_s'] > 0 and row['peak_mib'] > 0
  assert rows[0]['losses'][3] < rows[0]['losses'][0] - 1e-3  # it learns
  assert 'no TPU and no GPU' in rows[3]['why']
  assert 'no GPU of NVIDIA' in rows[4]['why']
  assert picture.read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow  # compiles two train steps
def test_a_form_with_a_wrong_gradient_is_refused(run, monkeypatch):
  def without_bias(cell, weights, *args, **more):
    return recurrence(cell, [w | {'bias': jax.lax.stop_gradient(w['bias'])}
                             for w in weights], *args, **more)
  recurrence = joint.recurrence
  monkeypatch.setattr(joint, 'recurrence', without_bias)
  scan, wrong = run.measure(
      ['scan', 'joint'], run.config_of(8, 8, 12), DEVICE, rounds=1)
  assert 'step_ms' in scan and 'step_ms' not in wrong
  assert wrong['failed'] and "not the scan's" in wrong['why']
  assert wrong['losses'][0] == pytest.approx(scan['losses'][0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('peer', ['torch', 'keras'])
def test_a_peer_has_our_losses(run, peer):
  pytest.importorskip(peer)
  rows = run.measure(['scan', peer], run.config_of(8, 8, 12), DEVICE, rounds=1)
  assert 'step_ms' in rows[1], rows[1].get('why')
