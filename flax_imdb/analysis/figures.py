"""The figures of a report: drawn once, as a PNG and as SVG inside the page.

Each is narrow enough for a telephone, and a page puts two side by side where
there is room. In the SVG no colour is fixed: lines and text take the page's, by
the CSS variables of `VARIABLES`, and text its font, so that a figure follows
light and dark, and can be searched. A PNG is drawn in the light ones, on white.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import io
from typing import TYPE_CHECKING, Any
import warnings
from xml.etree import ElementTree

import numpy as np

from flax_imdb.analysis.assessment import Curve
from flax_imdb.analysis.history import Epoch

if TYPE_CHECKING:
  from matplotlib.axes import Axes

# Of groups of runs, one after the other: apart for most who see few colours,
# and at least 3 : 1 against white. The page has others for the dark.
SERIES = ('#1f6fb4', '#b8500a', '#1a7f4b', '#7a4fb5', '#b3261e', '#0e7c86')
_TEXT, _FAINT, _GRID = '#1b1e23', '#5b626d', '#dfe3e8'
VARIABLES = {_TEXT: '--text', _FAINT: '--faint', _GRID: '--grid',
             **{x: f'--series-{i}' for i, x in enumerate(SERIES)}}
_SIZE = (4.4, 3.1)  # inches of 72 points
_MOST_POINTS = 400  # of a line: more are not seen
_MOST_LAGS = 100  # the same of a band
_MOST_MARKED = 24  # points of a line, of which each has a dot
_MOST_CELLS = 12  # classes of a matrix with numbers in it
MOST_CLASSES = 40  # of a matrix at all
_STYLE: dict[Any, Any] = {
    'svg.fonttype': 'none', 'text.parse_math': False, 'font.size': 10,
    'font.family': 'sans-serif',
    'figure.constrained_layout.use': True, 'axes.spines.top': False,
    'axes.spines.right': False, 'axes.edgecolor': _FAINT,
    'axes.labelcolor': _TEXT, 'axes.grid': True, 'axes.axisbelow': True,
    'grid.color': _GRID, 'grid.linewidth': 0.8, 'text.color': _TEXT,
    'xtick.color': _FAINT, 'ytick.color': _FAINT, 'xtick.labelcolor': _TEXT,
    'ytick.labelcolor': _TEXT, 'legend.frameon': False, 'legend.fontsize': 9,
    'legend.handlelength': 2.8, 'lines.linewidth': 1.8, 'lines.markersize': 4.5}

Draw = Callable[['Axes'], None]


@dataclasses.dataclass(frozen=True)
class Line:
  """A run in a figure of several: whose colour and name it has."""
  series: int  # of `SERIES`, which begin anew after the last
  name: str  # of the group, which the legend has once; '' of the only one
  faint: bool = False  # one of several of its group

  @property
  def style(self) -> dict[str, Any]:
    """How matplotlib draws it."""
    turn, place = divmod(self.series, len(SERIES))
    return {'color': SERIES[place], 'alpha': 0.55 if self.faint else 1.0,
            'linewidth': 1.1 if self.faint else 1.8,
            'linestyle': ('-', '--', ':', '-.')[turn % 4]}


@dataclasses.dataclass(frozen=True)
class Figure:
  """What is drawn, in both forms."""
  name: str  # of its file, without .png
  title: str
  about: str  # in words, for those who do not see it
  caption: str
  svg: str  # an element for HTML
  png: bytes


def draw(name: str, title: str, about: str, caption: str, paint: Draw,
         narrow: bool = False) -> Figure:
  """Draws what `paint` puts on axes, in the style of all figures.

  A `narrow` one is for a page that puts three side by side.
  """
  import matplotlib
  from matplotlib.figure import Figure as Canvas

  with matplotlib.rc_context(_STYLE | {'svg.hashsalt': name}):
    canvas = Canvas(figsize=(3.3, 2.9) if narrow else _SIZE)
    paint(canvas.add_subplot())
    svg, png = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
      # A name in a script that matplotlib's font lacks is boxes in the PNG; the
      # page has the reader's fonts.
      warnings.filterwarnings('ignore', message='Glyph .* missing from')
      canvas.savefig(png, format='png', dpi=200)
      canvas.savefig(svg, format='svg', transparent=True,
                     metadata={'Date': None})
  return Figure(name, title, about, caption,
                _inline(svg.getvalue(), name, f'{title}. {about}'),
                png.getvalue())


def _inline(svg: bytes, name: str, about: str) -> str:
  """An SVG file as an element of a page that holds others.

  Its ids begin with the name, its colours are `VARIABLES`, and its style sheet,
  which would be the whole page's, is left to the page.
  """
  root = ElementTree.fromstring(svg)
  for parent in root.iter():
    for child in list(parent):
      if child.tag.endswith(('}metadata', '}style')):
        parent.remove(child)
  for element in root.iter():
    element.tag = element.tag.partition('}')[2]
    attributes = dict(element.attrib)
    element.attrib.clear()
    for key, value in attributes.items():
      key = key.rpartition('}')[2]  # SVG 2 has href without xlink
      if key == 'id':
        value = f'{name}-{value}'
      elif key == 'href':
        value = f'#{name}-{value.removeprefix("#")}'
      else:
        value = value.replace('url(#', f'url(#{name}-')
        for colour, variable in VARIABLES.items():
          value = value.replace(colour, f'var({variable})')
      element.set(key, value)
  for key in ('width', 'height', 'version'):
    root.attrib.pop(key, None)
  root.set('role', 'img')
  root.set('aria-label', about)
  return ElementTree.tostring(root, encoding='unicode')


def _few(count: int, most: int = _MOST_POINTS) -> np.ndarray:
  """Places of at most `most` of so many points, the first and the last, too."""
  return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def _legend(axes: 'Axes', **where: Any) -> None:
  """Names what is drawn, each once, if it has a name."""
  handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
  if handles:
    legend = axes.legend(handles.values(), handles.keys(), **where)
    for handle in legend.legend_handles:
      if handle is not None:
        handle.set_alpha(1)


def learning(key: str, runs: Sequence[tuple[Line, list[Epoch]]],
             best: Sequence[int | None], stopped: Sequence[int | None]) -> Draw:
  """Loss or accuracy by epoch: training dashed, validation solid.

  Of each run, `best` is the step of the best epoch, a ring, and `stopped` the
  epoch after which it was stopped early, a cross. Of several of a group there
  is the mean, too, as far as all have come.
  """
  def paint(axes: 'Axes') -> None:
    from matplotlib.ticker import MaxNLocator

    named = 'validation' if any(
        epoch.validation for _, epochs in runs for epoch in epochs) else 'train'
    for (line, epochs), step, end in zip(runs, best, stopped, strict=True):
      shown = [epochs[i] for i in _few(len(epochs))]
      mark = 'o' if len(epochs) <= _MOST_MARKED and not line.faint else ''
      for split, shown_as, dashes in (
          ('train', 'training', (0, (4, 2))),
          ('validation', 'validation', '-')):
        scores = [(epoch.number, getattr(epoch, split)[key])
                  for epoch in shown if getattr(epoch, split)]
        if scores:
          axes.plot(*zip(*scores, strict=True), marker=mark,
                    label='' if line.faint else shown_as if not line.name else
                    line.name if split == named else '',
                    **line.style | {'linestyle': dashes})
      for epoch in epochs:
        if epoch.step == step and epoch.validation:
          axes.plot([epoch.number], [epoch.validation[key]], 'o',
                    markersize=11, markerfacecolor='none', markeredgewidth=1.5,
                    markeredgecolor=line.style['color'],
                    label='' if line.name else 'best epoch')
      if end is not None:
        of_end = [epoch for epoch in epochs if epoch.number == end]
        axes.plot([epoch.number for epoch in of_end],
                  [(epoch.validation or epoch.train)[key] for epoch in of_end],
                  'x', markersize=10, markeredgewidth=1.8,
                  color=line.style['color'],
                  label='' if line.name else 'stopped early')
    for line, means in _means(key, runs):
      axes.plot(range(1, len(means) + 1), means, label=line.name or (
          'mean of validation'), **line.style)
    axes.set(xlabel='epoch', ylabel=(
        'loss, nats' if key == 'loss' else key))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.margins(x=0.06, y=0.1)
    _legend(axes, loc='best')
  return paint


def _means(key: str, runs: Sequence[tuple[Line, list[Epoch]]]) -> Iterator[
    tuple[Line, list[float]]]:
  """Of each group of several runs the mean validation score by epoch."""
  for line in dict.fromkeys(line for line, _ in runs if line.faint):
    scores = [[epoch.validation[key] for epoch in epochs if epoch.validation]
              for other, epochs in runs if other == line]
    yield dataclasses.replace(line, faint=False), [
        sum(each) / len(each) for each in zip(*scores, strict=False)][
            :_MOST_POINTS]


def curves(kind: str, runs: Sequence[tuple[Line, Curve]]) -> Draw:
  """ROC curves, or of 'precision' by recall; a line each."""
  def paint(axes: 'Axes') -> None:
    for line, curve in runs:
      axes.plot(curve.x, curve.y, label=line.name, **line.style)
    if kind == 'roc':
      axes.plot([0, 1], [0, 1], color=_FAINT, linestyle=':', linewidth=1.2)
      axes.set(xlabel='false positives, share of the negative',
               ylabel='true positives, share')
    else:
      axes.set(xlabel='recall', ylabel='precision')
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    _legend(axes, loc='lower right' if kind == 'roc' else 'lower left')
  return paint


def reliability(
    runs: Sequence[tuple[Line, list[dict[str, float]]]],
    class_count: int) -> Draw:
  """Accuracy by confidence; the larger a dot, the more reviews."""
  def paint(axes: 'Axes') -> None:
    least = 1 / class_count
    axes.plot([least, 1], [least, 1], color=_FAINT, linestyle=':',
              linewidth=1.2)
    for line, rows in runs:
      x, y = ([row[key] for row in rows] for key in ('confidence', 'accuracy'))
      n = np.array([row['n'] for row in rows])
      axes.plot(x, y, label=line.name, **line.style)
      axes.scatter(x, y, s=12 + 130 * n / n.sum(), color=line.style['color'],
                   alpha=line.style['alpha'], linewidths=0)
    axes.set(xlabel='confidence: the probability of what is predicted',
             ylabel='accuracy', xlim=(least - 0.02, 1.02), ylim=(None, 1.02))
    _legend(axes, loc='upper left')
  return paint


def by_length(runs: Sequence[tuple[Line, list[dict[str, float]]]],
              most_read: int) -> Draw:
  """Accuracy by words of a review, with its standard error.

  A line stands at `most_read` words, if some reviews have more.
  """
  def paint(axes: 'Axes') -> None:
    longest = 0.0
    for line, rows in runs:
      x, y, error = ([row[key] for row in rows] for key in (
          'middle', 'accuracy', 'error'))
      longest = max(longest, rows[-1]['most'])
      axes.errorbar(x, y, None if line.faint else error, marker='o',
                    capsize=0, label=line.name, **line.style)
    if most_read < longest:
      axes.axvline(most_read, color=_FAINT, linestyle=':', linewidth=1.2)
    axes.set(xlabel='words in the review', ylabel='accuracy', xscale='log')
    _plain_ticks(axes)
    axes.margins(y=0.1)
    _legend(axes, loc='best')
  return paint


def _plain_ticks(axes: 'Axes') -> None:
  """Whole numbers along a logarithmic axis, a few of them."""
  from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

  least, most = axes.get_xlim()
  wide = most / max(least, 1e-9) > 30
  axes.xaxis.set_major_locator(
      LogLocator(subs=(1,) if wide else (1, 2, 5)))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:,.0f}'))
  axes.xaxis.set_minor_formatter(NullFormatter())


def confusion(matrix: np.ndarray, names: Sequence[str], series: int) -> Draw:
  """A confusion matrix: the colour of a cell is its share of the row."""
  def paint(axes: 'Axes') -> None:
    from matplotlib.patches import Rectangle

    count = len(names)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    for i in range(count):
      for j in range(count):
        # As strong as text on it can still be read, in light and in dark.
        axes.add_patch(Rectangle(
            (j, i), 1, 1, facecolor=SERIES[series % len(SERIES)],
            alpha=0.04 + 0.4 * float(shares[i, j]), linewidth=0))
        if count <= _MOST_CELLS:
          axes.text(j + 0.5, i + 0.5, f'{matrix[i, j]:,}' + (
              f'\n{100 * shares[i, j]:.1f} %' if count <= 4 else ''),
                    ha='center', va='center', fontsize=11 - count / 2,
                    linespacing=1.4)
    places = np.arange(count) + 0.5
    size = 10 if count <= 4 else 8 if count <= _MOST_CELLS else 5
    shown = [name if len(name) <= 16 else f'{name[:15]}…' for name in names]
    axes.set_xticks(places, shown, fontsize=size,
                    rotation=0 if count <= 3 else 90)
    axes.set_yticks(places, shown, fontsize=size,
                    rotation=90 if count <= 3 else 0, va='center')
    axes.set(xlim=(0, count), ylim=(count, 0), xlabel='predicted', ylabel='is')
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
      spine.set_visible(False)
  return paint


def rates(runs: Sequence[tuple[Line, list[tuple[int, float]]]]) -> Draw:
  """Reviews a second, by the step at which an epoch ended."""
  def paint(axes: 'Axes') -> None:
    for line, points in runs:
      few = [points[i] for i in _few(len(points))]
      axes.plot(*zip(*few, strict=True), label=line.name, marker=(
          'o' if len(points) <= _MOST_MARKED and not line.faint else ''),
                **line.style)
    axes.set(xlabel='step', ylabel='reviews a second', **{
        f'{axis}lim': (0, 1.06 * max(point[i] for _, points in runs
                                     for point in points))
        for i, axis in enumerate('xy')})
    axes.yaxis.set_major_formatter('{x:,.0f}')
    axes.xaxis.set_major_formatter('{x:,.0f}')
    axes.locator_params(axis='x', nbins=5)
    _legend(axes, loc='best')
  return paint


def gradients(runs: Sequence[tuple[Line, str, np.ndarray]]) -> Draw:
  """Norms by lag: dashed before training, solid after.

  Of each run 'before' or 'after' and float64 [3, lag], the lower quartile, the
  median and the upper one, in a band.
  """
  def paint(axes: 'Axes') -> None:
    from matplotlib.ticker import LogFormatter

    for line, when, quartiles in runs:
      lags = _few(quartiles.shape[1], _MOST_LAGS)
      # A log axis has no place for the zeros that float32 makes below 1e-45.
      low, median, high = np.where(
          quartiles > 0, quartiles, np.nan)[:, lags]
      style = line.style | {'linestyle': '--' if when == 'before' else '-'}
      axes.plot(lags, median, label=(
          f'{when} training' if not line.name else
          line.name if when == 'after' else ''),
                **style)
      if not line.faint:
        axes.fill_between(lags, low, high, color=style['color'], alpha=0.14,
                          linewidth=0)
    axes.set(xlabel='lag from the last token', ylabel='norm of the gradient',
             yscale='log')
    # Not the usual ones, which are mathematics, and need matplotlib's fonts.
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    _legend(axes, loc='best')
  return paint
