"""Training in another form of the recurrence, and from the command line."""

import json

import jax
import numpy as np
import pytest
from support.command import TINY, run_here
from support.models import default_with

from flax_imdb.cluster import devices
from flax_imdb.data import counting
from flax_imdb.data.batches import TrainBatches
from flax_imdb.data.reading import Reading, Share
from flax_imdb.data.reviews import load_splits, training_tokenizer
from flax_imdb.model import classifier
from flax_imdb.train.optimizer import build_optimizer
from flax_imdb.train.step import init_state, make_train_step

STEPS = 50


def _losses(config, reviews, form):
  """Of each step, the sum over its reviews."""
  model = classifier.build_model(config).clone(recurrence=form)
  optimizer = build_optimizer(config, STEPS)
  state = devices.replicate(jax.tree.map(
      np.asarray, init_state(config, model, optimizer)))
  step = make_train_step(config, model, optimizer, STEPS)
  batches = TrainBatches(
      reviews, config.seed, config.global_batch_size, Reading.of(config.data),
      Share(*devices.share()), STEPS)
  losses = []
  for i in range(STEPS):
    state, metrics = step(state, devices.shard(batches(i)))
    losses.append(float(devices.to_host(metrics.loss)))
  return np.diff(losses, prepend=0)


@pytest.mark.slow
@pytest.mark.parametrize('form', ['joint', 'loop', 'interpret'])
def test_the_default_learns_the_same_for_50_steps(form):
  config = default_with({
      'data.name': 'grammar_reviews', 'data.train_split': 'train[:400]',
      'data.validation_fraction': 0, 'global_batch_size': 16,
      'adversarial_norm': 0.3})
  reviews = load_splits(
      config, training_tokenizer(config, print), print, ['train'])['train']
  _, reviews = counting.fit(config, reviews)
  scan, other = (_losses(config, reviews, f) for f in ('scan', form))
  # The rounding of the first step has grown to this after 50 of Adam.
  np.testing.assert_allclose(other, scan, rtol=1e-3)
  np.testing.assert_allclose(other[:5], scan[:5], rtol=1e-5)
  assert scan.min() < 0.8 * scan[0]


def test_a_run_tells_its_form_and_goes_on_in_none_other(tmp_path):
  flags = [*TINY, f'--workdir={tmp_path}', '--config.num_epochs=1']
  said = run_here(*flags, '--config.model.recurrence=joint')
  assert 'recurrence: joint on cpu' in said.stdout
  summary = json.loads((tmp_path / 'summary.json').read_text('utf-8'))
  scores = run_here('--mode=eval', f'--workdir={tmp_path}').stdout
  assert f'accuracy {summary["test"]["accuracy"]:.4f}' in scores
  # Its next steps would not be those of this run to the bit.
  again = run_here(*flags)
  assert again.returncode == 2
  assert 'model.recurrence: joint there, loop now' in again.stderr


@pytest.mark.parametrize('flags, why', [
    (['--config.model.recurrence=kernel'], 'cpu is no TPU and no GPU'),
    (['--config.model.recurrence=kernel', '--config.model.cell=simple_rnn'],
     'is of config.model.cell=lstm'),
    (['--config.model.recurrence=fused'], 'choose scan, joint, loop')])
def test_what_there_is_not_is_one_line(tmp_path, flags, why):
  done = run_here(*TINY, f'--workdir={tmp_path / "run"}', *flags)
  assert done.returncode == 2 and done.stderr.count('\n') == 1
  assert why in done.stderr
  assert not (tmp_path / 'run').exists()
