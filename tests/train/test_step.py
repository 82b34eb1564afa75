"""The train step: golden numbers, exact sums, devices, no second compile."""

import dataclasses
import functools
import json

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from flax_imdb.cluster import devices
from flax_imdb.config import load_config, override
from flax_imdb.data import classes
from flax_imdb.data.batches import TrainBatches, pad
from flax_imdb.data.reading import Reading, Share
from flax_imdb.data.reviews import Reviews
from flax_imdb.fields import check_fields
from flax_imdb.model import classifier
from flax_imdb.model.classifier import params_sha256
from flax_imdb.train.losses import loss_and_gradient
from flax_imdb.train.optimizer import build_optimizer
from flax_imdb.train.step import init_state, make_train_step

# Wherever they do not matter, for two programs serve several tests then: steps
# an epoch, and a config.
EPOCH = 3
AVERAGED = {'ema_decay': 0.75, 'schedule': 'constant', 'warmup_epochs': 0,
            'on_nan': 'skip'}


def _config(**fields):
  config = load_config('configs/debug.py')
  config.data.bucket_width = 0  # one program for all steps
  config.model.update(
      word_dropout=0.1, embedding_dropout=0.0, pooled_dropout=0.3)
  for field, value in fields.items():
    override(config, field, str(value))
  return config


def _reviews(n=40):
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 12, n)
  return Reviews(
      rng.integers(4, 100, lengths.sum()).astype(np.uint16),
      np.concatenate([[0], np.cumsum(lengths)]),
      rng.integers(0, 2, n).astype(np.int8))


@functools.cache
def _program(config_json, steps_per_epoch):
  """(the state before the first step, the step) of a config."""
  config = ConfigDict(json.loads(config_json))
  model = classifier.build_model(config)
  optimizer = build_optimizer(config, steps_per_epoch)
  return (devices.to_host(init_state(config, model, optimizer)),
          make_train_step(config, model, optimizer, steps_per_epoch))


def _train(config, steps, reviews=None, steps_per_epoch=None, trajectory=None):
  """Runs `steps` steps; returns the last state and each step's sums.

  A list `trajectory` gets the state after each of them.
  """
  reviews = reviews or _reviews()
  batches = TrainBatches(
      reviews, config.seed, config.global_batch_size, Reading.of(config.data))
  steps_per_epoch = steps_per_epoch or batches.steps_per_epoch
  state, train_step = _program(
      config.to_json(sort_keys=True), steps_per_epoch)
  state = devices.replicate(state)
  all_sums = []
  for step in range(steps):
    state, sums = train_step(state, devices.shard(batches(step)))
    all_sums.append(sums)  # nothing waits: the queue is as long as can be
    if trajectory is not None:
      trajectory.append(devices.to_host(state))
  return devices.to_host(state), [devices.to_host(s) for s in all_sums]


def test_golden_numbers_of_one_step():
  # If you did not mean to change what the model computes, this is a bug.
  state, (sums,) = _train(
      _config(**{'warmup_epochs': 0, 'data.bucket_width': 5}), 1)
  got = [float(getattr(sums, k))
         for k in ('loss', 'correct', 'weight', 'grad_norm')]
  np.testing.assert_allclose(got, GOLDEN_SUMS, rtol=1e-5)
  norms = {jax.tree_util.keystr(path, simple=True, separator='/'):
           float(np.linalg.norm(x)) for path, x in
           jax.tree_util.tree_leaves_with_path(state.params)}
  assert norms == pytest.approx(GOLDEN_NORMS, rel=1e-5)


GOLDEN_SUMS = [5.5274982, 5.0, 8.0, 0.18958974]
GOLDEN_NORMS = {
    'embed/embedding': 2.7918849,
    'forward_0/steps/cell/bias': 2.0050769,
    'forward_0/steps/cell/kernel': 2.407084,
    'forward_0/steps/cell/recurrent_kernel': 1.9954293,
    'hidden/bias': 0.0099998927,
    'hidden/kernel': 2.2766004,
    'logit/bias': 0.0049998448,
    'logit/kernel': 1.4497378,
}


