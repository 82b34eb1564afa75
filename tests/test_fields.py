"""What fields may be is checked, one by one and together."""

import pytest

from flax_imdb.config import load_config
from flax_imdb.errors import UserError
from flax_imdb.fields import check_fields


@pytest.fixture
def default():
  return load_config('configs/default.py')


@pytest.mark.parametrize(('field', 'value', 'message'), [
    ('optimizer', 'lion', 'choose rmsprop, adam, adamw, sgd'),
    ('schedule', 'step', 'choose constant, cosine'),
    ('early_stopping.monitor', 'f1', 'choose loss, accuracy'),
    ('data.name', 'my file', 'grammar_reviews, files, or a data set'),
    ('model.cell', 'gru', 'choose lstm, simple_rnn'),
    ('model.dtype', 'float16', 'choose float32, bfloat16'),
    ('seed', -1, 'at least 0'), ('num_epochs', -1, 'at least 0'),
    ('seed', 2**32, 'seed'),
    # Epochs of twice that, 50,000 of them, are still counted in int32.
    ('min_steps_per_epoch', 10_001, 'at most 10,000'),
    ('global_batch_size', 0, 'at least 1'), ('data.vocab_size', 4, 'least 5'),
    ('data.max_length', 1, 'least 2'), ('data.bucket_width', -1, 'least 0'),
    ('model.width', 0, 'least 1'), ('model.layers', 0, 'least 1'),
    ('learning_rate', -1e-3, 'least 0'),
    ('learning_rate', float('nan'), 'learning_rate=nan'),
    ('learning_rate', float('inf'), 'learning_rate=inf'),
    ('data.validation_fraction', 1.0, 'at least 0 and under 1'),
    ('data.validation_fraction', -0.1, 'at least 0 and under 1'),
    ('ema_decay', 1.0, 'under 1'), ('label_smoothing', float('nan'), 'under 1'),
    ('model.word_dropout', 1.0, 'under 1'), ('model.pooling', '', 'last, mean'),
    ('model.pooling', 'max+max', 'last, mean, max'),
    ('model.pooling', 'sum', 'last, mean, max'),
    ('loggers', 'neptune', 'choose wandb, mlflow'),
    ('loggers', 'wandb,wandb', 'choose wandb, mlflow'),
    ('loggers', 'wandb,', 'choose wandb, mlflow'),
    *(('profile', value, 'as in 100,5') for value in (
        '5', '0,5', '5,0', '5,1000', '-1,5', '1,2,3', '5, 2', 'a,b'))])
def test_check_refuses(default, field, value, message):
  default.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=message) as e:
    check_fields(default)
  assert f'config.{field}={value}' in str(e.value)


def test_check_refuses_buckets_for_a_model_that_reads_padding(default):
  default.model.mask_padding = False
  with pytest.raises(UserError, match=r'mask_padding=False.*segment_length=0'):
    check_fields(default)
  default.data.segment_length = 0
  with pytest.raises(UserError, match=r'mask_padding=False.*bucket_width=0'):
    check_fields(default)
  default.data.bucket_width = 0
  check_fields(default)


@pytest.mark.parametrize('inputs', [
    '', 'bigrams', 'words+', 'words+bigrams+bigrams', 'bigrams+words'])
def test_check_refuses_inputs_that_there_are_not(inputs, default):
  default.model.inputs = inputs
  with pytest.raises(UserError, match='choose words, or words'):
    check_fields(default)


def test_check_refuses_to_spread_what_is_read_in_one(default):
  default.data.read = 'spread'
  check_fields(default)
  default.data.segment_length = 0
  with pytest.raises(UserError, match=r'spread.*segment_length=100'):
    check_fields(default)


def test_check_refuses_missing_and_unknown_fields_and_other_types(default):
  default.model.widht = 3
  with pytest.raises(UserError, match='config.model.widht is not a field'):
    check_fields(default)
  del default.model.widht
  del default.model['width']
  with pytest.raises(UserError, match='config.model.width is missing'):
    check_fields(default)
  default.model.width = 4.0
  with pytest.raises(UserError, match=r'width=4\.0: give a whole number'):
    check_fields(default)
