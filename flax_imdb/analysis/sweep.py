"""Values of fields compared over seeds: --mode=sweep.

Each run is an ordinary run directory below the workdir, trained by the
program's own command line. What is compared is validation, to choose by; test
is not shown, for what is chosen by a score no longer measures it: evaluate what
was chosen with --mode=eval, once.
"""

from collections.abc import Callable
import dataclasses
import itertools
import json
import math
import operator
import pathlib
import statistics
from typing import Any

from ml_collections import ConfigDict

from flax_imdb.analysis import children
from flax_imdb.checkpoint import run
from flax_imdb.config import override
from flax_imdb.environment import shares
from flax_imdb.errors import UserError
from flax_imdb.fields import check_fields
from flax_imdb.storage import files


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
  row: int  # of the table
  config: ConfigDict
  workdir: pathlib.Path


def sweep(config: ConfigDict, config_file: str, workdir: str,
          settings: list[str], seeds: int, jobs: int,
          announce: Callable[[str], None]) -> None:
  """Trains each combination with each seed, `jobs` at a time, and compares.

  A setting is 'FIELD=VALUE,VALUE'. Runs that have finished are read, others go
  on. Announces a Markdown table, see `compare`, and writes sweep.json. Raises
  UserError, before anything runs, for what does not fit, ChildError for a run
  that fails, and Preempted if a signal asked for it; all is then saved.
  """
  combinations = _combinations(config, settings)
  runs = []
  for row, (name, changed) in enumerate(combinations.items()):
    children.check_parent(changed, workdir)
    for seed in range(config.seed, config.seed + seeds):
      changed = changed.copy_and_resolve_references()
      changed.seed = seed
      check_fields(changed)
      one = _Run(row, changed, pathlib.Path(workdir, name, f'seed_{seed}'))
      run.check_directory(str(one.workdir), changed)
      runs.append(one)
  idle = shares(jobs, math.gcd(*(one.config.global_batch_size for one in runs)))
  with run.locked(workdir, announce):
    _train(runs, config_file, idle, announce)
  found = [[_result(one) for one in runs if one.row == row]
           for row in range(len(combinations))]
  rows = [{'combination': name or 'as it is', **figures, 'runs': each}
          for name, figures, each in zip(
              combinations, compare(found), found, strict=True)]
  files.write(f'{workdir}/sweep.json', json.dumps(rows, indent=2) + '\n')
  announce(_table(rows, seeds))


def _combinations(
    config: ConfigDict, settings: list[str]) -> dict[str, ConfigDict]:
  """Each combination by its name, the first value of each field first."""
  choices: dict[str, list[str]] = {}
  for setting in settings:
    field, equals, values = setting.partition('=')
    if not equals:
      raise UserError(f'--set {setting}: write it as --set FIELD=VALUE,VALUE')
    if field == 'seed':
      raise UserError('--set seed: leave it out; --seeds=N takes config.seed '
                      'and those after it')
    if field in choices:
      raise UserError(f'--set {field} is given twice: give all values in one')
    choices[field] = values.split(',')
  combinations = {}
  for values_ in itertools.product(*choices.values()):
    changed = config.copy_and_resolve_references()
    for field, text in zip(choices, values_, strict=True):
      override(changed, field, text)
    check_fields(changed)
    # A directory's name: one folder, and the same for 1e-3 and 0.001.
    name = ','.join(f'{field}={operator.attrgetter(field)(changed)}'.replace(
        '/', '%2F') for field in choices)
    if name in combinations:
      raise UserError(f'--set gives {name} twice: give each value once')
    combinations[name] = changed
  return combinations


def _train(runs: list[_Run], config_file: str, idle: list[dict[str, str]],
           announce: Callable[[str], None]) -> None:
  """Trains what has not finished, as many at a time as there are `idle`."""
  waiting = [one for one in runs
             if children.summary(one.config, one.workdir) is None]
  done = len(runs) - len(waiting)
  announce(f'{len(runs)} runs, {done} of them finished before; log.txt in the '
           'directory of each has its output')
  busy: dict[children.Child, tuple[_Run, dict[str, str]]] = {}
  with children.tended() as tended:
    while waiting or busy:
      while waiting and idle:
        one, share = waiting.pop(0), idle.pop(0)
        busy[tended.start(one.config, config_file, one.workdir, share)] = (
            one, share)
      for child in tended.ended():
        one, share = busy.pop(child)
        child.check()
        idle.append(share)
        done += 1
        announce('{done}/{n}  {workdir}  validation loss {loss:.4f}  accuracy '
                 '{accuracy:.4f}  {seconds:.1f} s'.format(
                     done=done, n=len(runs), **_result(one)))


def _result(one: _Run) -> dict[str, Any]:
  """What a run that has finished reached on validation."""
  found = children.summary(one.config, one.workdir)
  assert found
  return {'workdir': str(one.workdir), 'seed': one.config.seed,
          'accuracy': found['validation']['accuracy'],
          'loss': found['validation']['loss'], 'seconds': found['seconds']}


def compare(rows: list[list[dict[str, Any]]]) -> list[dict[str, float | None]]:
  """Statistics of each row of runs, which have the same seeds in each.

  Each run has 'accuracy', 'loss' and 'seconds'. Returns of each row the mean
  accuracy and its standard error (the sample's deviation over the root of the
  number), the mean loss, the median seconds, and p, two-sided, of a paired
  t-test of the accuracies against those of the first row; None where one seed,
  or the same difference at all of them, tells nothing of the spread.
  """
  from scipy import stats  # only now: it takes as long to import as to train

  figures = []
  for row in rows:
    accuracies, first = ([one['accuracy'] for one in each]
                         for each in (row, rows[0]))
    several = len(row) > 1
    # Rounded: equal differences of shares are unequal in their last bits.
    differ = len({round(a - b, 12) for a, b in zip(
        accuracies, first, strict=True)}) > 1
    figures.append({
        'accuracy': statistics.mean(accuracies),
        'standard_error': (statistics.stdev(accuracies) / math.sqrt(len(row))
                           if several else None),
        'loss': statistics.mean(one['loss'] for one in row),
        'p': (float(stats.ttest_rel(accuracies, first).pvalue)
              if differ else None),
        'seconds': statistics.median(one['seconds'] for one in row)})
  return figures


def _table(rows: list[dict[str, Any]], seeds: int) -> str:
  def text(value: float | None, digits: int) -> str:
    return '' if value is None else f'{value:.{digits}f}'
  return '\n'.join([
      f'Validation, means of {seeds} seeds; p: paired t-test against the first '
      'row', '',
      '| combination | accuracy | standard error | p | loss | median seconds |',
      '|---|---|---|---|---|---|',
      *(f'| {row["combination"]} | {text(row["accuracy"], 4)} | '
        f'{text(row["standard_error"], 4)} | {text(row["p"], 3)} | '
        f'{text(row["loss"], 4)} | {text(row["seconds"], 1)} |'
        for row in rows)])
