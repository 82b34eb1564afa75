"""What the fields of a config may be, alone and together."""

import dataclasses
import re
from typing import Any

from ml_collections import ConfigDict

from flax_imdb.errors import UserError

# Fields that say what is shown of a run, not what it is.
ONLY_SHOWN = frozenset(('debug', 'loggers', 'profile', 'show_examples'))
LOGGERS = ('wandb', 'mlflow')  # what config.loggers may name
# Of config.profile: the first step, counted from 1, and how many.
_STEPS = re.compile(r'([1-9]\d{0,8}),([1-9]\d{0,2})', re.ASCII)
# Of a data set of tfds, perhaps with its config: glue/sst2.
_DATA_SET = re.compile(r'\w+(/\w[\w.-]*)?', re.ASCII)


@dataclasses.dataclass(frozen=True)
class _Field:
  type: type  # neither True nor 1.0 is taken for 1
  choices: tuple[str, ...] = ()  # () where any text will do
  least: float | None = None
  most: float | None = None  # None: any number that is finite
  under: float | None = None  # instead of `most`: the first one too large


# How a person writes them, and what is said of one who wrote another.
BOOLS = {'true': True, 'false': False, '1': True, '0': False}
TYPES = {bool: 'true or false', int: 'a whole number', float: 'a number',
         str: 'a text'}
_BOOL, _TEXT = _Field(bool), _Field(str)
_FRACTION = _Field(float, least=0, under=1)
# The largest numbers are far above any use, and far below what fills a memory:
# a config.json may be a stranger's. What the fields ask for together is bounded
# in `model.classifier`.
_FIELDS = {
    'seed': _Field(int, least=0, under=1 << 32),  # jax would drop higher bits
    'num_epochs': _Field(int, least=0, most=50_000),  # steps are int32
    'min_steps_per_epoch': _Field(int, least=0, most=10_000),
    'max_steps_per_epoch': _Field(int, least=0, most=1 << 24),
    'global_batch_size': _Field(int, least=1, most=1 << 20),
    'eval_batch_size': _Field(int, least=0, most=1 << 20),
    'show_examples': _Field(int, least=0, most=1_000_000),
    'init_from': _TEXT,
    'debug': _BOOL,
    'loggers': _TEXT,  # some of `LOGGERS` joined by ,
    'profile': _TEXT,  # two numbers; see `profiled_steps`
    'objective': _Field(str, ('label', 'language_model')),
    'optimizer': _Field(str, ('rmsprop', 'adam', 'adamw', 'sgd')),
    'adam_epsilon': _Field(float, least=0, most=1),
    'learning_rate': _Field(float, least=0, most=1e38),  # of float32
    'schedule': _Field(str, ('constant', 'cosine')),
    'warmup_epochs': _Field(float, least=0, most=50_000),
    'weight_decay': _Field(float, least=0, most=1e38),
    'clip_norm': _Field(float, least=0, most=1e38),
    'label_smoothing': _FRACTION,
    'class_weights': _Field(str, ('none', 'balanced')),
    'on_nan': _Field(str, ('stop', 'skip')),
    'ema_decay': _FRACTION,
    'adversarial_norm': _Field(float, least=0, most=1e6),
    'adversarial_weight': _Field(float, least=0, most=1e6),
    'virtual_adversarial_norm': _Field(float, least=0, most=1e6),
    'virtual_adversarial_weight': _Field(float, least=0, most=1e6),
    'entropy_weight': _Field(float, least=0, most=1e6),
    'early_stopping.monitor': _Field(str, ('loss', 'accuracy', 'macro_f1')),
    'early_stopping.patience': _Field(int, least=0),
    'early_stopping.min_delta': _Field(float, least=0),
    'early_stopping.restore_best': _BOOL,
    'self_training_rounds': _Field(int, least=0, most=100),
    'teachers': _TEXT,
    'data.name': _TEXT,
    'data.text_field': _TEXT,
    'data.label_field': _TEXT,
    'data.train_file': _TEXT,
    'data.validation_file': _TEXT,
    'data.test_file': _TEXT,
    'data.test_fraction': _FRACTION,
    'data.train_split': _TEXT,
    'data.test_split': _TEXT,
    'data.unlabelled_split': _TEXT,
    'data.validation_split': _TEXT,
    'data.validation_fraction': _FRACTION,
    'data.validation_by': _Field(str, ('groups', 'rows', 'text')),
    'data.vocab_size': _Field(int, least=5, most=1 << 20),
    'data.punctuation': _BOOL,
    'data.max_length': _Field(int, least=2, most=1 << 20),
    'data.read': _Field(str, ('first', 'last', 'spread')),
    'data.segment_length': _Field(int, least=0, most=1 << 20),
    'data.train_segments': _Field(int, least=0, most=1 << 20),
    'data.bucket_width': _Field(int, least=0, most=1 << 20),
    'data.word_index': _TEXT,
    'data.bigrams': _Field(int, least=1, most=1 << 24),
    'data.log_odds_order': _Field(int, least=1, most=3),
    'data.log_odds_ngrams': _Field(int, least=1, most=1 << 22),  # 2 GB to count
    'model.inputs': _TEXT,  # words, and what is joined to it by +
    'model.members': _Field(int, least=1, most=100),
    'model.linear_weight': _Field(float, least=0, most=1e6),
    'model.cell': _Field(str, ('lstm', 'simple_rnn')),
    'model.embedding_dim': _Field(int, least=1, most=1 << 16),
    'model.width': _Field(int, least=1, most=1 << 13),
    'model.layers': _Field(int, least=1, most=100),
    'model.bidirectional': _BOOL,
    'model.pooling': _TEXT,  # last, mean, max, or some joined by +
    'model.hidden_dim': _Field(int, least=0, most=1 << 16),
    'model.word_dropout': _FRACTION,
    'model.bigram_dropout': _FRACTION,
    'model.log_odds_dropout': _FRACTION,
    'model.embedding_dropout': _FRACTION,
    'model.pooled_dropout': _FRACTION,
    'model.mask_padding': _BOOL,
    'model.remat': _BOOL,
    'model.recurrence': _Field(
        str, ('scan', 'joint', 'loop', 'kernel', 'auto', 'interpret')),
    'model.dtype': _Field(str, ('float32', 'bfloat16')),
}