def test_two_devices_equal_one_whole_batch():
  """The gradient of the mean loss over the global batch, taken plainly."""
  config = _config(**{'optimizer': 'sgd', 'schedule': 'constant',
                      'warmup_epochs': 0, 'clip_norm': 0, 'learning_rate': 1,
                      'model.word_dropout': 0, 'model.pooled_dropout': 0})
  reviews = _reviews(13)  # the last batch holds 5 of 8: unequal shares
  model = classifier.build_model(config)
  optimizer = build_optimizer(config, 2)
  before = devices.to_host(init_state(config, model, optimizer))
  batch = pad(reviews, np.arange(5), 8, Reading(12))

  def mean_loss(params):
    logits = model.apply(
        {'params': params}, batch['ids'][:5], batch['lengths'][:5])
    z = logits * (2 * batch['labels'][:5] - 1)
    return jax.nn.softplus(-z).mean()
  loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(before.params)

  state = devices.replicate(before)
  train_step = make_train_step(config, model, optimizer, 2)
  state, sums = train_step(state, devices.shard(batch))
  sums = devices.to_host(sums)
  assert sums.weight == 5
  # Each review is right with its label or with the other one; none else is.
  flipped = batch | {'labels': 1 - batch['labels']}
  again = devices.replicate(before)
  _, others = train_step(again, devices.shard(flipped))
  assert sums.correct + devices.to_host(others).correct == 5
  np.testing.assert_allclose(sums.loss / 5, loss, rtol=1e-5)
  jax.tree.map(
      lambda a, g, b: np.testing.assert_allclose(a - g, b, atol=1e-6),
      before.params, gradient, devices.to_host(state.params))
  # Every device must hold the same parameters, or they drift apart unseen.
  for x in jax.tree.leaves(state.params):
    copies = [np.asarray(shard.data) for shard in x.addressable_shards]
    assert len(copies) == 2
    np.testing.assert_array_equal(*copies)


def test_two_devices_equal_one_in_every_term_of_the_loss():
  """With segments, dropout, and reviews that have no label."""
  config = load_config('configs/default.py')
  for field, value in {
      'optimizer': 'sgd', 'schedule': 'constant', 'warmup_epochs': 0,
      'clip_norm': 0, 'learning_rate': 1, 'adversarial_norm': 0.3,
      'virtual_adversarial_norm': 0.5, 'entropy_weight': 0.5,
      'global_batch_size': 8, 'model.inputs': 'words',
      'data.vocab_size': 100, 'data.max_length': 12, 'data.segment_length': 5,
      'data.train_segments': 0,
      'model.embedding_dim': 4, 'model.width': 4}.items():
    override(config, field, str(value))
  check_fields(config)
  model = classifier.build_model(config)
  optimizer = build_optimizer(config, 2)
  before = devices.to_host(init_state(config, model, optimizer))
  before.params['embed']['embedding'] *= 20  # as of trained ones

  def batch(shares):
    batch = TrainBatches(
        _reviews(7), 0, 8, Reading.of(config.data),
        Share(shares, slice(0, shares)))(0)
    return batch | {'labels': np.where(
        batch['places'] < 3, -1, batch['labels']).astype(np.float32)}
  whole = batch(1)
  loss, correct, labelled, gradient = jax.jit(
      lambda params, batch: loss_and_gradient(
          config, model, params, batch, classifier.dropout_keys(
              model, 0, 0, batch['places'])))(before.params, whole)
  assert (whole['ids'] != batch(2)['ids']).any() and labelled == 4

  state, sums = make_train_step(config, model, optimizer, 2)(
      devices.replicate(before), devices.shard(batch(2)))
  sums = devices.to_host(sums)
  assert (sums.weight, sums.correct) == (labelled, correct)
  np.testing.assert_allclose(sums.loss, loss, rtol=1e-5)
  # The gradient is that of the mean over all seven.
  assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(gradient))
  jax.tree.map(
      lambda a, g, b: np.testing.assert_allclose(a - b, g / 7, atol=1e-5),
      before.params, gradient, devices.to_host(state.params))


