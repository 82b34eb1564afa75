"""Config files: find, load, check, save, compare."""

import importlib.util
import json
import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

from flax_imdb import files
from flax_imdb.errors import UserError

_ROOT = pathlib.Path(__file__).parent
# A checkout keeps `configs` beside the package, a wheel carries it inside.
_OWN = (_ROOT.parent, _ROOT)

_CHOICES = {
    'optimizer': ('rmsprop', 'adam', 'adamw', 'sgd'),
    'schedule': ('constant', 'cosine'),
    'on_nan': ('stop', 'skip'),
    'early_stopping.monitor': ('loss', 'accuracy'),
    'data.name': ('imdb_reviews', 'grammar_reviews'),
    'model.cell': ('lstm', 'simple_rnn'),
    'model.dtype': ('float32', 'bfloat16'),
}
_AT_LEAST = {
    'seed': 0, 'num_epochs': 0, 'global_batch_size': 1, 'learning_rate': 0,
    'warmup_epochs': 0, 'weight_decay': 0, 'clip_norm': 0,
    'early_stopping.patience': 0, 'early_stopping.min_delta': 0,
    'show_examples': 0,
    'data.vocab_size': 5, 'data.max_length': 2, 'data.bucket_width': 0,
    'model.embedding_dim': 1, 'model.width': 1, 'model.layers': 1,
    'model.hidden_dim': 1,
}
# Far above any use, far below what fills a memory: a config.json may be a
# stranger's. What the fields ask for together is bounded below.
_AT_MOST = {
    'num_epochs': 50_000, 'warmup_epochs': 50_000,  # steps are int32
    'learning_rate': 1e38, 'weight_decay': 1e38, 'clip_norm': 1e38,  # float32
    'global_batch_size': 1 << 20,
    'show_examples': 1_000_000, 'data.vocab_size': 1 << 20,
    'data.max_length': 1 << 20, 'data.bucket_width': 1 << 20,
    'model.embedding_dim': 1 << 16, 'model.width': 1 << 13,
    'model.layers': 100, 'model.hidden_dim': 1 << 16,
}
# Numbers in float32, so 1 GiB and 8 GiB; configs/default.py has 1 million
# parameters, and 6 million states in a batch.
MOST_PARAMETERS = 1 << 28
_MOST_STATES = 1 << 31
_MOST_BYTES = 1 << 16  # of config.json; ours have 1,600
_FRACTIONS = (
    'label_smoothing', 'ema_decay', 'data.validation_fraction',
    'model.word_dropout', 'model.embedding_dropout', 'model.pooled_dropout',
)


def find(path: str) -> pathlib.Path:
  """Finds a config file, wherever the program was started.

  Args:
    path: as given, relative to the working directory or, like
      'configs/debug.py', to the checkout or the installed package.

  Raises:
    UserError: there is no such file; lists the configs there are.
  """
  for parent in (pathlib.Path(), *_OWN):
    if os.path.isfile(parent / path):  # also where the name is too long
      return parent / path
  known = sorted({f'configs/{f.name}' for parent in _OWN
                  for f in parent.glob('configs/*.py')})
  raise UserError(f'config file {path} not found; there are {", ".join(known)}')


def load(path: str) -> ConfigDict:
  """Runs `get_config()` of a config file; `path` as in `find`."""
  file = find(path)
  spec = importlib.util.spec_from_file_location(f'config_{file.stem}', file)
  if not (spec and spec.loader):
    raise UserError(f'config file {file} is no Python file: give a .py one')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config()
  except (Exception, SystemExit) as e:  # whatever a config file can raise
    raise UserError(f'config file {file}: {type(e).__name__}: {e}') from e
  if not isinstance(config, ConfigDict):
    raise UserError(f'config file {file}: get_config() returns no ConfigDict')
  return config


def own(name: str) -> ConfigDict:
  """The package's own configs/`name`.py, wherever the program started."""
  file = next(parent / f'configs/{name}.py' for parent in _OWN
              if (parent / f'configs/{name}.py').is_file())
  return load(str(file))


def override(config: ConfigDict, field: str, text: str) -> None:
  """Sets one field from the command line.

  Args:
    config: changed in place.
    field: dotted name, such as 'model.width'.
    text: the value; read as the type that the field has.

  Raises:
    UserError: no such field, or a text that is not of its type.
  """
  old = _flat(config).get(field)
  if old is None:
    raise UserError(
        f'config.{field} is not a field; there are '
        + ', '.join(sorted(_flat(config))))
  try:
    kind = type(old)
    value: Any = _BOOLS[text.lower()] if kind is bool else kind(text)
  except (ValueError, KeyError):
    raise UserError(
        f'config.{field}={text}: give {_TYPES[type(old)]}, such as {old}'
    ) from None
  config.update_from_flattened_dict({field: value})


_BOOLS = {'true': True, 'false': False, '1': True, '0': False}
_TYPES = {bool: 'true or false', int: 'a whole number', float: 'a number',
          str: 'a text'}


