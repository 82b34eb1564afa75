"""A seeded grammar that writes film reviews, for machines with no network.

Every review is neutral talk about an invented film with two to six verdicts
strewn in. All verdicts of a review mean the same, its label; but a good word
may be negated, conceded before a `but`, or quoted from someone who was wrong.
So praise and blame use much the same words, and a model has to read them in
order: `benchmarks/bag_of_words.py` says how little the counts alone tell.
"""

from collections.abc import Iterable, Iterator, Sequence
import itertools
import pathlib
import random
import re
import tomllib

import tensorflow_datasets as tfds

# Words wanted in a review, at equally spaced quantiles; the last sentence may
# go over. Every so many words there is one more verdict.
COUNT = 5_000  # reviews of the data set
_LENGTHS = (22, 40, 54, 66, 78, 92, 110, 134, 172, 240, 470)
_WORDS_PER_VERDICT = 40

_GRAMMAR = tomllib.loads(
    pathlib.Path(__file__).with_suffix('.toml').read_text('utf-8'))
SENTIMENT = _GRAMMAR['sentiment']  # rule -> [negative words, positive words]
_RULES = _GRAMMAR['words'] | _GRAMMAR['templates']


def _pick(rng: random.Random, options: Sequence):
  # Only `Random.random` is promised to stay the same between Python versions.
  return options[int(rng.random() * len(options))]


def _expand(rng: random.Random, template: str, sense: int, cast: dict) -> str:
  """Fills the slots of a template that has to mean `sense` (0 bad, 1 good)."""
  def fill(slot):
    sign, name = slot.groups()
    if name in cast:
      return cast[name]
    inner = {'+': sense, '-': 1 - sense, '': _pick(rng, (0, 1))}[sign]
    options = SENTIMENT[name][inner] if name in SENTIMENT else _RULES[name]
    return _expand(rng, _pick(rng, options), inner, cast)
  return re.sub(r'\{([+-]?)(\w+)\}', fill, template)


def _review(rng: random.Random, label: int) -> str:
  cast = {role: _expand(rng, rule, label, {})
          for role, rule in _GRAMMAR['cast'].items()}

  def sentence(template):
    text = _expand(rng, template, label, cast)
    text = re.sub(r'\ba (?=[aeiou])', 'an ', text)
    return text[0].upper() + text[1:]

  step, part = divmod(rng.random() * (len(_LENGTHS) - 1), 1)
  low, high = _LENGTHS[int(step):int(step) + 2]
  wanted = int(low + part * (high - low))
  verdicts = [sentence('{+verdict}')
              for _ in range(min(6, 2 + wanted // _WORDS_PER_VERDICT))]
  words = sum(len(verdict.split()) for verdict in verdicts)
  story = []
  neutral = sorted(_RULES['neutral'], key=lambda _: rng.random())
  for template in itertools.cycle(neutral):
    if words >= wanted:
      break
    story.append(sentence(template))
    words += len(story[-1].split())
  for verdict in verdicts:
    story.insert(int(rng.random() * (len(story) + 1)), verdict)
  return ' '.join(story)


def _reviews(rng: random.Random, n: int) -> Iterator[tuple[str, int]]:
  label = 0
  for index in range(n):
    label = 1 - label if index % 2 else _pick(rng, (0, 1))
    yield _review(rng, label), label


def generate(seed: int, n: int) -> Iterator[tuple[str, int]]:
  """Writes a corpus of reviews; the same everywhere for the same arguments.

  The classes alternate within pairs of random order, so that every prefix is
  balanced to within one review, and a longer corpus begins with a shorter one.

  Returns `n` pairs: text (20 to 500 words) and label (1 positive, 0 negative).
  `seed` is not below 0; fewer than one review raise ValueError.
  """
  if n < 1:
    raise ValueError(f'n must be at least 1, got {n}')
  return _reviews(random.Random(seed), n)


class GrammarReviews(  # type: ignore[call-arg]
    tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """What `generate` writes, as a tfds data set; no network is needed."""

  name = 'grammar_reviews'
  # Raise it, here and in sources.PATHS, whenever `generate` writes other text.
  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self, supervised_keys=('text', 'label'),
        description='Generated movie reviews, positive and negative.',
        features=tfds.features.FeaturesDict({
            'text': tfds.features.Text(),
            'label': tfds.features.ClassLabel(names=['neg', 'pos'])}))

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    reviews = list(generate(seed=0, n=COUNT))
    return {'train': self._generate_examples(reviews[:4_000]),
            'test': self._generate_examples(reviews[4_000:])}

  def _generate_examples(self, reviews: Iterable[tuple[str, int]]):
    for key, (text, label) in enumerate(reviews):
      yield key, {'text': text, 'label': label}