def test_two_devices_equal_one_with_class_weights_of_four_classes():
  """What is minimised is the sum of weighted losses over the reviews' number.

  So over an epoch each class counts as much, whatever shares a batch.
  """
  config = _config(**{'optimizer': 'sgd', 'schedule': 'constant',
                      'warmup_epochs': 0, 'clip_norm': 0, 'learning_rate': 1,
                      'model.word_dropout': 0, 'model.pooled_dropout': 0})
  labels = np.array([0, 0, 0, 2, 3, 0, 1, 1, 0, 0, 2, 0, 0], np.int16)
  reviews = dataclasses.replace(_reviews(13), labels=labels)
  weights = classes.weights('balanced', labels, 4)
  model = classifier.build_model(config, 4)
  optimizer = build_optimizer(config, 2)
  before = devices.to_host(init_state(config, model, optimizer))
  before.params['embed']['embedding'] *= 20
  batch = pad(reviews, np.arange(5), 8, Reading(12))

  def losses(params):
    z = model.apply({'params': params}, batch['ids'][:5], batch['lengths'][:5])
    found = jax.nn.logsumexp(z, axis=1) - z[np.arange(5), labels[:5]]
    return (found * weights[labels[:5]]).mean(), found
  (_, found), gradient = jax.jit(jax.value_and_grad(losses, has_aux=True))(
      before.params)
  step = make_train_step(config, model, optimizer, 2, class_weights=weights)
  state, sums = step(devices.replicate(before), devices.shard(batch))
  sums = devices.to_host(sums)
  assert sums.weight == 5  # and what is shown is of reviews, each counted once
  np.testing.assert_allclose(sums.loss, found.sum(), rtol=1e-5)
  assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(gradient))
  jax.tree.map(
      lambda a, g, b: np.testing.assert_allclose(a - g, b, atol=1e-5),
      before.params, gradient, devices.to_host(state.params))


def test_sums_start_anew_with_each_epoch():
  _, sums = _train(_config(), 4, steps_per_epoch=EPOCH)
  weights = [float(s.weight) for s in sums]
  assert weights == [8, 16, 24, 8]


def test_the_step_compiles_once_a_width_and_donates_its_state():
  compiled = []
  def listen(name, duration, **kwargs):
    del duration, kwargs
    if name == '/jax/core/compile/backend_compile_duration':
      compiled.append(name)
  config = _config()
  batches = TrainBatches(_reviews(), 0, 8, Reading(10))
  model = classifier.build_model(config)
  optimizer = build_optimizer(config, EPOCH)
  train_step = make_train_step(config, model, optimizer, EPOCH)
  first = devices.replicate(init_state(config, model, optimizer))
  state, sums = train_step(first, devices.shard(batches(0)))
  sums.loss.block_until_ready()
  assert all(x.is_deleted() for x in jax.tree.leaves(first))
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for step in range(1, 4):
      state, sums = train_step(state, devices.shard(batches(step)))
    sums.loss.block_until_ready()
    # So does a state that was restored.
    train_step(devices.replicate(devices.to_host(state)),
               devices.shard(batches(4)))
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert compiled == []


def test_what_to_host_returns_keeps_no_buffer_from_being_donated():
  tree = devices.replicate({'x': np.arange(3.0)})
  host = devices.to_host(tree)['x']
  assert host.flags.owndata
  np.testing.assert_array_equal(host, [0, 1, 2])


