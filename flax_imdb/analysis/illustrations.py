"""Which figures a report has, of which runs, and what is said of each."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import numpy as np

from flax_imdb.analysis import figures, gradients, prose
from flax_imdb.analysis.findings import Findings, Group

MOST_GROUPS = 6  # that have a confusion matrix, and mistakes
_OF_EACH = ' Each line is a run, in the colour of its group.'

_Runs = list[tuple[figures.Line, Findings]]
_Figures = dict[str, figures.Figure]


def drawn(groups: Sequence[Group]) -> _Figures:
  """All figures that there is something for, by name."""
  runs = [(figures.Line(group.series, group.name if len(groups) > 1 else '',
                        len(group.runs) > 1), one)
          for group in groups for one in group.runs]
  return {figure.name: figure for figure in (
      *_learning(groups, runs), *_confusion(groups),
      *_curves(groups, runs), *_reliability(groups, runs),
      *_length(runs), *_rates(groups, runs), *_gradients(groups, runs))}


def _each(groups: Sequence[Group], form: str,
          find: Callable[[Findings], float | None]) -> str:
  """A number of the only group, or of each with its name."""
  found = [(group.name, [x for one in group.runs
                         if (x := find(one)) is not None]) for group in groups]
  return ', '.join(
      f'{prose.mean(values, form)} ({name})' if len(groups) > 1 else
      prose.mean(values, form) for name, values in found if values)


def _learning(groups: Sequence[Group], runs: _Runs) -> list[figures.Figure]:
  trained = [(line, one) for line, one in runs if one.history.epochs]
  if not trained:
    return []
  best = [one.best_step for _, one in trained]
  stopped = [one.stopped_epoch for _, one in trained]
  validates = any(one.history.epochs[-1].validation for _, one in trained)
  caption = ('Training is dashed, measured with dropout and while the weights '
             'still move') + ('; validation is solid.' if validates else '.')
  if any(step is not None for step in best):
    caption += ' A ring is the best epoch.'
  if any(epoch is not None for epoch in stopped):
    caption += ' A cross is where training was stopped early.'
  def last(key: str) -> Callable[[Findings], float | None]:
    def find(one: Findings) -> float | None:
      epochs = one.history.epochs
      return (epochs[-1].validation or epochs[-1].train)[key] if (
          epochs) else None
    return find
  of = 'validation' if validates else 'training'
  return [figures.draw(
      key, f'{key.title()} by epoch',
      f'After the last epoch {of} {key} is {_each(groups, ".4f", last(key))}.',
      caption, figures.learning(
          key, [(line, one.history.epochs) for line, one in trained], best,
          stopped)) for key in ('loss', 'accuracy')]


def _confusion(groups: Sequence[Group]) -> list[figures.Figure]:
  found = []
  for group in groups[:MOST_GROUPS]:
    matrix, labels = group.confusion, group.first.history.labels
    if matrix is None or len(labels) > figures.MOST_CLASSES:
      continue
    one = len(groups) == 1
    found.append(figures.draw(
        'confusion' if one else f'confusion-{group.series}',
        'Confusion matrix' + ('' if one else f': {group.name}'),
        _about_confusion(matrix, labels),
        'Rows are what reviews are, columns what they are taken for; the '
        'stronger a cell, the more of its row.' + (
            f' {len(group.runs)} runs are added up.' if len(group.runs) > 1
            else ''), figures.confusion(matrix, labels, group.series)))
  return found


def _about_confusion(matrix: np.ndarray, labels: Sequence[str]) -> str:
  said = (f'{int(np.trace(matrix)):,} of {int(matrix.sum()):,} reviews are '
          'recognised')
  wrong = matrix - np.diag(np.diag(matrix))
  i, j = divmod(int(wrong.argmax()), len(labels))
  return said + (f'; most often {labels[i]} is taken for {labels[j]}, '
                 f'{wrong[i, j]:,} times.' if wrong.any() else '.')


def _curves(groups: Sequence[Group], runs: _Runs) -> list[figures.Figure]:
  """ROC and precision-recall: a line a run, or of one run a line a class."""
  found = []
  for name, title, area, caption in (
      ('roc', 'ROC curve', 'The area under it is',
       'The nearer to the upper left, the better; the dotted line is chance.'),
      ('precision-recall', 'Precision and recall', 'The mean precision is',
       'The nearer to the upper right, the better.')):
    curves = [(line, one, one.curves(name)) for line, one in runs]
    lines: list[tuple[figures.Line, Any]] = []
    if len(runs) == 1 and len(runs[0][1].history.labels) > 2:
      lines = [(figures.Line(i, curve.name), curve)
               for i, curve in enumerate(curves[0][2])]
      of = ', '.join(f'{curve.area:.4f} of {curve.name}'
                     for _, curve in lines)
      caption = f'Each class against all others. {caption}'
    else:
      lines = [(line, each[0]) for line, one, each in curves
               if each and len(one.history.labels) == 2]
      of = _each(groups, '.4f', functools.partial(_area, name))
      classes = {one.history.labels for _, one, each in curves if each}
      if len(classes) == 1:
        first, second = classes.pop()
        caption = f'Of {second} against {first}. {caption}'
    if lines:
      found.append(figures.draw(
          name, title, f'{area} {of}.',
          caption + _OF_EACH * (len(runs) > 1), figures.curves(name, lines)))
  return found


def _area(name: str, one: Findings) -> float | None:
  """Of the only curve of a run of two classes."""
  curves = one.curves(name) if len(one.history.labels) == 2 else []
  return curves[0].area if curves else None


def _reliability(groups: Sequence[Group], runs: _Runs) -> list[figures.Figure]:
  reliable = [(line, one) for line, one in runs if one.reliability]
  if not reliable:
    return []
  classes = min(len(one.history.labels) for _, one in reliable)
  return [figures.draw(
      'reliability', 'Reliability diagram',
      'The expected calibration error is '
      f'{_each(groups, ".4f", lambda one: one.ece)}.',
      'On the dotted line a model is right as often as it says. The larger a '
      'dot, the more reviews.', figures.reliability(
          [(line, one.reliability) for line, one in reliable], classes))]


def _length(runs: _Runs) -> list[figures.Figure]:
  tested = [(line, one.test) for line, one in runs if one.test]
  if not tested:
    return []
  rows = tested[0][1].by_length
  most = max(one.config.data.max_length for _, one in runs) - 1
  longest = max(test.by_length[-1]['most'] for _, test in tested)
  return [figures.draw(
      'length', 'Accuracy by length',
      f'Up to {rows[0]["most"]:,.0f} words it is {rows[0]["accuracy"]:.4f}, '
      f'from {rows[-1]["least"]:,.0f} words on {rows[-1]["accuracy"]:.4f}'
      + (' in the first run.' if len(runs) > 1 else '.'),
      'A dot is a tenth of the test reviews, its bar a standard error.'
      + (f' More than {most:,} words, the dotted line, are not read.'
         if most < longest else ''),
      figures.by_length([(line, test.by_length) for line, test in tested],
                        most))]


def _rates(groups: Sequence[Group], runs: _Runs) -> list[figures.Figure]:
  timed = [(line, one.history.rates) for line, one in runs
           if one.history.rates]
  if not timed:
    return []
  of = _each(groups, ',.0f', lambda one: one.rate)
  return [figures.draw(
      'rates', 'Reviews a second in training', f'On average it is {of}.',
      'A dot is an epoch, with its validation left out; what was compiled on '
      'the way counts. What else ran on the machine is not known.',
      figures.rates(timed))]


def _gradients(groups: Sequence[Group], runs: _Runs) -> list[figures.Figure]:
  found = []
  for place, title in gradients.PLACES.items():
    measured = [(line, when, by_place[place]) for line, one in runs
                for when, by_place in one.gradients.items()
                if place in by_place]
    if not measured:
      continue
    def farthest(one: Findings, place: str = place) -> float | None:
      after = one.gradients.get('after', {})
      return float(after[place][1, -1]) if place in after else None
    lag = measured[-1][2].shape[1] - 1
    found.append(figures.draw(
        f'gradient-{title.replace(" ", "-")}', title.capitalize(),
        f'After training the median at lag {lag} is '
        f'{_each(groups, ".2g", farthest)}.',
        'Before training dashed.' + (
            _OF_EACH if len(runs) > 1 else
            ' The band has half of the reviews.'),
        figures.gradients(measured), narrow=True))
  return found
