"""The same training as Keras: the same weights, batches, losses and logits.

  pip install -e '.[bench]'
  TFDS_DATA_DIR=... python benchmarks/keras_parity.py

trains the notebook's model for 200 steps of RMSprop on real IMDB, here and in
Keras 3 on its JAX backend, without and with mask_zero, prints both losses and
their largest relative difference, and exits with 1 if that exceeds 1e-4 or a
final logit differs by more than 1e-3.

With mask_zero, training is chaotic once it learns: scaling our own initial
weights by 1 + 1e-7 changes the loss by 10 % after 80 steps, and so two correct
programs part. There each step begins with Keras' weights and optimizer state,
so that every one of the 200 steps is compared and none inherits a difference;
the column "alone" shows our losses without that, and "nudged" those from the
scaled weights.

  python benchmarks/keras_parity.py --golden

writes tests/model/keras_golden.npz instead: 40 steps of a small model in Keras,
for the test suite, which has no Keras.
"""

import os
import pathlib
import sys

from flax_imdb import environment
from flax_imdb.config import load_config

CONFIG = load_config('configs/notebook.py')
environment.configure(CONFIG.global_batch_size)
os.environ['KERAS_BACKEND'] = 'jax'

import keras  # noqa: E402, it and jax read the environment when they start
import numpy as np  # noqa: E402

from flax_imdb.cluster import devices  # noqa: E402
from flax_imdb.data.batches import TrainBatches  # noqa: E402
from flax_imdb.data.reading import Reading  # noqa: E402
from flax_imdb.data.reviews import load_splits, training_tokenizer  # noqa: E402
from flax_imdb.model import classifier, keras_weights  # noqa: E402
from flax_imdb.train.optimizer import build_optimizer  # noqa: E402
from flax_imdb.train.step import init_state, make_train_step  # noqa: E402

STEPS = 200
LOSS_TOLERANCE = 1e-4  # relative, each step
LOGIT_TOLERANCE = 1e-3  # absolute, after the last step
GOLDEN = pathlib.Path(__file__).parents[1] / 'tests/model/keras_golden.npz'


def keras_model(config, mask: bool) -> keras.Model:
  """The notebook's model, compiled as the notebook does."""
  m = config.model
  recurrent = {'lstm': keras.layers.LSTM, 'simple_rnn': keras.layers.SimpleRNN}
  model = keras.Sequential([
      keras.Input((config.data.max_length,), dtype='int32'),
      keras.layers.Embedding(
          config.data.vocab_size, m.embedding_dim, mask_zero=mask),
      recurrent[m.cell](m.width),
      keras.layers.Dense(m.hidden_dim, activation='relu'),
      keras.layers.Dense(1, activation='sigmoid')])
  model.compile(keras.optimizers.RMSprop(config.learning_rate),
                keras.losses.BinaryCrossentropy())
  return model


def train_keras(model: keras.Model, batches: list) -> tuple[list, list]:
  """(the loss of each step, the (weights, mean squares) that it began with)."""
  losses, starts = [], []
  for batch in batches:
    # Keras makes the optimizer's variables in the first step: they begin at 0.
    mean_squares = [
        keras.ops.convert_to_numpy(v) for v in model.optimizer.variables[2:]]
    weights = model.get_weights()
    starts.append((weights, mean_squares or [0 * w for w in weights]))
    rows = batch['weights'] > 0
    model.reset_metrics()  # or train_on_batch returns a running mean
    losses.append(float(model.train_on_batch(
        batch['ids'][rows], batch['labels'][rows, None])))
  return losses, starts


def train_ours(config, state, batches: list, starts: list | None = None):
  """(final state, the loss of each step).

  Args:
    config: of the notebook's architecture.
    state: replicated.
    batches: of `batches.pad`.
    starts: (weights, mean squares) in Keras' order to begin each step with.
  """
  model = classifier.build_model(config)
  optimizer = build_optimizer(config, 1)
  train_step = make_train_step(config, model, optimizer, 1)
  losses = []
  for i, batch in enumerate(batches):
    if starts:
      params, mean_squares = map(keras_weights.from_keras, starts[i])
      rms, *others = state.opt_state
      state = devices.replicate(devices.to_host(state).replace(
          params=params, opt_state=(rms._replace(nu=mean_squares), *others)))
    state, sums = train_step(state, devices.shard(batch))
    sums = devices.to_host(sums)  # one step an epoch: this step's alone
    losses.append(float(sums.loss / sums.weight))
  return state, losses


