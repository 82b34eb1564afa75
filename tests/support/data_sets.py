"""Data sets to read: config.data of one, and what tfds prepares by hand."""

from ml_collections import ConfigDict
import numpy as np
import tensorflow_datasets as tfds

from flax_imdb.config import packaged

# Names of four classes, two of which a CSV of Germans might have.
TOPICS = ('Sport', 'Börse', 'Sci/Tech', 'Welt & Politik')
_WORDS = 'the a new of and this said was in two day one will all that'.split()
_OWN = ('team goal match', 'shares bank profit', 'chip robot software',
        'minister vote treaty')


def of(name: str, **fields: str) -> ConfigDict:
  """config.data of configs/default.py with another data set, and fields."""
  data = packaged('default').data
  data.update(name=name, **fields)
  return data


def config_of(data: ConfigDict) -> ConfigDict:
  """Configs/default.py with another config.data, as `of` makes them."""
  config = packaged('default')
  config.data = data
  return config


def make(folder, name, features, keys, *examples, version='1.0.0', test=None):
  """Prepares a set of two splits with these examples by tfds itself.

  `test` are those of test; without it they are the same.
  """
  name, _, config = name.partition('/')

  class AnySet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version(version)
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] * bool(config)

    def _info(self):
      return tfds.core.DatasetInfo(
          builder=self, features=tfds.features.FeaturesDict(features),
          supervised_keys=keys)

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples(examples),
              'test': self._generate_examples(test or examples)}

    def _generate_examples(self, examples):
      yield from enumerate(examples)

  AnySet.name = name
  AnySet(data_dir=folder, file_format='array_record').download_and_prepare()


def topic(label, rng):
  """A text of a class of `TOPICS`: some of its own words among any."""
  words = rng.choice(_WORDS, rng.integers(4, 40)).tolist()
  for _ in range(rng.integers(1, 4)):
    words.insert(rng.integers(len(words)), rng.choice(_OWN[label].split()))
  return ' '.join(words)


def make_topics(folder, n=160, test=60, share=(0.4, 0.3, 0.2, 0.1)):
  """Prepares `topics`, whose four classes have these shares of the texts."""
  rng = np.random.default_rng(0)
  features = {'text': tfds.features.Text(),
              'label': tfds.features.ClassLabel(names=TOPICS)}
  examples = [{'text': topic(label, rng), 'label': label}
              for label in rng.choice(4, n + test, p=share).tolist()]
  make(folder, 'topics', features, ('text', 'label'), *examples[:n],
       test=examples[n:])
