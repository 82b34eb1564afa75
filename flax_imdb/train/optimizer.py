"""The optimizer that a config describes, and its sparse form."""

from typing import Any

import jax
from ml_collections import ConfigDict
import optax

from flax_imdb.model.classifier import TABLE

# Each scales a gradient; weight decay and the learning rate are common to all.
_SCALE_BY = {
    # Keras' RMSprop: v starts at 0 and epsilon stands inside the root.
    'rmsprop': lambda config: optax.scale_by_rms(
        decay=0.9, eps=1e-7, eps_in_sqrt=True, initial_scale=0.0),
    'adam': lambda config: optax.scale_by_adam(
        b1=0.9, b2=0.999, eps=config.adam_epsilon),
    'sgd': lambda config: optax.identity(),
}
_SCALE_BY['adamw'] = _SCALE_BY['adam']  # decay is decoupled for every name


def learning_rate_schedule(
    config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
  """Learning rate by step, int32 [] -> float32 []."""
  warmup = round(config.warmup_epochs * steps_per_epoch)
  steps = config.num_epochs * steps_per_epoch
  peak = config.learning_rate
  after = optax.constant_schedule(peak)
  if config.schedule == 'cosine' and steps > warmup:
    after = optax.cosine_decay_schedule(peak, steps - warmup)
  rise = optax.linear_schedule(0.0, peak, warmup)
  return optax.join_schedules([rise, after], [warmup]) if warmup else after


def build_optimizer(
    config: ConfigDict, steps_per_epoch: int) -> optax.GradientTransformation:
  """Clipping, then the named optimizer, then decoupled weight decay.

  Source of the decay: Loshchilov & Hutter 2019; it applies to matrices, not to
  biases and not to embeddings, whose rare rows would only shrink.
  """
  def decayed(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.ndim == 2 and path[0].key not in ('embed', TABLE),
        params)

  steps = [_SCALE_BY[config.optimizer](config)]
  if config.clip_norm:
    steps.insert(0, optax.clip_by_global_norm(config.clip_norm))
  if config.weight_decay:
    steps.append(optax.add_decayed_weights(config.weight_decay, decayed))
  return optax.chain(*steps, optax.scale_by_learning_rate(
      learning_rate_schedule(config, steps_per_epoch)))


def take_rows(tree: Any, rows: jax.Array | None, name: str) -> Any:
  """A tree in which arrays under `name` have but those rows; None takes all.

  An optimizer of optax that looks at each row alone can then update these, as
  it would with all, in a time that does not depend on how many rows there are.
  What it keeps of a row, such as Adam's moments, stands still where a batch
  does not read it, while of all rows they would fade (LazyAdam of TensorFlow).
  `rows` are int32 [R], ascending; those that an array does not have become 0.
  """
  if rows is None:
    return tree
  return _map_under(name, lambda x: x.at[rows].get(
      mode='fill', fill_value=0, unique_indices=True,
      indices_are_sorted=True), tree)


def put_rows(tree: Any, taken: Any, rows: jax.Array | None, name: str) -> Any:
  """`taken` where its arrays are whole, and `tree` with the rows taken."""
  if rows is None:
    return taken
  return _map_under(name, lambda new, x: x.at[rows].set(
      new, mode='drop', unique_indices=True, indices_are_sorted=True),
                    taken, tree)


def _map_under(name: str, function: Any, tree: Any, *others: Any) -> Any:
  """The first tree, but for its arrays under `name`."""
  def mapped(path, x, *leaves):
    under = any(getattr(key, 'key', None) == name for key in path)
    return function(x, *leaves) if under else x
  return jax.tree_util.tree_map_with_path(mapped, tree, *others)