def check(config: ConfigDict) -> None:
  """Checks the fields that need no data and no devices to be checked.

  Raises:
    UserError: a field is missing or unknown, or its value is out of range.
  """
  fields, known = _flat(config), _flat(own('default'))
  for field in sorted(set(fields) ^ set(known)):
    raise UserError(
        f'config.{field:.60} is '
        + ('not a field' if field in fields else 'missing')
        + ': compare with configs/default.py')
  for field, value in known.items():
    given = fields[field]
    if type(given) is not type(value):
      raise UserError(
          f'config.{field}={repr(given):.40}: give {_TYPES[type(value)]}, such '
          f'as {value!r}')
  for field, choices in _CHOICES.items():
    if fields[field] not in choices:
      raise UserError(
          f'config.{field}={fields[field]}: choose {", ".join(choices)}')
  for field, least in _AT_LEAST.items():
    if not least <= fields[field] < float('inf'):
      raise UserError(
          f'config.{field}={fields[field]}: must be finite, at least {least}')
  for field, most in _AT_MOST.items():
    if fields[field] > most:
      raise UserError(f'config.{field}={fields[field]!s:.40}: must be at most '
                      f'{most:,}')
  for field in _FRACTIONS:
    if not 0 <= fields[field] < 1:
      raise UserError(
          f'config.{field}={fields[field]}: must be at least 0 and under 1')
  if fields['seed'] >= 1 << 32:  # jax would drop the higher bits
    raise UserError(f'config.seed={fields["seed"]}: must be under {1 << 32}')
  kinds = config.model.pooling.split('+')
  if not set(kinds) <= {'last', 'mean', 'max'} or len(set(kinds)) < len(kinds):
    raise UserError(
        f'config.model.pooling={config.model.pooling}: choose last, mean, max, '
        'or some joined as in max+mean')
  if parameter_count(config) > MOST_PARAMETERS:
    raise UserError(
        f'the config asks for {parameter_count(config):,} parameters, more '
        f'than {MOST_PARAMETERS:,}: lower config.data.vocab_size, '
        'config.model.embedding_dim, width, layers or hidden_dim')
  states = config.global_batch_size * config.data.max_length * (
      config.model.embedding_dim + _directions(config) * config.model.width)
  if states > _MOST_STATES:
    raise UserError(
        f'a batch of this config takes {states:,} numbers, more than '
        f'{_MOST_STATES:,}: lower config.global_batch_size, '
        'config.data.max_length, config.model.embedding_dim or width')
  if config.data.bucket_width and not config.model.mask_padding:
    raise UserError(
        'config.model.mask_padding=False makes the answer depend on the amount '
        'of padding: give --config.data.bucket_width=0 as well')


def parameter_count(config: ConfigDict) -> int:
  """The number of floats in the parameters of the model, all layers counted.

  In numbers alone: a model too large must be refused before jax makes it.
  """
  model, directions = config.model, _directions(config)
  gates = {'lstm': 4, 'simple_rnn': 1}[model.cell]
  states = directions * model.width
  inputs = model.embedding_dim + (model.layers - 1) * states
  pooled = len(model.pooling.split('+')) * states
  return (config.data.vocab_size * model.embedding_dim
          + gates * states * (inputs + model.layers * (model.width + 1))
          + (pooled + 2) * model.hidden_dim + 1)


def _directions(config: ConfigDict) -> int:
  return 2 if config.model.bidirectional else 1


def differences(config: ConfigDict, other: ConfigDict) -> dict[str, tuple]:
  """The fields in which two configs differ: {field: (value, other value)}."""
  a, b = _flat(config), _flat(other)
  return {k: (a.get(k), b.get(k)) for k in sorted({*a, *b})
          if a.get(k) != b.get(k)}


def save(config: ConfigDict, path: str | os.PathLike[str]) -> None:
  """Writes a config as JSON; errors as `files.write`."""
  files.write(path, json.dumps(config.to_dict(), indent=2) + '\n')


def read(path: str | os.PathLike[str]) -> ConfigDict:
  """Reads and checks what `save` wrote.

  Raises:
    UserError: the file is missing, damaged, too large, or made by another
      version.
  """
  text = files.read(path, _MOST_BYTES)
  try:
    config = ConfigDict(json.loads(text, object_pairs_hook=_once))
  except (ValueError, TypeError, AttributeError, RecursionError) as e:
    raise UserError(f'{path} is not a config ({e}): was the run directory '
                    'copied whole?') from e
  try:
    check(config)
  except UserError as e:
    raise UserError(f'{path}: {e}') from e
  return config


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Refuses what json would answer with the last of two values."""
  fields = dict(pairs)
  if len(fields) < len(pairs):
    raise ValueError('a field stands there twice')
  return fields


def _flat(config: ConfigDict) -> dict[str, Any]:
  """{'model.width': 64, ...}."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      flat |= {f'{key}.{k}': v for k, v in _flat(value).items()}
    else:
      flat[key] = value
  return flat
