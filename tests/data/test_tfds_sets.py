"""Other sets of tfds, laid out as it prepares them: found, read, or refused."""

import numpy as np
import pytest
from support import data_sets
from support.data_sets import make
import tensorflow_datasets as tfds

from flax_imdb.data import sources
from flax_imdb.errors import UserError

Text, ClassLabel = tfds.features.Text, tfds.features.ClassLabel
NEWS = ClassLabel(names=['World', 'Sports', 'Business', 'Sci/Tech'])
# Features, what is learned from what, and an example, as those sets have them.
SETS = {
    'ag_news_subset': (
        {'description': Text(), 'label': NEWS, 'title': Text()},
        ('description', 'label'),
        {'description': 'Oil rose.', 'label': 2, 'title': 'Markets'}),
    'yelp_polarity_reviews': (
        {'label': ClassLabel(names=['1', '2']), 'text': Text()},
        ('text', 'label'), {'label': 1, 'text': 'Großartig!'}),
    'glue/sst2': (
        {'idx': tfds.features.Scalar(dtype=np.int32),
         'label': ClassLabel(names=['negative', 'positive']),
         'sentence': Text()}, None,
        {'idx': 7, 'label': -1, 'sentence': 'a charming journey'}),
}


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))


def error_of(call, *args) -> str:
  with pytest.raises(UserError) as caught:
    call(*args)
  assert '\n' not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize('name, text, names', [
    ('ag_news_subset', 'Oil rose.',
     ('World', 'Sports', 'Business', 'Sci/Tech')),
    ('yelp_polarity_reviews', 'Großartig!', ('1', '2')),
    ('glue/sst2', 'a charming journey', ('negative', 'positive'))])
def test_text_and_label_are_found(tmp_path, name, text, names):
  features, keys, example = SETS[name]
  make(tmp_path, name, features, keys, example)
  data = data_sets.of(name)
  texts, labels = sources.read_texts(data, 'train')
  assert texts == [text] and labels.tolist() == [example['label']]
  assert sources.class_names(data) == names
  assert sources.prepare(data, pytest.fail) == sources.fingerprint(data)


def test_fields_are_chosen_and_joined(tmp_path):
  features, keys, example = SETS['ag_news_subset']
  make(tmp_path, 'ag_news_subset', features, keys, example)
  first = data_sets.of('ag_news_subset')
  joined = data_sets.of('ag_news_subset', text_field='title+description')
  assert sources.read_texts(joined, 'test')[0] == ['Markets Oil rose.']
  assert sources.fingerprint(first) != sources.fingerprint(joined)
  for fields, says in (
      ({'text_field': 'body'}, 'choose description, title'),
      ({'label_field': 'title'}, 'choose label')):
    wrong = data_sets.of('ag_news_subset', **fields)
    assert says in error_of(sources.read_texts, wrong, 'train')


@pytest.mark.parametrize('features, says', [
    ({'a': Text(), 'b': Text(), 'label': NEWS},
     'give --config.data.text_field, one of a, b'),
    ({'text': Text(), 'x': NEWS, 'y': NEWS},
     'give --config.data.label_field, one of x, y'),
    ({'text': Text(), 'score': tfds.features.Scalar(dtype=np.float32)},
     'no ClassLabel'),
    ({'image': tfds.features.Tensor(shape=(1,), dtype=np.uint8), 'label': NEWS},
     'no Text')])
def test_what_is_not_one_text_and_one_label_is_refused(
    tmp_path, features, says):
  values = {Text: 'x', ClassLabel: 0, tfds.features.Scalar: 1.0}
  example = {name: values.get(type(x), [0]) for name, x in features.items()}
  make(tmp_path, 'odd', features, None, example)
  assert says in error_of(sources.read_texts, data_sets.of('odd'), 'train')


def test_one_class_is_refused(tmp_path):
  make(tmp_path, 'odd', {'text': Text(), 'label': ClassLabel(names=['a'])},
       None, {'text': 'x', 'label': 0})
  assert 'one class' in error_of(sources.class_names, data_sets.of('odd'))


def test_the_newest_version_and_the_only_config_are_read(tmp_path):
  features, keys, example = SETS['glue/sst2']
  for version, text in ('1.9.0', 'old'), ('1.10.0', 'new'):
    make(tmp_path, 'glue/sst2', features, keys,
         example | {'sentence': text}, version=version)
  assert sources.read_texts(data_sets.of('glue'), 'train')[0] == ['new']
  make(tmp_path, 'glue/cola', features, keys, example)
  message = error_of(sources.fingerprint, data_sets.of('glue'))
  assert 'glue/cola or glue/sst2' in message


def test_a_set_that_tensorflow_must_prepare(tmp_path):
  message = error_of(
      sources.prepare, data_sets.of('ag_news_subset'), pytest.fail)
  assert 'pip install tensorflow' in message
  assert 'tfds build ag_news_subset' in message and str(tmp_path) in message