def test_evaluation_weights_are_the_running_average():
  """Of the steps alone, as in Adam: the initial weights have no share in it."""
  config = _config(**AVERAGED)
  trajectory = []
  _train(config, 3, trajectory=trajectory)
  shares = 0.75 ** np.arange(3)[::-1]
  want = jax.tree.map(
      lambda *weights: np.average(weights, axis=0, weights=shares),
      *(state.params for state in trajectory))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
               want, trajectory[-1].eval_params())


def test_weights_depend_on_the_seed_and_dropout_on_the_step_too():
  """At a learning rate of 0, so that dropout alone changes the loss."""
  config = _config(**{'learning_rate': 0, 'optimizer': 'sgd',
                      'model.cell': 'simple_rnn', 'model.word_dropout': 0})
  batch = pad(_reviews(), np.arange(8), 8, Reading(10))
  model = classifier.build_model(config)
  optimizer = build_optimizer(config, 1)
  losses, drawn = [], []
  for seed in (0, 1):
    config.seed = seed
    state = init_state(config, model, optimizer)
    drawn.append(devices.to_host(devices.replicate(state.params)))
    state = devices.replicate(state.replace(params=drawn[0]))
    train_step = make_train_step(config, model, optimizer, 1)
    for _ in range(3):
      state, sums = train_step(state, devices.shard(batch))
      losses.append(float(devices.to_host(sums).loss))
  assert len(set(losses)) == 6
  assert params_sha256(drawn[0]) != params_sha256(drawn[1])


def test_label_smoothing_pulls_the_loss_towards_both_labels():
  """By half of it: the loss with either label is mixed, 1 - s/2 to s/2."""
  def loss(smoothing, flip=False):
    reviews = _reviews()
    reviews.labels[:] ^= flip
    config = _config(label_smoothing=smoothing)
    return _train(config, 1, reviews, EPOCH)[1][0].loss
  right, wrong, smooth = loss(0.0), loss(0.0, flip=True), loss(0.5)
  assert abs(right - wrong) > 1e-3
  np.testing.assert_allclose(
      smooth, 0.75 * right + 0.25 * wrong, rtol=1e-6)


@pytest.mark.parametrize('name', [
    'notebook', pytest.param('words', marks=pytest.mark.slow),
    pytest.param('quickstart', marks=pytest.mark.slow),
    pytest.param('debug', marks=pytest.mark.slow)])
def test_every_config_trains_one_step(name):
  config = load_config(f'configs/{name}.py')
  check_fields(config)
  state, (sums,) = _train(config, 1, _reviews(150))
  assert state.step == 1
  assert np.isfinite(sums.loss) and sums.grad_norm > 0
  before = init_state(
      config, classifier.build_model(config), build_optimizer(config, 2))
  if not config.warmup_epochs:  # else the first step's rate is 0
    assert params_sha256(devices.to_host(
        devices.replicate(before.params))) != params_sha256(state.params)


@pytest.mark.parametrize('poison', [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_its_count(
    monkeypatch, poison):
  config = _config(**AVERAGED)
  trajectory = []
  batch_of = TrainBatches.__call__
  def poisoned(batches, step):
    batch = batch_of(batches, step)
    if step == 2:  # the third
      batch['labels'] = np.full_like(batch['labels'], poison)
    return batch
  monkeypatch.setattr(TrainBatches, '__call__', poisoned)
  state, sums = _train(config, 3, trajectory=trajectory)
  good = trajectory[1]
  assert (good.step, state.step) == (2, 3)
  for name in ('params', 'opt_state', 'ema'):
    jax.tree.map(np.testing.assert_array_equal,
                 getattr(state, name), getattr(good, name))
  last = {k: float(v) for k, v in vars(sums[-1]).items()}
  assert (last['skipped'], last['bad_step']) == (1, 3)
  assert not np.isfinite(last['bad_loss'] + last['bad_grad_norm'])
  for k in ('loss', 'correct', 'weight', 'grad_norm'):
    assert last[k] == getattr(sums[1], k)
