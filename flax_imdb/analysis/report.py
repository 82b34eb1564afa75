"""A page about one run or several: --mode=report.

What it says is gathered as plain data, run by run; `report.html` lays it out.
Nothing in it executes: the template escapes what it is given, figures are
drawn here, and the page asks nobody for anything.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import importlib.metadata
import importlib.util
import pathlib
import platform
import shlex
import statistics
import time
from typing import Any

import jax
import numpy as np

from flax_imdb import __version__
from flax_imdb.analysis import figures, findings, gradients, history, prose
from flax_imdb.analysis.findings import Announce, Findings, Group
from flax_imdb.config import completions, differences, nearest, packaged
from flax_imdb.errors import UserError
from flax_imdb.inference import confusion, highlight
from flax_imdb.storage import files

# The page has 3 MB at most, of which a run takes up to 50 KB in the curves, and
# a group of them 250 KB in matrix and mistakes.
_MOST_RUNS = 20
_MOST_GROUPS_IN_DETAIL = 6
_MOST_ROWS = 20  # of the classes' table, as on the screen
_PACKAGES = {'jinja2': 'jinja2', 'matplotlib': 'matplotlib',
             'sklearn': 'scikit-learn'}
_VERSIONS = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def report(workdirs: Sequence[str], announce: Announce) -> None:
  """Writes report/index.html, and its figures, into the first directory.

  And what `baseline.compare` and `gradients.write` write. `announce` is told
  what takes time, what is left out and why, and where the page is. Raises
  UserError, before anything takes time, if a package is missing, there are too
  many runs, or as `history.read`; and as `files.write`.
  """
  _check_packages()
  start, workdirs = time.perf_counter(), list(dict.fromkeys(workdirs))
  if len(workdirs) > _MOST_RUNS:
    raise UserError(f'{len(workdirs)} runs are more than the {_MOST_RUNS} that '
                    'a page shows: give fewer of them')
  names = findings.names(workdirs)
  groups = findings.grouped([
      Findings(history.read(workdir), names[workdir]) for workdir in workdirs])
  found = [one for group in groups for one in group.runs]
  for group in groups:
    for one in group.runs:
      findings.gather(one, one is group.first and (
          group.series < _MOST_GROUPS_IN_DETAIL), announce)
  folder = files.as_path(workdirs[0]) / 'report'
  measured = {one.name: one.norms for one in found if one.norms}
  if measured:
    gradients.write(folder, measured)
  drawn = _figures(groups)
  for figure in drawn.values():
    files.write(folder / f'{figure.name}.png', figure.png)
  page = _page(groups, drawn, workdirs)
  files.write(folder / 'index.html', page)
  announce(f'wrote {folder}/index.html, {len(page.encode()) / 1e6:.2f} MB, and '
           f'{len(drawn)} figures in {time.perf_counter() - start:.1f} s')


def _check_packages() -> None:
  missing = [package for module, package in _PACKAGES.items()
             if not importlib.util.find_spec(module)]
  if missing:
    raise UserError(f'--mode=report needs {", ".join(missing)}: pip install '
                    "'flax_imdb[report]'")


def _lines(groups: Sequence[Group]) -> Iterator[
    tuple[figures.Line, Findings]]:
  for group in groups:
    for one in group.runs:
      yield figures.Line(
          group.series, group.name, len(group.runs) > 1), one


def _figures(groups: Sequence[Group]) -> dict[str, figures.Figure]:
  """All figures that there is something for, by name."""
  found: dict[str, figures.Figure] = {}
  def add(name: str, title: str, about: str, caption: str,
          paint: figures.Draw) -> None:
    found[name] = figures.draw(name, title, about, caption, paint)
  lines = list(_lines(groups))
  whose = f' of {len(lines)} runs' if len(lines) > 1 else ''
  trained = [(line, one) for line, one in lines if one.history.epochs]
  if trained:
    best = [one.best_step for _, one in trained]
    stopped = [one.history.summary.stopped_epoch if one.history.summary
               else None for _, one in trained]
    for key in 'loss', 'accuracy':
      add(key, f'{key.title()} by epoch', _about_learning(key, trained),
          'Training is dashed, with dropout and while the weights still move; '
          'validation is solid.' + (' A ring is the best epoch.' if any(
              x is not None for x in best) else ''),
          figures.learning(key, [(line, one.history.epochs)
                                 for line, one in trained], best, stopped))
  for group in groups[:_MOST_GROUPS_IN_DETAIL]:
    matrix, labels = group.confusion, group.first.history.labels
    if matrix is not None and len(labels) <= figures.MOST_CLASSES:
      runs = f', {len(group.runs)} runs added up' if len(group.runs) > 1 else ''
      add(f'confusion-{group.series}' if len(groups) > 1 else 'confusion',
          f'Confusion matrix{f": {group.name}" if len(groups) > 1 else ""}',
          _about_confusion(matrix, labels),
          'A row is what reviews are, a column what they are taken for; the '
          f'stronger, the more of the row{runs}.',
          figures.confusion(matrix, labels, group.series))
  _add_curves(add, lines, whose)
  reliable = [(line, one) for line, one in lines if one.reliability]
  if reliable:
    add('reliability', 'Reliability diagram',
        f'Accuracy by confidence{whose}. ' + '; '.join(
            f'{one.name}: expected calibration error {one.ece:.4f}'
            for _, one in reliable if one.ece is not None),
        'On the dotted line a model is right as often as it says. The larger '
        'the dot, the more reviews.',
        figures.reliability([(line, one.reliability) for line, one in reliable],
                            min(len(one.history.labels) for _, one in lines)))
  tested = [(line, one.test) for line, one in lines if one.test]
  if tested:
    rows = tested[0][1].by_length
    add('length', 'Accuracy by length',
        f'From {rows[0]["accuracy"]:.3f} for up to {rows[0]["most"]:,.0f} '
        f'words to {rows[-1]["accuracy"]:.3f} for {rows[-1]["least"]:,.0f} and '
        'more.', 'Each dot is a tenth of the test reviews, by their number of '
        'words; the bar is a standard error.',
        figures.by_length([(line, test.by_length) for line, test in tested],
                          max(one.config.data.max_length
                              for _, one in lines) - 1))
  timed = [(line, one.history.rates) for line, one in lines
           if one.history.rates]
  if timed:
    add('rates', 'Reviews a second', f'Of each epoch in training{whose}.',
        'Training alone, with what was compiled on the way; where and beside '
        'what it ran is not known.', figures.rates(timed))
  for place, title in gradients.PLACES.items():
    measured = [(line, when, norms[place]) for line, one in lines
                for when, norms in one.norms.items() if place in norms]
    if measured:
      add(f'gradient-{title.replace(" ", "-")}', f'Gradient: {title}',
          f'Norm of the gradient of the logit by lag{whose}: after training '
          + '; '.join(f'{line.name} {three[1, -1]:.1e} at lag '
                      f'{three.shape[1] - 1}' for line, when, three in measured
                      if when == 'after'),
          f'With respect to the {title} so many tokens before the last: median '
          'and quartiles; before training dashed.',
          figures.gradients(measured))
  return found


def _about_learning(key: str, trained: Sequence[
    tuple[figures.Line, Findings]]) -> str:
  said = []
  for _, one in trained:
    last = one.history.epochs[-1]
    split = 'validation' if last.validation else 'train'
    said.append(f'{one.name}: {split} {key} {getattr(last, split)[key]:.4f} '
                f'after epoch {last.number}')
  return '; '.join(said) + '.'


def _about_confusion(matrix: np.ndarray, labels: Sequence[str]) -> str:
  right = int(np.trace(matrix))
  said = f'{right:,} of {int(matrix.sum()):,} reviews are on the diagonal'
  wrong = matrix - np.diag(np.diag(matrix))
  i, j = np.unravel_index(int(wrong.argmax()), wrong.shape)
  return said + (f'; most often {labels[i]} is taken for {labels[j]}, '
                 f'{wrong[i, j]:,} times.' if wrong.any() else '.')


def _add_curves(add: Callable, lines: Sequence[tuple[figures.Line, Findings]],
                whose: str) -> None:
  """ROC and precision-recall: a line a run, or of one run a line a class."""
  for name, title, caption in (
      ('roc', 'ROC curve', 'The nearer to the upper left, the better; the '
       'dotted line is chance.'),
      ('precision-recall', 'Precision and recall', 'The nearer to the upper '
       'right, the better.')):
    field = name.replace('-', '_')
    found = []
    for line, one in lines:
      of_run = getattr(one.test, field) if one.test else []
      if len(lines) == 1 and len(one.history.labels) > 2:
        found += [(figures.Line(i, curve.name), curve)
                  for i, curve in enumerate(of_run)]
      elif len(one.history.labels) == 2:
        found += [(line, curve) for curve in of_run]
    if not found:
      continue
    what = 'area under it' if name == 'roc' else 'mean precision'
    of_class = found[0][1].name
    each = ('Each class against all others. ' if len({
        curve.name for _, curve in found}) > 1 else
            f'{of_class} against the other class. ')
    add(name, title, f'{what}{whose}: ' + '; '.join(
        f'{line.name} {curve.area:.4f}' for line, curve in found),
        each + caption, figures.curves(name, found))


@dataclasses.dataclass(frozen=True)
class _Row:
  """A line of the table of scores."""
  label: str
  cells: list[str]  # one a group
  about: str  # of the first group, under a large number


def _rows(groups: Sequence[Group]) -> list[_Row]:
  """Scores of all groups; what no run has is left out."""
  def of(find: Callable[[Findings], float | None]) -> list[list[float]]:
    return [[x for one in group.runs if (x := find(one)) is not None]
            for group in groups]
  def validation(one: Findings) -> float | None:
    summary = one.history.summary
    return (summary.scores.get('validation', {}) if summary else {}).get(
        'accuracy')
  def seconds(one: Findings) -> float | None:
    return one.history.summary.seconds if one.history.summary else None
  def rate(one: Findings) -> float | None:
    rates = one.history.rates
    return statistics.mean(x for _, x in rates) if rates else None
  def parameters(one: Findings) -> float | None:
    summary = one.history.summary
    return summary.parameters if summary else one.parameters
  rows = []
  for label, about, form, find in (
      ('Test accuracy', '', '.4f', lambda one: one.scores.get('accuracy')),
      ('Test loss', 'nats', '.4f', lambda one: one.scores.get('loss')),
      ('Macro F1', 'on test', '.4f', lambda one: one.scores.get('macro_f1')),
      ('Calibration error', 'expected, on test', '.4f', lambda one: one.ece),
      ('Validation accuracy', '', '.4f', validation),
      ('Linear model', 'its test accuracy', '.4f',
       lambda one: one.linear.get('accuracy')),
      ('Parameters', '', ',.0f', parameters),
      ('Training time', 'seconds', ',.1f', seconds),
      ('Reviews a second', 'in training', ',.0f', rate)):
    values = of(find)
    if any(values):
      rows.append(_Row(label, [_mean_text(x, form) for x in values],
                       _about_mean(values[0], form, about)))
  return rows


def _mean_text(values: Sequence[float], form: str) -> str:
  """The mean, with its standard error if there are several that differ."""
  if not values:
    return '–'
  error = prose.standard_error(values)
  return f'{statistics.mean(values):{form}}' + (
      f' ± {error:{form}}' if error else '')


def _about_mean(values: Sequence[float], form: str, about: str) -> str:
  several = f'mean of {len(values)} seeds' if len(values) > 1 else ''
  return ', '.join(x for x in (about, several) if x)


def _page(groups: Sequence[Group], drawn: dict[str, figures.Figure],
          workdirs: Sequence[str]) -> str:
  """The page, from all that is known."""
  from jinja2 import Environment, StrictUndefined
  from markupsafe import Markup

  def visible(value: Any) -> Any:
    """Control characters, NUL among them, as the pictures that they have."""
    return (value.translate(highlight.PICTURES) if isinstance(value, str)
            and not isinstance(value, Markup) else value)
  environment = Environment(
      autoescape=True, undefined=StrictUndefined, trim_blocks=True,
      lstrip_blocks=True, finalize=visible)
  environment.filters['marked'] = lambda x: Markup(
      highlight.marked(x.text, x.words))  # which escapes
  environment.filters['svg'] = lambda figure: Markup(figure.svg)
  template = environment.from_string(
      pathlib.Path(__file__).with_name('report.html').read_text('utf-8'))
  return template.render(
      groups=groups, figures=drawn, rows=_rows(groups),
      title=', '.join(group.name for group in groups[:3]) + (
          ' …' if len(groups) > 3 else ''),
      words=[(group, prose.paragraph(group)) for group in groups],
      missing=_missing(groups, drawn), classes=[
          (group, _classes(group)) for group in groups[
              :_MOST_GROUPS_IN_DETAIL] if group.confusion is not None],
      baselines=[(group, _baseline(group)) for group in groups if any(
          one.linear for one in group.runs)],
      in_detail=_MOST_GROUPS_IN_DETAIL, config=_config(groups),
      environment=_environment(), commands=[
          (group, _command(group)) for group in groups],
      again=shlex.join(['python', '-m', 'flax_imdb.main', '--mode=report',
                        f'--workdir={workdirs[0]}', *workdirs[1:]]),
      version=__version__, made=time.strftime('%Y-%m-%d', time.gmtime()))


def _missing(groups: Sequence[Group],
             drawn: dict[str, figures.Figure]) -> dict[str, list[str]]:
  """Why a part is not there, of the runs that lack it: part -> sentences."""
  found: dict[str, list[str]] = {}
  several = sum(len(group.runs) for group in groups) > 1
  def add(part: str, one: Findings, why: str) -> None:
    found.setdefault(part, []).append(
        f'{one.name}: {why}' if several else why)
  for group in groups:
    for one in group.runs:
      for part, why in one.missing.items():
        # Instead of what can't be computed now there may be what it wrote.
        if not (part == 'baseline' and one.linear):
          add(part, one, why)
      if not one.history.epochs:
        add('learning', one, 'metrics.jsonl has no line: no epoch has ended.')
      if not one.history.rates:
        add('rates', one, 'No events for TensorBoard are there, which have '
            'the reviews a second.')
      if not one.history.summary:
        add('end', one, 'The run has not ended: there is no summary.json.')
      if one.test and not one.test.roc:
        add('curves', one, 'All its test reviews are of one class: there is '
            'nothing to tell apart.')
      elif one.test and 'roc' not in drawn:
        add('curves', one, 'Of more than two classes curves are drawn for one '
            'run alone: make a report of each.')
      if len(one.history.labels) > figures.MOST_CLASSES and one is group.first:
        add('confusion', one, f'Of its {len(one.history.labels):,} classes the '
            'matrix is too large to draw; the table has the worst.')
  return found


def _classes(group: Group) -> dict[str, Any]:
  """The table of classes, as `confusion.table` has it, of the summed matrix."""
  matrix, names = group.confusion, group.first.history.labels
  assert matrix is not None
  by_class = confusion.by_class(matrix)
  wrong = matrix - np.diag(np.diag(matrix))
  shown = list(range(len(names)))
  if len(names) > _MOST_ROWS:
    shown = np.argsort(by_class['f1'], kind='stable')[:_MOST_ROWS].tolist()
  return {'left_out': len(names) - len(shown), 'rows': [
      {'name': names[i], 'taken_for': (
          f'{names[int(wrong[i].argmax())]} ({wrong[i].max():,})'
          if wrong[i].any() else ''),
       'support': f'{by_class["support"][i]:,}',
       **{key: f'{by_class[key][i]:.4f}' for key in (
           'precision', 'recall', 'f1')}} for i in shown]}


def _baseline(group: Group) -> list[tuple[str, str, str]]:
  """Rows of accuracy and loss on test: of the run, and of what is simpler."""
  def row(name: str, scores: list[history.Scores]) -> tuple[str, str, str]:
    return (name, *(_mean_text([x[key] for x in scores if key in x], '.4f')
                    for key in ('accuracy', 'loss')))
  runs = group.runs
  model = group.first.baseline.get('model', 'the linear model of n-grams')
  rows = [row(group.name, [x.scores for x in runs if x.scores]),
          row(model, [x.linear for x in runs if x.linear])]
  if (matrix := group.confusion) is not None:
    share = matrix.sum(axis=1).max() / matrix.sum()
    rows.append(('always the most frequent class', f'{share:.4f}', '–'))
  return rows


def _config(groups: Sequence[Group]) -> dict[str, list[tuple[str, list[str]]]]:
  """Fields with the value of the default and of each group.

  `changed` are those that differ from it, or between groups; `all` the rest.
  """
  default = packaged('default')
  configs = [group.first.config for group in groups]
  changed = sorted({field for config in configs
                    for field in differences(default, config)} - (
                        {'seed'} if any(len(x.runs) > 1 for x in groups)
                        else set()))
  def row(field: str) -> tuple[str, list[str]]:
    return field, [str(findings.value(config, field)) for config in (
        default, *configs)]
  return {'changed': [row(field) for field in changed],
          'all': [row(field) for field in completions()
                  if field not in changed and field != 'seed']}


def _environment() -> list[tuple[str, str]]:
  device = jax.local_devices()[0]
  return [('flax_imdb', __version__), ('Python', platform.python_version()),
          *((name, importlib.metadata.version(name)) for name in _VERSIONS),
          ('system', f'{platform.system()} {platform.machine()}'),
          ('devices', f'{jax.local_device_count()} x {device.device_kind}')]


def _command(group: Group) -> dict[str, Any]:
  """What to type to train the same again, and what is the same then."""
  name, fields = nearest(group.first.config)
  seeds = [one.config.seed for one in group.runs]
  words = ['python', '-m', 'flax_imdb.main', f'--config={name}',
           f'--workdir=runs/{pathlib.PurePath(group.first.name).name}_again',
           *(f'--config.{field}={value}' for field, value in fields.items())]
  summary = group.first.history.summary
  return {'command': shlex.join(words), 'seeds': seeds,
          'sha256': summary.params_sha256 if summary else ''}