def compare(mask: bool, batches: list) -> bool:
  """Trains both, prints the two columns; True within the tolerances."""
  config = CONFIG.copy_and_resolve_references()
  config.model.mask_padding = mask
  model = classifier.build_model(config)
  state = devices.replicate(
      init_state(config, model, build_optimizer(config, 1)))
  theirs = keras_model(config, mask)
  theirs.set_weights(
      keras_weights.to_keras(devices.to_host(state.params)))
  nudged = devices.replicate(devices.to_host(state).replace(
      params=keras_weights.from_keras(
          [w * np.float32(1 + 1e-7) for w in theirs.get_weights()])))
  keras_losses, starts = train_keras(theirs, batches)
  alone_state, alone = train_ours(config, state, batches)
  _, moved = train_ours(config, nudged, batches)
  state, losses = (
      train_ours(config, alone_state, batches, starts) if mask
      else (alone_state, alone))

  print(f'\nmask_zero={mask}\nstep  flax_imdb  Keras {keras.__version__}  '
        'alone     nudged')
  for step in range(0, len(losses), 20):
    print(f'{step:4}  {losses[step]:.6f}   {keras_losses[step]:.6f}      '
          f'{alone[step]:.6f}  {moved[step]:.6f}')
  relative = np.max(np.abs(np.subtract(losses, keras_losses)) / keras_losses)
  p = theirs.predict(batches[0]['ids'], verbose=0)[:, 0].astype(np.float64)
  ours = model.apply({'params': devices.to_host(state.params)},
                     batches[0]['ids'], batches[0]['lengths'])
  absolute = np.max(np.abs(np.asarray(ours) - np.log(p / (1 - p))))
  print(f'largest relative difference of a loss: {relative:.1e} '
        f'(tolerance {LOSS_TOLERANCE:.0e}); of a final logit: {absolute:.1e} '
        f'(tolerance {LOGIT_TOLERANCE:.0e})')
  return relative <= LOSS_TOLERANCE and absolute <= LOGIT_TOLERANCE


def write_golden() -> None:
  """Writes what a small Keras model does on random batches."""
  config = CONFIG.copy_and_resolve_references()
  config.data.update(vocab_size=40, max_length=12)
  config.model.update(embedding_dim=4, width=5, hidden_dim=3)
  rng = np.random.default_rng(0)
  arrays = {}
  lengths = rng.integers(1, 13, (40, 8))
  ids = rng.integers(1, 40, (40, 8, 12)) * (
      np.arange(12) < lengths[..., None])
  arrays |= {'ids': ids.astype(np.int8), 'lengths': lengths.astype(np.int8),
             'labels': rng.integers(0, 2, (40, 8)).astype(np.int8)}
  batches = [{'ids': i.astype(np.int32), 'labels': y.astype(np.float32),
              'weights': np.ones(8), 'places': np.arange(8, dtype=np.int32)}
             for i, y in zip(arrays['ids'], arrays['labels'], strict=True)]
  for cell in ('lstm', 'simple_rnn'):
    for mask in (False, True):
      config.model.cell = cell
      keras.utils.set_random_seed(0)
      model = keras_model(config, mask)
      name = f'{cell}_{"masked" if mask else "plain"}'
      for i, weight in enumerate(model.get_weights()):
        arrays[f'{name}_before_{i}'] = weight
      arrays[f'{name}_losses'] = np.array(train_keras(model, batches)[0])
      for i, weight in enumerate(model.get_weights()):
        arrays[f'{name}_after_{i}'] = weight
  np.savez_compressed(GOLDEN, **arrays)
  print(f'wrote {GOLDEN.name} with Keras {keras.__version__}')


def main() -> int:
  """Returns the exit status."""
  if sys.argv[1:] == ['--golden']:
    write_golden()
    return 0
  tokenizer = training_tokenizer(CONFIG, print)
  reviews = load_splits(CONFIG, tokenizer, print, ['train'])['train']
  train_batches = TrainBatches(
      reviews, CONFIG.seed, CONFIG.global_batch_size,
      Reading(CONFIG.data.max_length))
  batches = [train_batches(step) for step in range(STEPS)]
  results = [compare(mask, batches) for mask in (False, True)]
  return 0 if all(results) else 1


if __name__ == '__main__':
  sys.exit(main())