# Fields newer than some run directories: what these were made with.
ADDED = {
    'loggers': '', 'profile': '', 'eval_batch_size': 0,
    'class_weights': 'none',
    'data.text_field': '', 'data.label_field': '', 'data.word_index': '',
    'data.train_file': '', 'data.validation_file': '', 'data.test_file': '',
    'data.test_fraction': 0.1, 'data.validation_split': '',
    'adam_epsilon': 1e-7, 'min_steps_per_epoch': 0,
    'max_steps_per_epoch': 0, 'objective': 'label',
    'adversarial_norm': 0.0, 'adversarial_weight': 1.0,
    'virtual_adversarial_norm': 0.0, 'virtual_adversarial_weight': 1.0,
    'entropy_weight': 0.0, 'data.validation_by': 'rows',
    'data.punctuation': False, 'data.read': 'first',
    'data.segment_length': 0, 'data.train_segments': 0,
    'data.bigrams': 200_000, 'data.log_odds_order': 3,
    'data.log_odds_ngrams': 1_000_000,
    'model.inputs': 'words', 'model.bigram_dropout': 0.5,
    'model.log_odds_dropout': 0.0, 'self_training_rounds': 0,
    'teachers': '', 'data.unlabelled_split': '', 'model.linear_weight': 1.0,
    'model.members': 1, 'model.recurrence': 'scan'}


