"""Figures inside a page: their ids, their colours, and names that are text."""

from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip('matplotlib')

from flax_imdb.analysis import figures  # noqa: E402
from flax_imdb.analysis.history import Epoch  # noqa: E402

HOSTILE = ('</text><script>alert(1)</script>', '$\\frac{x^2}$ & "#1f6fb4"',
           'url(#x) שלום 映画')


def _epochs(*losses):
  return [Epoch(i, 10 * i, {'loss': 2 * x, 'accuracy': 0.5, 'n': 9.0},
                {'loss': x, 'accuracy': 0.6, 'n': 3.0})
          for i, x in enumerate(losses, 1)]


def _texts(svg):
  return [x.text for x in ElementTree.fromstring(svg).iter('text')]


def test_names_are_text_and_nothing_else():
  found = figures.draw('a', 'A', '<b>"', '', figures.confusion(
      np.arange(9).reshape(3, 3), HOSTILE, 0))
  root = ElementTree.fromstring(found.svg)  # well-formed
  assert {x.tag for x in root.iter()} <= {
      'svg', 'defs', 'clipPath', 'g', 'path', 'text', 'use', 'rect', 'tspan'}
  shown = {f'{name[:15]}…' if len(name) > 16 else name for name in HOSTILE}
  assert shown <= set(_texts(found.svg))
  assert root.get('aria-label') == 'A. <b>"'
  assert found.png[:4] == b'\x89PNG'


def test_ids_differ_between_figures_and_are_found():
  paint = figures.learning('loss', [(figures.Line(0, ''), _epochs(3, 2, 2.5))],
                           [20], [3])
  drawn = [figures.draw(name, '', '', '', paint) for name in ('a', 'b')]
  ids = []
  for figure in drawn:
    root = ElementTree.fromstring(figure.svg)
    own = [x.get('id') for x in root.iter() if x.get('id')]
    used = [x.get('href').removeprefix('#') for x in root.iter('use')]
    assert used and {*used} <= {*own}
    assert 'style' not in {x.tag for x in root.iter()}
    ids += own
  assert len(ids) == len(set(ids))


def test_no_colour_is_left_but_variables():
  found = figures.draw('a', '', '', '', figures.reliability([
      (figures.Line(i, f'run {i}', i == 3),
       [{'n': 3.0, 'confidence': 0.6, 'accuracy': 0.5},
        {'n': 4.0, 'confidence': 0.9, 'accuracy': 1.0}])
      for i in range(8)], 2))
  assert '#' not in found.svg.replace('href="#', '').replace('url(#', '')
  for i in range(len(figures.SERIES)):
    assert f'var(--series-{i})' in found.svg


def test_best_and_stopped_epochs_are_marked():
  runs = [(figures.Line(0, ''), _epochs(3, 2, 2.5))]
  def names(best, stopped):
    return set(_texts(figures.draw('a', '', '', '', figures.learning(
        'loss', runs, best, stopped)).svg))
  assert {'best epoch', 'stopped early'} <= names([20], [3])
  assert not {'best epoch', 'stopped early'} & names([None], [None])


def test_of_several_of_a_group_the_mean_is_drawn():
  from matplotlib.figure import Figure
  line = figures.Line(1, 'group', True)
  axes = Figure().add_subplot()
  figures.learning('loss', [(line, _epochs(3, 2)), (line, _epochs(1, 2, 9))],
                   [None, None], [None, None])(axes)
  named = [x for x in axes.get_lines() if x.get_label() == 'group']
  assert [list(x.get_ydata()) for x in named] == [[2, 2]]
  assert named[0].get_color() == figures.SERIES[1]


def test_a_long_run_is_no_larger_than_a_figure_shows():
  epochs = _epochs(*np.random.default_rng(0).random(20_000))
  found = figures.draw('a', '', '', '', figures.learning(
      'loss', [(figures.Line(0, ''), epochs)], [None], [None]))
  assert len(found.svg) < 40_000
