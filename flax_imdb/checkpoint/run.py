"""A run directory: what it holds, and how it is opened again.

config.json  tokenizer.json  checkpoints/  damaged/  metrics.jsonl
events.out.tfevents.*  summary.json  export/  report/
"""

import dataclasses
import json
from typing import Any

import jax
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from flax_imdb.checkpoint.manager import Checkpoints
from flax_imdb.checkpoint.seal import check_shapes
from flax_imdb.cluster import devices, processes
from flax_imdb.config import differences, read_config, write_config
from flax_imdb.data.tokenizer import load_tokenizer, save_tokenizer
from flax_imdb.errors import UserError
from flax_imdb.model import classifier, keras_weights
from flax_imdb.model.classifier import Params
from flax_imdb.storage import bucket, files


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished or interrupted run with what it was trained with."""
  config: ConfigDict
  tokenizer: Tokenizer
  model: classifier.SentimentClassifier
  params: Params  # to evaluate with, replicated
  step: int  # after which they were so


def check_directory(workdir: str, config: ConfigDict) -> None:
  """Checks that a run with this config may begin or go on in a directory.

  Raises UserError if there is another's, or it can't be written or shared.
  """
  if processes.index() == 0:
    _check_writable(workdir)
    if is_run(workdir):
      made_with = read_config(files.as_path(workdir) / 'config.json')
      fields = ', '.join(f'{k}: {a} there, {b} now' for k, (a, b) in
                         differences(made_with, config).items()
                         if k not in _may_change(config))
      if fields:
        raise UserError(f'{workdir} was made with another config ({fields}): '
                        'give the same one to resume, or another --workdir')
  processes.check_shared(workdir)


def _may_change(config: ConfigDict) -> set[str]:
  """The fields that may differ when a run resumes: all but its identity.

  They say how long it goes on and what it shows. Any other would make it a run
  whose first steps were another's: of other data, another model or other steps.
  """
  fields = {'debug', 'show_examples', 'early_stopping.patience', 'num_epochs'}
  if config.schedule == 'cosine':  # which falls until the last epoch
    fields.remove('num_epochs')
  return fields


def evaluates_best(config: ConfigDict) -> bool:
  """Whether a run evaluates its best weights at its end, or else its last."""
  return bool(config.early_stopping.restore_best
              and config.data.validation_fraction)


def _check_writable(workdir: str) -> None:
  path = files.as_path(workdir)
  try:
    path.mkdir(parents=True, exist_ok=True)
    (path / '.writable').touch()
    (path / '.writable').unlink()
    files.remove_leftovers(path, '*.json*')
  except Exception as e:
    why = getattr(e, 'strerror', None) or bucket.failure(e)
    if not why:
      raise
    raise UserError(
        f'cannot write to {workdir} ({why}): choose another --workdir') from e


def begin_directory(workdir: str, config: ConfigDict,
                    tokenizer: Tokenizer) -> None:
  """Makes a run directory, or notes what `check_directory` lets change in one.

  Not before the data and what it begins with are there: a misspelt split must
  not leave a directory that then refuses the config in which it is corrected.
  The first process writes. Raises as `initial_params` and `files.write`.
  """
  path = files.as_path(workdir)
  if processes.index() > 0:
    return
  if is_run(workdir):
    made_with = read_config(path / 'config.json')
    config = config.copy_and_resolve_references()
    config.debug = made_with.debug  # to look at a run once is not to change it
    if differences(made_with, config):
      write_config(config, path / 'config.json')
    return
  if config.init_from:
    initial_params(config, classifier.build_model(config))
  save_tokenizer(tokenizer, path / 'tokenizer.json')
  write_config(config, path / 'config.json')


def restore(workdir: str, which: str | None) -> Run:
  """Opens a run directory to evaluate or to predict; changes nothing in it.

  `which` is 'best', 'latest' or a step's number; None for what the run itself
  evaluated. Raises UserError if there is no run, or no such step.
  """
  if not is_run(workdir):
    raise UserError(
        f'{workdir} is no run directory, steps found: []: train one with '
        f'python -m flax_imdb.main --workdir={workdir}, or give another')
  path = files.as_path(workdir)
  config = read_config(path / 'config.json')
  try:
    model = classifier.build_model(config)
  except UserError as e:
    raise UserError(f'{path}/config.json: {e}') from e
  if which is None:
    which = 'best' if evaluates_best(config) else 'latest'
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
    params = restore_eval_params(checkpoints, step, config, model)
  tokenizer = load_tokenizer(path / 'tokenizer.json', config.data.vocab_size)
  return Run(config, tokenizer, model, params, step)


def restore_eval_params(
    checkpoints: Checkpoints, step: int, config: ConfigDict,
    model: classifier.SentimentClassifier) -> Params:
  """The parameters of a step to evaluate with: averaged ones if there are.

  Float32, replicated. Raises UserError as `Checkpoints.restore`.
  """
  shapes = classifier.param_shapes(model)
  items, _ = checkpoints.restore(step, {'model': {
      'params': shapes, 'ema': shapes if config.ema_decay else {}}})
  return items['model']['ema'] or items['model']['params']


def initial_params(
    config: ConfigDict, model: classifier.SentimentClassifier) -> Params:
  """The parameters that training begins with: drawn, or config.init_from.

  NumPy arrays, float32. Raises UserError if that can't be read or is another's.
  """
  if not config.init_from:
    init_key, _ = classifier.seed_keys(config.seed)
    return jax.device_get(
        jax.jit(lambda: classifier.init_params(model, init_key))())
  if is_run(config.init_from):
    params = devices.to_host(restore(config.init_from, None).params)
  else:
    params = keras_weights.read_weights(config.init_from)
  check_shapes(config.init_from, classifier.param_shapes(model), params)
  return params


def is_run(path: str) -> bool:
  """Whether this is a run directory."""
  return (files.as_path(path) / 'config.json').exists()


def write_summary(workdir: str, summary: dict[str, Any]) -> None:
  """Writes summary.json from the first process; errors as `files.write`."""
  if processes.index() == 0:
    files.write(f'{workdir}/summary.json', json.dumps(summary, indent=2) + '\n')