def check_fields(config: ConfigDict) -> None:
  """Raises UserError if a field is missing, unknown or out of range."""
  values = flat(config)
  for name in sorted(set(values) ^ set(_FIELDS)):
    what = 'not a field' if name in values else 'missing'
    raise UserError(
        f'config.{name:.60} is {what}: compare with configs/default.py')
  for name, field in _FIELDS.items():
    if type(values[name]) is not field.type:
      raise UserError(f'config.{name}={repr(values[name]):.40}: give '
                      f'{TYPES[field.type]}')
    if why := _out_of_range(field, values[name]):
      raise UserError(f'config.{name}={values[name]!s:.40}: {why}')
  kinds = config.model.pooling.split('+')
  if not set(kinds) <= {'last', 'mean', 'max'} or len(set(kinds)) < len(kinds):
    raise UserError(f'config.model.pooling={config.model.pooling}: choose last,'
                    ' mean, max, or some joined as in max+mean')
  loggers = config.loggers.split(',') if config.loggers else []
  if not {*loggers} <= {*LOGGERS} or len({*loggers}) < len(loggers):
    raise UserError(f'config.loggers={config.loggers!s:.40}: choose '
                    f'{", ".join(LOGGERS)}, or both as in wandb,mlflow')
  if config.profile and not _STEPS.fullmatch(config.profile):
    raise UserError(f'config.profile={config.profile!s:.40}: give the first '
                    'step and how many, up to 999, as in 100,5')
  inputs = config.model.inputs.split('+')
  if (inputs[0] != 'words' or len(set(inputs)) < len(inputs)
      or not set(inputs[1:]) <= {'bigrams', 'log_odds', 'linear'}
      or 'linear' in inputs and 'log_odds' not in inputs):
    raise UserError(f'config.model.inputs={config.model.inputs:.40}: choose '
                    'words, or words with bigrams, log_odds or log_odds+linear '
                    'joined, as in words+bigrams+log_odds')
  if not _DATA_SET.fullmatch(config.data.name):
    raise UserError(f'config.data.name={config.data.name!s:.40}: give '
                    'imdb_reviews, grammar_reviews, files, or a data set of '
                    'tfds such as ag_news_subset or glue/sst2')
  _check_files(config)
  if config.data.word_index and config.data.punctuation:
    raise UserError(
        'config.data.word_index has words alone: give '
        '--config.data.punctuation=false as well')
  if config.data.read == 'spread' and not config.data.segment_length:
    raise UserError('config.data.read=spread is of segments: give '
                    '--config.data.segment_length=100 as well')
  if config.data.segment_length and not config.model.mask_padding:
    raise UserError(
        'config.model.mask_padding=False reads a whole review in one: give '
        '--config.data.segment_length=0 as well')
  if config.self_training_rounds and not config.data.unlabelled_split:
    raise UserError(
        f'config.self_training_rounds={config.self_training_rounds} is of '
        'reviews without labels: give --config.data.unlabelled_split, for IMDB '
        'unsupervised')
  if config.data.unlabelled_split and not (
      config.self_training_rounds or config.virtual_adversarial_norm
      or config.entropy_weight or config.objective == 'language_model'):
    raise UserError(
        f'config.data.unlabelled_split={config.data.unlabelled_split} has no '
        'use: give --config.self_training_rounds=1 as well, or '
        '--config.virtual_adversarial_norm or --config.entropy_weight')
  if config.model.recurrence in ('kernel', 'interpret') and (
      config.model.cell != 'lstm' or config.debug):
    raise UserError(
        f'config.model.recurrence={config.model.recurrence} is of '
        'config.model.cell=lstm, and of config.debug=False: use scan or joint')
  if config.objective == 'language_model':
    _check_language_model(config, values)
  if config.early_stopping.patience and not validates(config.data):
    raise UserError(
        'config.data.validation_fraction=0 leaves no score to stop early by: '
        'give --config.early_stopping.patience=0 as well')
  if config.data.bucket_width and not config.model.mask_padding:
    raise UserError(
        'config.model.mask_padding=False makes the answer depend on the amount '
        'of padding: give --config.data.bucket_width=0 as well')


