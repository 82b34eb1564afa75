"""Better values of fields, looked for by Optuna within minutes: --mode=tune.

Each trial is an ordinary run directory below the workdir, trained by the
program's own command line; the first is the config as it stands, so nothing
worse is chosen. What is compared is validation; test is not looked at. The best
of many scores is better than its config is: test says by how much, once.
"""

from collections.abc import Callable
import operator
import pathlib
import shutil
import textwrap
import time
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from flax_imdb.analysis import children
from flax_imdb.checkpoint import records, run
from flax_imdb.config import differences, packaged, read_config
from flax_imdb.errors import ChildError, TransientError, UserError
from flax_imdb.fields import check_fields
from flax_imdb.storage import files

if TYPE_CHECKING:
  import optuna

_FIRST = 'trial_0'
_MOST_BYTES = 1 << 26  # of the study's journal; a trial takes 3,000


def search_space(config: ConfigDict) -> dict[str, tuple[float, float, bool]]:
  """{field: (least, most, whether its logarithm is drawn evenly)}.

  Around the config's own values, which are in it; whole numbers where they are.
  Only what its model reads; of what 0 turns off, dropout and weight decay alone
  are tried where they are 0.
  """
  inputs = config.model.inputs.split('+')
  epochs, rate = config.num_epochs, config.learning_rate
  norm, off = config.adversarial_norm, 1 - config.ema_decay
  space = {'num_epochs': (max(1, epochs // 2), 2 * epochs, False),
           'weight_decay': (0.0, max(0.1, 2 * config.weight_decay), False)}
  if rate:
    space['learning_rate'] = (rate / 5, rate * 5, True)
  if norm:
    space['adversarial_norm'] = (norm / 3, norm * 3, True)
  if config.ema_decay:
    space['ema_decay'] = (max(0.0, 1 - 4 * off), 1 - off / 4, False)
  for name, read in {'word': True, 'embedding': True, 'pooled': True,
                     'bigram': 'bigrams' in inputs,
                     'log_odds': 'log_odds' in inputs}.items():
    if read:
      most = max(0.7, config.model[f'{name}_dropout'])
      space[f'model.{name}_dropout'] = (0.0, most, False)
  return space


def tune(config: ConfigDict, config_file: str, workdir: str, minutes: float,
         announce: Callable[[str], None]) -> None:
  """Tries configs until `minutes` of trials are over, all starts together.

  Announces each trial and the best one, and writes it as tuned.py. No trial
  begins that would take longer than what is left, by the time of the first;
  the first is always finished, any other ended when the minutes are over. Only
  the best one's checkpoints are kept. Raises UserError for what does not fit,
  ChildError for a run that fails other than by its values, and Preempted if a
  signal asked for it; all is then saved.
  """
  children.check_parent(config, workdir)
  if not config.num_epochs:
    raise UserError('config.num_epochs=0 leaves nothing to tune: give it a '
                    'value such as 2')
  # Stricter than `run.check_directory`: trials are compared with this one.
  if run.is_run(first := f'{workdir}/{_FIRST}'):
    changed = differences(read_config(f'{first}/config.json'), config)
    if fields := ', '.join(f'{field}: {there} there, {now} now'
                           for field, (there, now) in changed.items()):
      raise UserError(f'{workdir} was made with another config ({fields}): '
                      'give the same one to resume, or another --workdir')
  with run.locked(workdir, announce), files.writing(workdir):
    tuning = Tuning(config, config_file, workdir, minutes, announce)
    with children.tended() as tended:
      while tuning.most_epochs() >= tuning.space['num_epochs'][0]:
        tuning.try_one(tended)
    tuning.write_best()


class Tuning:
  """A study of Optuna in study.jsonl, and what its trials are made of."""

  def __init__(self, config: ConfigDict, config_file: str, workdir: str,
               minutes: float, announce: Callable[[str], None]):
    """Opens or begins it; what a killed process left of it is mended.

    Raises UserError if the journal is damaged, or there is no Optuna.
    """
    self.config, self.config_file = config, config_file
    self.workdir, self.minutes = pathlib.Path(workdir), minutes
    self.announce, self.space = announce, search_space(config)
    self.monitor = config.early_stopping.monitor
    self.study = _open(config, self.workdir / 'study.jsonl', self.monitor)
    self._try_again()

  def _try_again(self) -> None:
    """Lets what was running be tried again, and go on from its checkpoint.

    A trial of Optuna can't be taken up: another with its directory and its
    values stands for it. The first is made here, too.
    """
    from optuna.trial import TrialState

    waiting = {
        trial.user_attrs['directory'] for trial in self._trials('WAITING')}
    if not self.study.trials:
      own = {field: operator.attrgetter(field)(self.config)
             for field in self.space}
      self.study.enqueue_trial(own, {'directory': _FIRST})
    for trial in self._trials('RUNNING'):
      directory = trial.user_attrs.get('directory')
      if directory and directory not in waiting:
        self.study.enqueue_trial(trial.params, {'directory': directory})
      self.study.tell(trial.number, state=TrialState.FAIL)

  def _trials(self, state: str) -> list['optuna.trial.FrozenTrial']:
    return [trial for trial in self.study.trials if trial.state.name == state]

  def _first(self) -> 'optuna.trial.FrozenTrial | None':
    return next((trial for trial in self._trials('COMPLETE')
                 if trial.user_attrs['directory'] == _FIRST), None)

  def _seconds(self, directory: str | None = None) -> float:
    """What the trials have taken, all or those of one directory."""
    return sum(trial.user_attrs.get('seconds', 0.0)
               for trial in self.study.trials
               if directory in (None, trial.user_attrs.get('directory')))

  def most_epochs(self) -> int:
    """How many there is time for; any number until the first is finished."""
    most = self.space['num_epochs'][1]
    if self._first() is None:
      return int(most)
    an_epoch = self._seconds(_FIRST) / self.config.num_epochs
    return int(min(most, (60 * self.minutes - self._seconds()) / an_epoch))

  def try_one(self, tended: children.Children) -> None:
    """One trial from its values to its score; raises as `tune`."""
    from optuna.trial import TrialState

    trial = self.study.ask()
    directory = trial.user_attrs.get('directory')
    space = dict(self.space)
    if directory is None:
      trial.set_user_attr('directory', directory := f'trial_{trial.number}')
      space['num_epochs'] = (
          space['num_epochs'][0], self.most_epochs(), False)
    config, workdir = self._config(trial, space), self.workdir / directory
    if directory == _FIRST:  # not rounded
      config = self.config
    child = tended.start(config, self.config_file, workdir, {})
    self._watch(trial, config, child, tended)
    summary = children.summary(config, workdir)
    if summary and not child.process.returncode:
      score = summary['validation'][self.monitor]
      self.study.tell(trial, score)
      what = f'validation {self.monitor} {score:.4f}'
    elif trial.user_attrs.get('ended'):
      self.study.tell(trial, state=TrialState.PRUNED)
      what = trial.user_attrs['ended']
    else:
      what = self._failure(child)
      self.study.tell(trial, state=TrialState.FAIL)
    self._keep_best()
    changed = differences(self.config, config)
    self.announce('  '.join([directory, what, *(
        f'{field}={new}' for field, (_, new) in changed.items())]))

  def _failure(self, child: children.Child) -> str:
    """Why a run failed; raises it if that may not be due to its values."""
    try:
      child.check()
    except ChildError as e:
      if child.workdir.name == _FIRST or e.status == TransientError.status:
        raise
      return f'failed: {e}'
    raise AssertionError(f'{child.workdir} has no summary.json of its config')

  def _config(self, trial: 'optuna.Trial',
              space: dict[str, tuple[float, float, bool]]) -> ConfigDict:
    """The config with what the trial draws, to four digits."""
    config = self.config.copy_and_resolve_references()
    for field, (least, most, log) in space.items():
      whole = isinstance(operator.attrgetter(field)(config), int)
      value: float
      if whole:
        value = trial.suggest_int(field, int(least), int(most))
      else:
        drawn = trial.suggest_float(field, least, most, log=log)
        value = float(f'{drawn:.4g}')
        if not least <= value <= most:  # such as 1 for 0.99997
          value = drawn
      config.update_from_flattened_dict({field: value})
    check_fields(config)
    return config

  def _watch(self, trial: 'optuna.Trial', config: ConfigDict,
             child: children.Child, tended: children.Children) -> None:
    """Waits for a run's end, or ends one that is no good or too late.

    Trials are compared where they have done the same share of their epochs: the
    schedule is then as far down.
    """
    began, before, told = time.monotonic(), self._seconds(), 0
    first = child.workdir.name == _FIRST
    def end(why: str) -> None:
      if not (first or trial.user_attrs.get('ended')):
        trial.set_user_attr('ended', why)
        child.end()
    is_over = False
    try:
      while not is_over:
        # Read once more after the end: others are compared with all epochs.
        is_over = bool(tended.ended())
        for line in records.read_history(str(child.workdir))[told:]:
          told += 1
          trial.report(line['validation'][self.monitor],
                       1000 * line['epoch'] // config.num_epochs)
          trial.set_user_attr('seconds', time.monotonic() - began)
          if (not is_over and line['epoch'] < config.num_epochs
              and trial.should_prune()):
            end(f'ended after epoch {line["epoch"]}, worse than the median')
        if (not is_over
            and before + time.monotonic() - began > 60 * self.minutes):
          end(f'ended: the {self.minutes:g} minutes are over')
    finally:  # also where a signal leaves it for the next start
      trial.set_user_attr('seconds', time.monotonic() - began)

  def _keep_best(self) -> None:
    """Deletes the checkpoints of all other trials: tens of MB each."""
    best = self.study.best_trial.user_attrs['directory']
    for checkpoints in self.workdir.glob('trial_*/checkpoints'):
      if checkpoints.parent.name != best:
        shutil.rmtree(checkpoints)

  def write_best(self) -> None:
    """Writes tuned.py, and announces what is in it."""
    best, first = self.study.best_trial, self._first()
    assert first and first.value is not None and best.value is not None
    directory = best.user_attrs['directory']
    config = read_config(self.workdir / directory / 'config.json')
    finished, pruned, failed = (
        len(self._trials(state)) for state in ('COMPLETE', 'PRUNED', 'FAIL'))
    found = (f'Validation {self.monitor} {best.value:.4f} in {directory}, '
             f'{best.value - first.value:+.4f} from the {first.value:.4f} of '
             f'{self.config_file} as it was, which is {_FIRST}')
    path = self.workdir / 'tuned.py'
    files.write(path, _TUNED.format(
        path=_quoted(str(path)), config_file=_quoted(self.config_file),
        found=textwrap.fill(_quoted(
            f'{found}. By --mode=tune with Optuna, in {self.minutes:g} '
            f'minutes: {finished} trials finished, {pruned} ended early, '
            f'{failed} failed or begun again. Tried were '
            f'{", ".join(sorted(self.space))}.'), 80),
        values='\n'.join(
            f'  config.{field} = {new!r}  # {old!r} in configs/default.py'
            for field, (old, new) in differences(
                packaged('default'), config).items())))
    self.announce(f'best of {finished} finished trials: {found}')
    for field, (old, new) in differences(self.config, config).items():
      self.announce(f'  config.{field} = {new}  (before {old})')
    self.announce(f'written: {path}; train it with another seed, or evaluate '
                  f'{self.workdir / directory}')


_TUNED = '''"""{config_file}, tuned on validation.

python -m flax_imdb.main --config={path}

{found}

A score that chose a config is a little better than the config is: test, which
was not looked at, has the last word.
"""

from ml_collections import ConfigDict

from flax_imdb.config import packaged


def get_config() -> ConfigDict:
  """The best trial's fields."""
  config = packaged('default')
{values}
  return config
'''


def _quoted(text: str) -> str:
  """As it may stand in a docstring."""
  return text.replace('\\', '\\\\').replace('"', '\\"')


def _open(config: ConfigDict, path: pathlib.Path, monitor: str) -> Any:
  """The study kept in a journal, without what a killed process half wrote."""
  try:
    import optuna
    from optuna.storages.journal import JournalFileBackend
  except ImportError as e:
    raise UserError(
        "--mode=tune needs Optuna: pip install 'optuna>=4,<6'") from e

  optuna.logging.set_verbosity(optuna.logging.WARNING)
  # The run directory's lock keeps others away; the journal's own outlives its
  # process.
  path.with_name(f'{path.name}.lock').unlink(missing_ok=True)
  if path.exists():
    content = files.read_bytes(path, _MOST_BYTES)
    files.write(path, content[:content.rfind(b'\n') + 1])
  try:
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))),
        study_name='tune', load_if_exists=True,
        direction='minimize' if monitor == 'loss' else 'maximize',
        # Below three, the median is the luck of a trial.
        pruner=optuna.pruners.MedianPruner(n_min_trials=3))
    # With the same seed, a start would draw again what the one before drew.
    study.sampler = optuna.samplers.TPESampler(
        seed=(config.seed + len(study.trials)) % (1 << 32))
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(f'{path} is not a journal of Optuna ({e}): copy it again, '
                    'or give another --workdir') from e
  return study
