"""The embedded corpus: fixed for ever, balanced, and not solved by counting."""

from collections import Counter
import hashlib
import re

import numpy as np
import pytest

from flax_imdb.data.grammar import SENTIMENT, generate

# Another hash means another corpus: whoever changes the grammar also raises
# the VERSION of grammar_reviews in sources.py and grammar.py, or
# prepared copies of the old corpus stay in use, and measures anew.
_SHA256 = '1e60121adade491bda8328fe5177712e9f61fd8719c55f154101f88cd845c2d2'

_WORD = re.compile(r"[a-z']+")
_ADJECTIVE = '|'.join(SENTIMENT['adj'][0] + SENTIMENT['adj'][1])


@pytest.fixture(scope='module')
def corpus():
  return list(generate(seed=0, n=2000))


def _digest(reviews):
  lines = ''.join(f'{label}\t{text}\n' for text, label in reviews)
  return hashlib.sha256(lines.encode()).hexdigest()


def _sense(words):
  """The sentiment (0 or 1) of the words between which a template chose."""
  return next(
      sense for pair in SENTIMENT.values() for sense in (0, 1)
      if words in pair[sense])


def _sentences(corpus, pattern):
  """Matches of a pattern for whole sentences, each with the review's label."""
  for text, label in corpus:
    for sentence in re.split(r'(?<=[.!]) ', text):
      if match := re.fullmatch(pattern, sentence):
        yield match, label


def test_the_seed_fixes_the_corpus():
  """On every machine and every Python: the hash is a recorded one."""
  assert _digest(generate(seed=0, n=200)) == _SHA256


def test_another_seed_gives_another_corpus():
  assert not set(generate(seed=0, n=50)) & set(generate(seed=1, n=50))


def test_a_longer_corpus_begins_with_a_shorter_one():
  assert list(generate(seed=5, n=30))[:9] == list(generate(seed=5, n=9))


@pytest.mark.parametrize('n', [0, -1])
def test_a_corpus_has_at_least_one_review(n):
  """The error comes with the call, not with the first review drawn."""
  with pytest.raises(ValueError, match='at least 1'):
    generate(seed=0, n=n)


def test_lengths_are_broad_and_within_bounds(corpus):
  lengths = np.array([len(text.split()) for text, _ in corpus])
  assert lengths.min() >= 20 and lengths.max() <= 500
  low, median, high = np.quantile(lengths, [0.05, 0.5, 0.95])
  assert low < 45 and 80 < median < 125 and high > 300


def test_every_prefix_is_balanced(corpus):
  """To within one review, and the order within a pair is not always one."""
  signs = np.array([2 * label - 1 for _, label in corpus])
  assert np.abs(np.cumsum(signs)).max() == 1
  assert set(signs[::2]) == {-1, 1}


def test_no_review_is_written_twice(corpus):
  assert len({text for text, _ in corpus}) == len(corpus)


def test_text_is_clean(corpus):
  """No slot is left unfilled, no article is wrong, sentences are sentences."""
  for text, _ in corpus:
    assert text.isascii() and not re.search(r'[{}]|  | [aA] [aeiou]', text)
    assert text[0] in '"' or text[0].isupper()
    assert text[-1] in '.!'


def test_negation_turns_a_word_round(corpus):
  """`is bad` blames and `is not bad` praises, in every review."""
  found = Counter()
  pattern = rf'(?:It|The [a-z ]+) is (not )?({_ADJECTIVE})[.!]'
  for match, label in _sentences(corpus, pattern):
    negated = match[1] is not None
    assert _sense(match[2]) ^ negated == label, match[0]
    found[negated, label] += 1
  assert len(found) == 4 and min(found.values()) >= 5


def test_the_clause_after_the_contrast_decides(corpus):
  """What stands between `although` and the comma is conceded."""
  found = Counter()
  clause = rf'(?:it|the \w+) is (not )?({_ADJECTIVE})'
  for pattern, conceded in ((rf'Although {clause}, .*', True),
                            (rf'Although .*, {clause}\.', False)):
    for match, label in _sentences(corpus, pattern):
      negated = match[1] is not None
      assert _sense(match[2]) ^ negated ^ conceded == label, match[0]
      found[conceded, label] += 1
  assert len(found) == 4 and min(found.values()) >= 5


def test_a_rejected_opinion_means_its_opposite(corpus):
  found = Counter()
  pattern = r'Everyone told me it was (\w+); they were wrong\.'
  for match, label in _sentences(corpus, pattern):
    assert _sense(match[1]) == 1 - label
    found[label] += 1
  assert min(found[0], found[1]) >= 20


def test_both_labels_use_the_same_sentiment_words(corpus):
  """Each word is in both, and good ones at most 1.7 times as often in good."""
  counts = [Counter(), Counter()]
  for text, label in corpus:
    counts[label].update(_WORD.findall(text.lower()))
  for sense in (0, 1):
    words = {word for pair in SENTIMENT.values() for word in pair[sense]
             if ' ' not in word}
    own, other = counts[sense], counts[1 - sense]
    assert max(own[word] / other[word] for word in words) < 4
    assert max(other[word] / own[word] for word in words) < 4
    ratio = sum(own[w] for w in words) / sum(other[w] for w in words)
    assert 1 < ratio < 1.7


def _accuracy_by_counts(texts, labels):
  """Logistic regression on word counts; accuracy on the last quarter."""
  bags = [Counter(_WORD.findall(text.lower())) for text in texts]
  index = {word: i for i, word in enumerate(sorted(set().union(*bags)))}
  counts = np.zeros((len(bags), len(index)))
  for row, bag in zip(counts, bags, strict=True):
    for word, count in bag.items():
      row[index[word]] = count
  counts = (counts - counts.mean(0)) / (counts.std(0) + 1e-9)
  labels = np.array(labels)
  train = np.arange(len(bags)) < 0.75 * len(bags)
  weights = np.zeros(len(index))
  for _ in range(100):
    odds = 1 / (1 + np.exp(-counts[train] @ weights))
    slope = counts[train].T @ (odds - labels[train]) / train.sum()
    weights -= 0.1 * (slope + 0.03 * weights)
  return np.mean((counts[~train] @ weights > 0) == labels[~train])


def test_word_counts_do_not_solve_it(corpus):
  """Counting helps a little, 0.67 here, and stays far from reading."""
  accuracy = _accuracy_by_counts(*zip(*corpus, strict=True))
  assert 0.55 < accuracy < 0.80


def test_word_counts_would_solve_a_corpus_with_a_label_word(corpus):
  """The learner of the test above can learn: one telling word is enough."""
  labels = [label for _, label in corpus]
  told = [f'{text} thumbs{("down", "up")[label]}' for text, label in corpus]
  assert _accuracy_by_counts(told, labels) > 0.95