def _check_files(config: ConfigDict) -> None:
  """Raises UserError if the fields of a person's own files do not fit."""
  data = config.data
  if data.name == 'files' and not data.train_file:
    raise UserError('config.data.name=files is of your own: give '
                    '--config.data.train_file=FILE, such as reviews.csv')
  for field in 'train_file', 'validation_file', 'test_file':
    if data[field] and data.name != 'files':
      raise UserError(
          f'config.data.{field} is not of config.data.name={data.name}: give '
          '--config=configs/texts.py, or --config.data.name=files, as well')
  if data.name == 'files' and data.test_split == 'test' and not (
      data.test_file or data.test_fraction or config.objective != 'label'):
    raise UserError(
        'config.data.test_fraction=0 leaves nothing to test with: give '
        '--config.data.test_file, or a share such as 0.1')


def profiled_steps(config: ConfigDict) -> range:
  """The steps, counted from 1, that config.profile has traced; maybe none."""
  found = _STEPS.fullmatch(config.profile)
  if not found:
    return range(0)
  first, count = map(int, found.groups())
  return range(first, first + count)


def validation_split(data: ConfigDict) -> str:
  """The tfds split that validates; '' for a share of the training split."""
  return data.validation_split or ('validation' if data.validation_file else '')


def validates(data: ConfigDict) -> bool:
  """Whether some reviews of config.data validate."""
  return bool(data.validation_fraction or validation_split(data))


# What has no meaning without labels, or would tell the word that is to be
# predicted, as pairs do backward; and the value that leaves it out.
_OF_LABELS = {
    'model.inputs': 'words', 'model.members': 1, 'show_examples': 0,
    'label_smoothing': 0.0, 'class_weights': 'none', 'adversarial_norm': 0.0,
    'virtual_adversarial_norm': 0.0, 'entropy_weight': 0.0,
    'self_training_rounds': 0, 'teachers': ''}


def _check_language_model(config: ConfigDict, values: dict[str, Any]) -> None:
  """Raises UserError for what does not go with predicting words."""
  fixes = ' '.join(f'--config.{name}={value}' for name, value in
                   _OF_LABELS.items() if values[name] != value)
  if fixes:
    raise UserError('config.objective=language_model predicts words from words '
                    f'alone: give {fixes} as well')
  if config.early_stopping.monitor == 'macro_f1':
    raise UserError(
        'config.early_stopping.monitor=macro_f1 is of classes: give '
        '--config.early_stopping.monitor=loss as well')
  if config.data.segment_length == 1:
    raise UserError(
        'config.data.segment_length=1 leaves no word to predict to config.'
        'objective=language_model: give 0, or 2 at least')
  if config.model.bidirectional and config.model.layers > 1:
    raise UserError(
        f'config.model.layers={config.model.layers}: the second layer reads '
        'both directions, and so the word that config.objective=language_model '
        'is to predict: give --config.model.layers=1, or '
        '--config.model.bidirectional=false')


def _out_of_range(field: _Field, value: Any) -> str:
  """What the value must be instead; '' if it is right."""
  if field.choices and value not in field.choices:
    return f'choose {", ".join(field.choices)}'
  if field is _FRACTION and not 0 <= value < 1:
    return 'must be at least 0 and under 1'
  if field.least is not None and not field.least <= value < float('inf'):
    return f'must be finite, at least {field.least}'
  if field.most is not None and value > field.most:
    return f'must be at most {field.most:,}'
  if field.under is not None and value >= field.under:
    return f'must be under {field.under}'
  return ''


def completions() -> dict[str, tuple[str, ...]]:
  """All fields, such as 'model.width', and the values of those with few."""
  return {name: tuple(BOOLS)[:2] if field.type is bool else field.choices
          for name, field in _FIELDS.items()}


def flat(config: ConfigDict) -> dict[str, Any]:
  """{'model.width': 64, ...}."""
  values: dict[str, Any] = {}
  for key, value in config.items():
    values |= ({f'{key}.{k}': v for k, v in flat(value).items()}
               if isinstance(value, ConfigDict) else {key: value})
  return values
