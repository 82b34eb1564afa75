"""A page about one run or several: --mode=report.

What it says is gathered as plain data, run by run; `report.html` lays it out.
Nothing in it executes: the template escapes what it is given, figures are
drawn here, and the page asks nobody for anything.
"""

from collections.abc import Callable, Sequence
import dataclasses
import importlib.util
import pathlib
import re
import shlex
import statistics
import time
from typing import Any

from flax_imdb import __version__
from flax_imdb.analysis import (
  figures,
  findings,
  gradients,
  history,
  illustrations,
  prose,
)
from flax_imdb.analysis.findings import Announce, Findings, Group
from flax_imdb.analysis.mistakes import Mistake
from flax_imdb.config import differences, nearest, packaged
from flax_imdb.errors import UserError
from flax_imdb.fields import completions
from flax_imdb.inference import confusion, highlight
from flax_imdb.storage import files

# The page has 3 MB at most, of which a run takes up to 50 KB in the curves, and
# each of the first groups 250 KB in matrix and mistakes.
_MOST_RUNS = 20
_PACKAGES = {'jinja2': 'jinja2', 'matplotlib': 'matplotlib',
             'sklearn': 'scikit-learn'}


def report(workdirs: Sequence[str], announce: Announce) -> None:
  """Writes report/index.html, and its figures, into the first directory.

  And what `baseline.compare` and `gradients.write` write. `announce` is told
  what takes time, what is left out and why, and where the page is. Raises
  UserError, before anything takes time, if a package is missing, there are too
  many runs, or as `history.read`; and as `files.write`.
  """
  _check_packages()
  start, workdirs = time.perf_counter(), list(
      dict.fromkeys(map(files.absolute, workdirs)))
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
          group.series < illustrations.MOST_GROUPS), announce)
  folder = files.as_path(workdirs[0]) / 'report'
  measured = {one.name: one.gradients for one in found if one.gradients}
  if measured:
    gradients.write(folder, measured)
  drawn = illustrations.drawn(groups)
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


@dataclasses.dataclass(frozen=True)
class _Row:
  """A line of the table of scores, or of the only group a large number."""
  label: str
  cells: list[str]  # one a group
  about: str | None  # what stands under the number; None: only in the table


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
  def parameters(one: Findings) -> float | None:
    summary = one.history.summary
    return summary.parameters if summary else one.parameters
  rows = []
  for label, about, form, find in (
      ('Test accuracy', _beside(groups[0]), '.4f',
       lambda one: one.scores.get('accuracy')),
      ('Test loss', 'cross entropy, nats', '.4f',
       lambda one: one.scores.get('loss')),
      ('Test macro F1', None, '.4f', lambda one: one.scores.get('macro_f1')),
      ('Calibration error', 'expected, on test', '.4f', lambda one: one.ece),
      ('Validation accuracy', None, '.4f', validation),
      ('Linear model’s test accuracy', None, '.4f',
       lambda one: one.linear.get('accuracy')),
      ('Parameters', 'numbers learned', ',.0f', parameters),
      ('Training time', 'seconds', ',.1f', seconds),
      ('Reviews a second', 'in training', ',.0f', lambda one: one.rate)):
    values = of(find)
    if any(values):
      rows.append(_Row(
          label, [prose.mean(x, form) for x in values], about))
  return rows


def _beside(group: Group) -> str:
  """What a linear model has, if that is known."""
  accuracies = [one.linear['accuracy'] for one in group.runs if one.linear]
  return (f'a linear model has {statistics.mean(accuracies):.4f}'
          if accuracies else 'share recognised')


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
  def marked(mistake: Mistake) -> Markup:
    """Its text, which is escaped, with the line breaks of IMDB's as such."""
    return Markup(re.sub(r'(&lt;br */?&gt;\s*)+', '\n', highlight.marked(
        mistake.text, mistake.words)))
  environment.filters['marked'] = marked
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
              :illustrations.MOST_GROUPS] if group.confusion is not None],
      baselines=[(group, _baseline(group)) for group in groups if any(
          one.linear for one in group.runs)],
      evaluated=_evaluated(groups), in_detail=illustrations.MOST_GROUPS,
      config=_config(groups),
      environment=_environment(groups), commands=[
          (group, _command(group)) for group in groups],
      again=_typed(['python', '-m', 'flax_imdb.main', '--mode=report',
                    f'--workdir={workdirs[0]}', *workdirs[1:]]),
      version=__version__, made=time.strftime('%Y-%m-%d', time.gmtime()))


def _evaluated(groups: Sequence[Group]) -> str:
  """How long the evaluation for this page took."""
  found = [(one.name, one.test, one.test_seconds)
           for group in groups for one in group.runs]
  times = [f'{seconds:.1f} s for {test.scores["n"]:,} reviews'
           + (f' ({name})' if len(found) > 1 else '')
           for name, test, seconds in found if test and seconds]
  return ('The evaluation for this page, compilation included, took '
          f'{", ".join(times)}.' if times else '')


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
  rows = confusion.rows(matrix, names)
  return {'left_out': len(names) - len(rows), 'rows': rows}


def _baseline(group: Group) -> list[tuple[str, str, str]]:
  """Rows of accuracy and loss on test: of the run, and of what is simpler."""
  def row(name: str, scores: list[history.Scores]) -> tuple[str, str, str]:
    accuracy, loss = (prose.mean([x[key] for x in scores], '.4f')
                      for key in ('accuracy', 'loss'))
    return name, accuracy, loss
  runs = group.runs
  model = group.first.baseline.get('model', 'the linear model of n-grams')
  rows = [row(group.name, [x.scores for x in runs if x.scores]),
          row(model, [x.linear for x in runs if x.linear])]
  if (matrix := group.confusion) is not None:
    rows.append(('always the most frequent class',
                 f'{confusion.largest_share(matrix):.4f}', '–'))
  return rows


def _config(groups: Sequence[Group]) -> dict[str, list[tuple[str, list[str]]]]:
  """Fields with the value of the default and of each group.

  `changed` are those that differ from it, first those that differ between
  groups; `all` are the rest.
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
  apart = findings.differing(configs)
  changed.sort(key=lambda field: field not in apart)
  return {'changed': [row(field) for field in changed],
          'all': [row(field) for field in completions()
                  if field not in changed and field != 'seed']}


def _environment(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
  """Versions and devices, those of each group; [] if none is known.

  Runs of a group that were trained in several places have all that differs.
  """
  found = [[one.history.summary.environment for one in group.runs
            if one.history.summary] for group in groups]
  names = dict.fromkeys(name for runs in found for run in runs for name in run)
  return [(name, [', '.join(dict.fromkeys(
      run[name] for run in runs if name in run)) or '–' for runs in found])
          for name in names]


def _typed(words: Sequence[str]) -> str:
  """A command for a shell, a line for each flag."""
  return ' \\\n  '.join([shlex.join(words[:3]), *map(shlex.quote, words[3:])])


def _command(group: Group) -> dict[str, Any]:
  """What to type to train the same again, and what is the same then."""
  name, fields = nearest(group.first.config)
  seeds = [one.config.seed for one in group.runs]
  words = ['python', '-m', 'flax_imdb.main', f'--config={name}',
           f'--workdir=runs/{pathlib.PurePath(group.first.name).name}_again',
           *(f'--config.{field}={value}' for field, value in fields.items())]
  summary = group.first.history.summary
  return {'command': _typed(words), 'seeds': seeds,
          'sha256': summary.params_sha256 if summary else ''}
