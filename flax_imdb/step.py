"""The train step: one batch of reviews, one update of the parameters."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from flax_imdb import model as model_lib
from flax_imdb import parallel

Params = dict[str, Any]


@struct.dataclass
class TrainState:
  """All that a step changes; a checkpoint of it is a whole run so far.

  Attributes:
    step: int32 [] steps done.
    params: the model's parameters, float32.
    opt_state: optax' state.
    ema: running average of `params`, or {} if config.ema_decay is 0.
    sums: float32 [] each, over the epoch so far: loss, correct and weight of
      its reviews, and the gradient's norm added up over its steps; skipped,
      the steps whose loss or gradient was not finite, which are in no other
      sum and, with config.on_nan='skip', changed nothing else; of the first of
      them bad_step (1 is the run's first), bad_loss and bad_grad_norm.
  """
  step: jax.Array
  params: Params
  opt_state: optax.OptState
  ema: Params
  sums: dict[str, jax.Array]

  def eval_params(self) -> Params:
    """The parameters to evaluate with: the average where there is one."""
    return self.ema or self.params


def init_state(config: ConfigDict, model: model_lib.SentimentClassifier,
               optimizer: optax.GradientTransformation) -> TrainState:
  """The state before the first step; depends on config.seed alone."""
  def init() -> TrainState:
    init_key, _ = jax.random.split(jax.random.key(config.seed))
    params = model_lib.init(model, init_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params,
        opt_state=optimizer.init(params),
        ema=params if config.ema_decay else {},
        sums={k: jnp.zeros(()) for k in (
            'loss', 'correct', 'weight', 'grad_norm',
            'skipped', 'bad_step', 'bad_loss', 'bad_grad_norm')})
  return jax.jit(init)()


def make_train_step(
    config: ConfigDict, model: model_lib.SentimentClassifier,
    optimizer: optax.GradientTransformation, steps_per_epoch: int,
    devices: Sequence[jax.Device] | None = None,
) -> Callable[[TrainState, dict], tuple[TrainState, dict[str, jax.Array]]]:
  """Makes step(state, batch) -> (state, sums), compiled for all devices.

  The batch is one of `batches.pad` after `parallel.shard`. Losses and gradients
  are summed over all devices and divided by the global weight, so that a short
  last batch and unequal shares count every review the same. `devices` as in
  `parallel.data_parallel`.

  Several processes add 'asked' to their rows, float32 [B], not 0 where a signal
  asks to stop; 'asked' of the sums is then this step's total, the same in all.
  """
  def train_step(state: TrainState, batch: dict[str, jax.Array]):
    _, dropout_key = jax.random.split(jax.random.key(config.seed))
    keys = parallel.row_keys(
        jax.random.fold_in(dropout_key, state.step), len(batch['labels']))
    targets = optax.smooth_labels(
        jnp.stack([1 - batch['labels'], batch['labels']], axis=-1),
        config.label_smoothing)[:, 1]

    def summed_loss(params):
      logits: jax.Array = model.apply(  # type: ignore[assignment]
          {'params': params}, batch['ids'], batch['lengths'], keys)
      losses = optax.sigmoid_binary_cross_entropy(logits, targets)
      correct = (logits > 0) == (batch['labels'] > 0)
      return jnp.vdot(losses, batch['weights']), jnp.vdot(
          correct, batch['weights'])

    (loss, correct), gradient = jax.value_and_grad(
        summed_loss, has_aux=True)(state.params)
    asked = {k: batch[k].sum() for k in ('asked',) if k in batch}
    loss, correct, weight, gradient, asked = parallel.sum_over_devices(
        (loss, correct, batch['weights'].sum(), gradient, asked))
    gradient = jax.tree.map(lambda g: g / weight, gradient)

    updates, opt_state = optimizer.update(
        gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(
        params, state.ema, 1 - config.ema_decay) if state.ema else {}
    grad_norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if config.on_nan == 'skip':  # 7 % of a step of configs/default.py
      params, opt_state, ema = jax.tree.map(
          lambda new, old: jnp.where(finite, new, old),
          (params, opt_state, ema),
          (state.params, state.opt_state, state.ema))

    first = state.step % steps_per_epoch == 0
    sums = {k: jnp.where(first, 0, v) for k, v in state.sums.items()}
    first_bad = ~finite & (sums['skipped'] == 0)
    for k, v in {'loss': loss, 'correct': correct, 'weight': weight,
                 'grad_norm': grad_norm}.items():
      sums[k] += jnp.where(finite, v, 0)
    for k, v in {'bad_step': state.step + 1, 'bad_loss': loss / weight,
                 'bad_grad_norm': grad_norm}.items():
      sums[k] = jnp.where(first_bad, v, sums[k])
    sums['skipped'] += ~finite
    return (TrainState(state.step + 1, params, opt_state, ema, sums),
            sums | asked)

  return parallel.data_parallel(train_step, devices)
