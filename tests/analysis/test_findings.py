"""Runs by name and by group; what stands for what is missing."""

import pytest

from flax_imdb.analysis import findings, mistakes, prose
from flax_imdb.analysis.findings import Findings
from flax_imdb.analysis.history import History
from flax_imdb.config import packaged


def _run(name, **fields):
  config = packaged('default')
  config.update_from_flattened_dict(fields)
  return Findings(History(
      name, config, ('negative', 'positive'), [], None, []), name)


def test_names_are_as_short_as_they_can_be():
  assert findings.names(['/a/b/seed_0', '/a/c/seed_0', '/a/c/seed_1']) == {
      '/a/b/seed_0': 'b/seed_0', '/a/c/seed_0': 'c/seed_0',
      '/a/c/seed_1': 'seed_1'}
  assert findings.names(['/x', '/y/x']) == {'/x': '//x', '/y/x': 'y/x'}
  assert findings.names(['/a\x1b\n']) == {'/a\x1b\n': 'a\ufffd\ufffd'}


def test_runs_that_differ_in_the_seed_alone_are_a_group():
  groups = findings.grouped([
      _run('a'), _run('b', **{'model.width': 8}), _run('c', seed=1),
      _run('d', **{'model.width': 8, 'seed': 3}),
      _run('e', **{'model.width': 16})])
  assert [(x.name, x.series, [one.name for one in x.runs]) for x in groups] == [
      ('model.width=32', 0, ['a', 'c']), ('model.width=8', 1, ['b', 'd']),
      ('e', 2, ['e'])]
  alone, = findings.grouped([_run('a'), _run('b', seed=1)])
  assert alone.name == 'a…b'


def test_means_have_their_standard_error():
  assert prose.mean([0.5], '.4f') == '0.5000'
  assert prose.mean([0.5, 0.6, 0.7], '.4f') == '0.6000 ±\u00a00.0577'
  assert prose.mean([], '.4f') == '–'
  assert prose.standard_error([1.0]) is None
  assert prose.standard_error([1.0, 3.0]) == 1.0


def _words(text, scores):
  words, at = [], 0
  for word in text.split(' '):
    words.append([at, at + len(word), scores.get(word, 0.0)])
    at += len(word) + 1
  return words


@pytest.mark.parametrize('place', [0, 300, 399])
def test_of_a_long_text_the_part_that_counts_is_shown(place):
  words = ['word'] * 400
  words[place] = 'wonderful'
  text = ' '.join(words)
  part, kept, note = mistakes.excerpt(text, _words(text, {'wonderful': -2.0}))
  assert 'wonderful' in part and 1100 < len(part) <= 1202
  assert part.strip('…') in text
  assert part.startswith('…') == (place > 0)
  assert part.endswith('…') == (place < 399)
  assert all(part[a:b] in ('word', 'wonderful') for a, b, _ in kept)
  assert [part[a:b] for a, b, score in kept if score] == ['wonderful']
  assert f'of its {len(text):,} characters' in note


def test_of_one_long_word_some_is_shown():
  text = 'x' * 5000
  part, kept, _ = mistakes.excerpt(text, [[0, 5000, 1.0]])
  assert part == 'x' * 1200 + '…' and kept == [[0, 1200, 1.0]]
  part, kept, _ = mistakes.excerpt('.' * 5000, [])
  assert part == '.' * 1200 + '…' and kept == []
  assert mistakes.excerpt('short', [[0, 5, 1.0]]) == (
      'short', [[0, 5, 1.0]], '')
