"""The train step: one batch of reviews, one update of the parameters."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax

from flax_imdb.cluster.devices import data_parallel
from flax_imdb.model import classifier
from flax_imdb.model.classifier import TABLE, Params
from flax_imdb.train import language_model
from flax_imdb.train.losses import loss_and_gradient
from flax_imdb.train.metrics import Metrics
from flax_imdb.train.optimizer import put_rows, take_rows


@struct.dataclass
class TrainState:
  """All that a step changes; a checkpoint of it is a whole run so far."""
  step: jax.Array  # int32 [] steps done
  params: Params  # float32
  opt_state: optax.OptState
  ema: Params  # of `classifier.averaged`, or {} if config.ema_decay is 0
  metrics: Metrics  # of the epoch so far

  def eval_params(self) -> Params:
    """The parameters to evaluate with: the average where there is one."""
    return self.params | self.ema

  def to_items(self) -> dict[str, dict[str, Any]]:
    """The items of a checkpoint, in which the metrics are called sums."""
    return {'model': {'params': self.params, 'ema': self.ema},
            'training': {'step': self.step, 'opt_state': self.opt_state,
                         'sums': dict(vars(self.metrics))}}

  @classmethod
  def from_items(cls, model: dict, training: dict) -> 'TrainState':
    """The state of which `to_items` made these."""
    training = dict(training)
    metrics = Metrics(**training.pop('sums'))
    return cls(**model, **training, metrics=metrics)


def init_state(config: ConfigDict, model: classifier.SentimentClassifier,
               optimizer: optax.GradientTransformation) -> TrainState:
  """The state before the first step; depends on config.seed alone."""
  def init() -> TrainState:
    init_key, _ = classifier.seed_keys(config.seed)
    return _first_state(
        config, model, optimizer, classifier.init_params(model, init_key))
  return jax.jit(init)()


def state_shapes(config: ConfigDict, model: classifier.SentimentClassifier,
                 optimizer: optax.GradientTransformation) -> TrainState:
  """`init_state` as `jax.ShapeDtypeStruct`s; the model is not traced again."""
  first_state = functools.partial(_first_state, config, model, optimizer)
  return jax.eval_shape(first_state, classifier.param_shapes(model))


def _first_state(config: ConfigDict, model: classifier.SentimentClassifier,
                 optimizer: optax.GradientTransformation,
                 params: Params) -> TrainState:
  return TrainState(
      step=jnp.zeros((), jnp.int32), params=params,
      opt_state=classifier.each_member(model, optimizer.init)(params),
      ema=classifier.averaged(params) if config.ema_decay else {},
      metrics=Metrics.zero())


def make_train_step(
    config: ConfigDict, model: classifier.SentimentClassifier,
    optimizer: optax.GradientTransformation, steps_per_epoch: int,
    devices: Sequence[jax.Device] | None = None,
    class_weights: np.ndarray | None = None,
) -> Callable[[TrainState, dict], tuple[TrainState, Metrics]]:
  """Makes step(state, batch) -> (state, metrics), compiled for all devices.

  The batch is one of `TrainBatches` after `devices.shard`; the metrics are
  those of the epoch so far, of the reviews with a label. Losses and gradients
  are summed over all devices and divided by the global weight, with a label or
  without, so that a short last batch and unequal shares count every review the
  same; or, with `class_weights` of `classes.weights`, what its class does: over
  all training reviews these add up to their number. A language model counts
  words where others count reviews. The members of a model learn side by side,
  and the metrics are their mean. `devices` as in `devices.data_parallel`.
  """
  each = functools.partial(classifier.each_member, model)

  def train_step(state: TrainState, batch: dict[str, jax.Array],
                 sum_over_devices: Callable) -> tuple[TrainState, Metrics]:
    keys = classifier.dropout_keys(
        model, config.seed, state.step, batch['places'])
    # From here on a table is those of its rows that the whole batch reads.
    rows, reader = batch.get('bigram_rows'), model
    if rows is not None:
      reader = model.clone(bigram_rows=len(rows))
    whole = state.params, state.opt_state
    old = each(lambda tree: take_rows(tree, rows, TABLE))(whole)
    params, opt_state = old

    if config.objective == 'language_model':
      loss, correct, counted, gradient = language_model.loss_and_gradient(
          config, reader, params, batch, keys, state.step)
      weight = counted
    else:
      loss, correct, counted, gradient = each(
          lambda params, keys: loss_and_gradient(
              config, reader, params, batch, keys, class_weights))(
                  params, keys)
      weight = batch['weights'].sum()
    loss, correct, counted, weight, gradient = sum_over_devices(
        (loss, correct, counted, weight, gradient))
    gradient = jax.tree.map(lambda g: g / weight, gradient)

    updates, opt_state = each(optimizer.update)(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    # Adam's correction (Kingma & Ba 2015, section 3) as a share of the newest:
    # of the initial weights, where the average begins, nothing is left.
    newest = (1 - config.ema_decay) / (1 - config.ema_decay**(state.step + 1))
    ema = optax.incremental_update(
        classifier.averaged(params), state.ema, newest) if state.ema else {}
    this_step = Metrics.of_step(state.step + 1, *(x.mean() for x in (
        loss, correct, counted, each(optax.tree.norm)(gradient))))
    if config.on_nan == 'skip':  # 7 % of a step of configs/words.py
      params, opt_state, ema = jax.tree.map(
          lambda new, old: jnp.where(this_step.skipped > 0, old, new),
          (params, opt_state, ema), (*old, state.ema))
    params, opt_state = each(lambda tree, taken: put_rows(
        tree, taken, rows, TABLE))(whole, (params, opt_state))
    epoch_begins = state.step % steps_per_epoch == 0
    metrics = state.metrics.unless(epoch_begins) + this_step
    return TrainState(state.step + 1, params, opt_state, ema, metrics), metrics

  return data_parallel(train_step, devices)
