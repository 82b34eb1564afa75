"""A run directory: what it holds, and how it is opened again.

config.json  tokenizer.json  checkpoints/  metrics.jsonl
events.out.tfevents.*  summary.json  report/
"""

import dataclasses
import hashlib
import json
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
from tokenizers import Tokenizer

from flax_imdb import config as config_lib
from flax_imdb import files
from flax_imdb import keras_weights
from flax_imdb import model as model_lib
from flax_imdb import optimizer as optimizer_lib
from flax_imdb import parallel
from flax_imdb import remote
from flax_imdb import tokenizer as tokenizer_lib
from flax_imdb.batches import Reviews
from flax_imdb.checkpoint import Checkpoints
from flax_imdb.errors import UserError
from flax_imdb.seal import check_shapes
from flax_imdb.step import TrainState
from flax_imdb.step import init_state


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished or interrupted run, ready to evaluate.

  Attributes:
    config: what it was trained with.
    tokenizer: the one it was trained with.
    model: holds no arrays.
    params: the parameters to evaluate with, replicated.
    step: when they were saved.
  """
  config: ConfigDict
  tokenizer: Tokenizer
  model: model_lib.SentimentClassifier
  params: Any
  step: int


def check(workdir: str, config: ConfigDict) -> None:
  """Checks that a run with this config may begin or go on in a directory.

  Raises:
    UserError: it holds a run with another config, or can't be written.
  """
  path = files.path(workdir)
  try:
    path.mkdir(parents=True, exist_ok=True)
    (path / '.writable').touch()
    (path / '.writable').unlink()
    files.remove_leftovers(path, '*.json*')
  except Exception as e:
    why = getattr(e, 'strerror', None) or remote.failure(e)
    if not why:
      raise
    raise UserError(
        f'cannot write to {workdir} ({why}): choose another --workdir') from e
  if not is_run(workdir):
    return
  made_with = config_lib.read(path / 'config.json')
  changed = config_lib.differences(made_with, config)
  if changed:
    fields = ', '.join(f'{k}: {a} there, {b} now'
                       for k, (a, b) in changed.items())
    raise UserError(f'{workdir} was made with another config ({fields}): give '
                    'the same one to resume, or another --workdir')


def begin(workdir: str, config: ConfigDict, tokenizer: Tokenizer) -> None:
  """Makes a run directory; leaves one that was made as it is.

  Not before the data and what it begins with are there: a misspelt split must
  not leave a directory that then refuses the config in which it is corrected.

  Raises:
    UserError: as `initial_params` and `files.write`.
  """
  path = files.path(workdir)
  if not is_run(workdir):
    if config.init_from:
      initial_params(config, model_lib.build(config))
    tokenizer_lib.save(tokenizer, path / 'tokenizer.json')
    config_lib.save(config, path / 'config.json')


def restore(workdir: str, which: str | None) -> Run:
  """Opens a run directory to evaluate or to predict; changes nothing in it.

  Args:
    workdir: the run directory.
    which: 'best', 'latest' or a step's number; None for what the run itself
      evaluated.

  Raises:
    UserError: it is no run directory, or has no such step; says which it has.
  """
  path = files.path(workdir)
  if not is_run(workdir):
    raise UserError(
        f'{workdir} is no run directory, steps found: []: train one with '
        f'python -m flax_imdb.main --workdir={workdir}, or give another')
  config = config_lib.read(path / 'config.json')
  parallel.check(config.global_batch_size)
  model = model_lib.build(config)
  if which is None:
    which = 'best' if config.early_stopping.restore_best else 'latest'
  with Checkpoints(workdir, read_only=True) as checkpoints:
    steps = checkpoints.steps()
    if which == 'best':
      step = checkpoints.best()
    elif which == 'latest':
      step = checkpoints.latest()
    else:
      step = int(which) if which.isascii() and which.isdigit() else None
    if step not in steps:
      raise UserError(f'{workdir} has no {which} step, steps found: {steps}: '
                      + ('choose one with --step' if steps else 'train first'))
    params = checkpoints.restore_eval_params(step, template(config, model))
  tokenizer = tokenizer_lib.load(
      path / 'tokenizer.json', config.data.vocab_size)
  return Run(config, tokenizer, model, params, step)


def initial_params(
    config: ConfigDict, model: model_lib.SentimentClassifier) -> Any:
  """The parameters that training begins with: drawn, or config.init_from.

  Returns:
    A nested dict of NumPy arrays, float32.

  Raises:
    UserError: config.init_from can't be read, or is another model's.
  """
  drawn = init_state(config, model, optimizer_lib.build(config, 1)).params
  if not config.init_from:
    return jax.device_get(drawn)
  if is_run(config.init_from):
    params = parallel.to_host(restore(config.init_from, None).params)
  else:
    params = keras_weights.read(config.init_from)
  check_shapes(config.init_from, drawn, params)
  return params


def is_run(path: str) -> bool:
  """True for a run directory."""
  return (files.path(path) / 'config.json').exists()


def template(
    config: ConfigDict, model: model_lib.SentimentClassifier) -> TrainState:
  """The shapes of a train state; the schedule does not change them."""
  optimizer = optimizer_lib.build(config, steps_per_epoch=1)
  return jax.eval_shape(lambda: init_state(config, model, optimizer))


def parameter_count(params: Any) -> int:
  """The number of floats in a tree of arrays."""
  return sum(x.size for x in jax.tree.leaves(params))


def parameter_table(params: Any) -> str:
  """A line for each array, its shape and size, and their total."""
  rows = [(jax.tree_util.keystr(path, simple=True, separator='/'),
           ' x '.join(map(str, x.shape)), f'{x.size:,}')
          for path, x in jax.tree_util.tree_leaves_with_path(params)]
  rows.append(('parameters', '', f'{parameter_count(params):,}'))
  name, shape, size = (max(map(len, column)) for column in
                       zip(*rows, strict=True))
  return '\n'.join(f'{a:<{name}}  {b:<{shape}}  {c:>{size}}'
                   for a, b, c in rows)


def params_sha256(params: Any) -> str:
  """One string for a tree of arrays: equal if and only if all bytes are."""
  digest = hashlib.sha256()
  leaves = {jax.tree_util.keystr(path): x
            for path, x in jax.tree_util.tree_leaves_with_path(params)}
  for name in sorted(leaves):
    digest.update(np.ascontiguousarray(leaves[name]).tobytes())
  return digest.hexdigest()


def digest(tokenizer: Tokenizer, reviews: Reviews) -> str:
  """One string for all that training reads."""
  found = hashlib.sha256(tokenizer.to_str().encode())
  for array in (reviews.ids, reviews.offsets, reviews.labels):
    found.update(np.ascontiguousarray(array).data)
  return found.hexdigest()


def write_summary(workdir: str, summary: dict[str, Any]) -> None:
  """Writes summary.json; errors as `files.write`."""
  files.write(f'{workdir}/summary.json', json.dumps(summary, indent=2) + '\n')
