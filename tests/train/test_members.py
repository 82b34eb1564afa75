"""Several members of a model learn as each would alone, and vote together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import default_with

from flax_imdb.cluster import devices
from flax_imdb.data import counting
from flax_imdb.data.batches import TrainBatches
from flax_imdb.data.reading import Reading, Share
from flax_imdb.data.reviews import Reviews
from flax_imdb.inference import evaluate
from flax_imdb.model import classifier
from flax_imdb.train.optimizer import build_optimizer
from flax_imdb.train.step import init_state, make_train_step

STEPS, EPOCH = 6, 3
FIELDS = {
    'global_batch_size': 8, 'learning_rate': 0.01, 'ema_decay': 0.9,
    'warmup_epochs': 0, 'adversarial_norm': 0.3, 'data.vocab_size': 60,
    'data.bigrams': 50, 'data.max_length': 12, 'data.segment_length': 6,
    'data.train_segments': 0, 'data.log_odds_order': 2,
    'data.log_odds_ngrams': 50, 'model.embedding_dim': 4, 'model.width': 5}
DROPOUT = ('word', 'bigram', 'log_odds', 'embedding', 'pooled')


def _config(**fields):
  return default_with(FIELDS | fields)


def _reviews():
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 15, 24)
  return Reviews(
      rng.integers(4, 60, lengths.sum()).astype(np.uint16),
      np.concatenate([[0], np.cumsum(lengths)]),
      rng.integers(0, 2, 24).astype(np.int8))


def _trained(config, params=None):
  """(state, metrics) after some steps, from these parameters or drawn ones."""
  known, reviews = counting.fit(config, _reviews())
  model = classifier.build_model(config)
  optimizer = build_optimizer(config, EPOCH)
  state = init_state(config, model, optimizer)
  if params is not None:
    state = state.replace(params=params, ema=classifier.averaged(params))
  state = devices.replicate(jax.tree.map(np.asarray, state))
  step = make_train_step(config, model, optimizer, EPOCH)
  batches = TrainBatches(reviews, 0, 8, Reading.of(config.data),
                         Share(*devices.share()))
  for i in range(STEPS):
    state, metrics = step(state, devices.shard(batches(i)))
  return model, known, devices.to_host(state), devices.to_host(metrics)


@pytest.fixture(scope='module')
def together():
  """Two members without dropout, and with what they began."""
  config = _config(**{'model.members': 2, **{
      f'model.{name}_dropout': 0 for name in DROPOUT}})
  model = classifier.build_model(config)
  init_key, _ = classifier.seed_keys(config.seed)
  return config, classifier.init_params(model, init_key), _trained(config)


def test_each_learns_what_it_would_alone(together):
  config, begun, (_, _, state, metrics) = together
  alone = config.copy_and_resolve_references()
  alone.model.members = 1
  losses = []
  for member in range(2):
    _, _, want, sums = _trained(
        alone, jax.tree.map(lambda x, i=member: x[i], begun))
    losses.append(sums.loss)
    for got, x in zip(
        jax.tree.leaves((state.params, state.ema, state.opt_state)),
        jax.tree.leaves((want.params, want.ema, want.opt_state)), strict=True):
      np.testing.assert_allclose(got[member], x, atol=2e-5)
  np.testing.assert_allclose(metrics.loss, np.mean(losses), rtol=1e-5)
  assert abs(losses[0] - losses[1]) > 1e-4
  assert metrics.weight == 24


def test_what_they_predict_is_the_mean(together):
  config, _, (model, known, state, _) = together
  params = state.eval_params()
  def logits(model, params):
    return evaluate.make_logits(
        config, evaluate.make_forward(model), known.annotate)(
            devices.replicate(params), _reviews())
  single = model.clone(members=1)
  want = [logits(single, jax.tree.map(lambda x, i=i: x[i], params))
          for i in range(2)]
  np.testing.assert_allclose(
      logits(model, params), np.mean(want, axis=0), atol=1e-6)
  assert np.abs(want[0] - want[1]).max() > 1e-3


def test_their_masks_differ():
  model = classifier.build_model(_config(**{'model.members': 3}))
  keys = classifier.dropout_keys(model, 0, jnp.int32(5), jnp.arange(4))
  assert keys.shape == (3, 4)
  assert len({tuple(k) for k in np.asarray(
      jax.random.key_data(keys)).reshape(12, -1).tolist()}) == 12
