"""Reviews that share rare names validate together, the same in each process."""

import subprocess
import sys

import numpy as np

from flax_imdb.data import groups

_CODE = '''
import sys
from flax_imdb.data import groups
print(groups.group([line.rstrip() for line in sys.stdin]).tolist())
'''


def _texts(films=12, reviews=9, seed=0):
  """Reviews of films, in a random order: texts, and the film of each."""
  rng = np.random.default_rng(seed)
  def name():
    return ''.join(rng.choice([*'abcdefghij'], 7)).capitalize()
  casts = [[f'{name()} {name()}' for _ in range(4)] for _ in range(films)]
  film = rng.permutation(np.repeat(np.arange(films), reviews))
  return ['This film was made by people who like films, and with '
          + ' and '.join(rng.permutation(casts[i])[:3]) + ' in it.'
          for i in film], film


def test_reviews_that_share_names_are_one_group():
  texts, film = _texts()
  found = groups.group(texts)
  for i in range(12):
    assert len(set(found[film == i])) == 1
  assert len(set(found)) == 12


def test_a_name_of_many_reviews_joins_none():
  texts = [f'The film was Good, said {"Abcdefghij"[i % 10]}{"xyzuvw"[i // 10]}'
           f'{"klm"[i % 3]}o.' for i in range(60)]
  assert len(set(groups.group(texts))) == 60
  assert len(set(groups.group(texts[:40]))) == 1  # as rare as a film's


def test_a_group_has_no_more_reviews_than_a_film_may_have(monkeypatch):
  monkeypatch.setattr(groups, '_MOST_REVIEWS', 20)
  texts, _ = _texts(films=3, reviews=18)
  shared = [f'{text} It has Bela Lugosi, too.' if i % 4 else text
            for i, text in enumerate(texts)]
  assert np.bincount(groups.group(shared)).max() <= 20


def test_whole_groups_validate_but_for_the_last():
  texts, film = _texts()
  validates = groups.validation_rows(texts, 0.3)
  assert validates.sum() == round(0.3 * len(texts))
  shares = [validates[film == i].mean() for i in range(12)]
  assert sum(0 < share < 1 for share in shares) <= 1
  assert {*np.round(shares, 6)} >= {0.0, 1.0}
  np.testing.assert_array_equal(validates, groups.validation_rows(texts, 0.3))


def test_texts_without_names_are_groups_of_their_own():
  np.testing.assert_array_equal(groups.group(['bad', '', 'so so']), range(3))
  assert groups.validation_rows(['a', 'b', 'c', 'd'], 0.25).sum() == 1


def test_the_groups_are_the_same_in_each_process():
  texts, _ = _texts()
  printed = {subprocess.run(
      [sys.executable, '-c', _CODE], input='\n'.join(texts), text=True,
      capture_output=True, check=True, env={'PYTHONHASHSEED': str(seed)}).stdout
             for seed in range(3)}
  assert printed == {f'{groups.group(texts).tolist()}\n'}
