"""A run directory: what it holds, and how it is opened again.

config.json  labels.json  data.json  tokenizer.json  ngrams.npz
pseudo_labels.npz  teacher/
checkpoints/  damaged/  metrics.jsonl
events.out.tfevents.*  calibration.json  summary.json  export/  report/

`records` has the small ones, and says what they hold.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import os
import sys

import jax
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from flax_imdb.checkpoint import records
from flax_imdb.checkpoint.manager import Checkpoints
from flax_imdb.checkpoint.seal import check_shapes
from flax_imdb.cluster import devices, processes
from flax_imdb.config import differences, read_config, write_config
from flax_imdb.data import ngrams
from flax_imdb.data.ngrams import Ngrams
from flax_imdb.data.tokenizer import load_tokenizer, save_tokenizer
from flax_imdb.errors import TransientError, UserError
from flax_imdb.fields import ONLY_SHOWN, validates
from flax_imdb.model import classifier, keras_weights
from flax_imdb.model.classifier import Params
from flax_imdb.storage import bucket, files


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished or interrupted run with what it was trained with."""
  config: ConfigDict
  tokenizer: Tokenizer
  ngrams: Ngrams
  model: classifier.SentimentClassifier
  params: Params  # to evaluate with, replicated
  step: int  # after which they were so
  temperature: float  # logits / it make probabilities; 1.0 where none is known
  labels: tuple[str, ...]  # names of the classes 0, 1, 2, ...


@contextlib.contextmanager
def locked(workdir: str, announce: Callable[[str], None]) -> Iterator[None]:
  """Makes a run directory's place and keeps other runs from writing there.

  Of several processes the first one does; eval and predict need no lock. It
  ends with the process, however that ends. `announce` is told where a file
  system has no locks. Raises UserError if the directory can't be written, and
  TransientError if it may be soon, or another process has it.
  """
  if processes.index() > 0:
    yield
    return
  _check_writable(workdir)
  path = files.as_path(workdir)
  with files.locked(path / '.lock', _lost) as why_none:
    if why_none:
      announce(f'{workdir} cannot be locked ({why_none}): see that no other '
               'process trains there')
    # None of these is being written.
    for names in '*.json*', 'ngrams.npz', 'pseudo_labels.npz':
      files.remove_leftovers(path, names)
    yield


def _lost(message: str) -> None:
  """Ends all processes: another run writes now."""
  message += ': this process stood still for too long'
  processes.end_all(message, TransientError.status)
  print(f'error: {message}', file=sys.stderr, flush=True)
  os._exit(TransientError.status)


def check_directory(workdir: str, config: ConfigDict) -> None:
  """Checks that a run with this config may begin or go on in a directory.

  Raises UserError if there is another's, or it is not shared.
  """
  if processes.index() == 0 and is_run(workdir):
    made_with = read_config(files.as_path(workdir) / 'config.json')
    fields = ', '.join(f'{k}: {a} there, {b} now' for k, (a, b) in
                       differences(made_with, config).items()
                       if k not in _may_change(config))
    if fields:
      raise UserError(f'{workdir} was made with another config ({fields}): '
                      'give the same one to resume, or another --workdir')
  processes.check_shared(workdir)


def _may_change(config: ConfigDict) -> set[str]:
  """The fields that may differ when a run resumes: all but its identity.

  They say how long it goes on and what it shows. Any other would make it a run
  whose first steps were another's: of other data, another model or other steps.
  """
  fields = {*ONLY_SHOWN, 'early_stopping.patience', 'num_epochs'}
  if config.schedule == 'cosine':  # which falls until the last epoch
    fields.remove('num_epochs')
  return fields


def evaluates_best(config: ConfigDict) -> bool:
  """Whether a run evaluates its best weights at its end, or else its last."""
  return bool(config.early_stopping.restore_best and validates(config.data))


def chosen_step(config: ConfigDict, best: int | None,
                latest: int | None) -> int | None:
  """The step that a run evaluates; the latest if it has validated none yet.

  Step 0 is validated by none, though older runs have a score of it.
  """
  return best if evaluates_best(config) and best else latest


def _check_writable(workdir: str) -> None:
  path = files.as_path(workdir)
  try:
    path.mkdir(parents=True, exist_ok=True)
    (path / '.writable').touch()
    (path / '.writable').unlink(missing_ok=True)  # another start may look, too
  except Exception as e:
    fix = 'choose another --workdir'
    if (why := bucket.failure(e) or '').startswith('Forbidden'):
      raise UserError(f'cannot write to {workdir} ({why}): {fix}') from e
    files.raise_failure(e, f'cannot write to {workdir}', fix)
    raise


def check_data(workdir: str, data_sha256: dict[str, str]) -> None:
  """Checks that a run which goes on reads the reviews that it began with.

  `data_sha256` is that of each split that trains or validates. Raises UserError
  if one is another, for what was learned and chosen is of those of then, or
  data.json, which may be a stranger's, is damaged.
  """
  if processes.index() > 0 or not is_run(workdir):
    return
  began_with = records.read_data(workdir)
  if changed := [split for split, found in data_sha256.items()
                 if began_with.get(split, found) != found]:
    raise UserError(
        f'{workdir} began with other reviews ({", ".join(changed)}): give the '
        'same ones to resume, or another --workdir')


def begin_directory(
    workdir: str, config: ConfigDict, tokenizer: Tokenizer, known: Ngrams,
    labels: Sequence[str], data_sha256: dict[str, str]) -> None:
  """Makes a run directory, or notes what `check_directory` lets change in one.

  Not before the data and what it begins with are there: a misspelt split must
  not leave a directory that then refuses the config in which it is corrected.
  `labels` are the names of the classes, `data_sha256` is as of `check_data`.
  All call this, and the first process writes. Raises as `initial_params` and
  `files.write`.
  """
  path = files.as_path(workdir)
  resumes = processes.gather(str(is_run(workdir)))[0] == str(True)
  if config.init_from and not resumes:
    if is_run(config.init_from):  # whose tokenizer is this run's, too
      _check_words(config.init_from, read_config(
          files.as_path(config.init_from) / 'config.json'), config,
                   ['punctuation'])
    initial_params(config, classifier.build_model(config, len(labels)))
  if processes.index() > 0:
    return
  if resumes:
    made_with = read_config(path / 'config.json')
    config = config.copy_and_resolve_references()
    config.debug = made_with.debug  # to look at a run once is not to change it
    if differences(made_with, config):
      write_config(config, path / 'config.json')
    return
  save_tokenizer(tokenizer, path / 'tokenizer.json')
  if config.model.inputs != 'words':
    ngrams.save(known, path / 'ngrams.npz')
  records.write_labels(workdir, labels)
  records.write_data(workdir, data_sha256)
  write_config(config, path / 'config.json')


def restore(workdir: str, which: str | None) -> Run:
  """Opens a run directory to evaluate or to predict; changes nothing in it.

  `which` is 'best', 'latest' or a step's number; None for what the run itself
  evaluated. Of several processes, which all call this, the first chooses, for
  a run beside them may save meanwhile. Raises UserError if there is no run, or
  no such step, a file is damaged or it predicts words, and as
  `Checkpoints.restore_chosen`.
  """
  found = _restore(workdir, which)
  if found.config.objective == 'language_model':
    raise UserError(
        f'{workdir} predicts words, not labels: it is to begin another run '
        f'with, --config.init_from={workdir}')
  return found


def _restore(workdir: str, which: str | None) -> Run:
  """As `restore`, whatever the run predicts."""
  if not is_run(workdir):
    raise UserError(
        f'{workdir} is no run directory, steps found: []: train one with '
        f'python -m flax_imdb.main --workdir={workdir}, or give another')
  path = files.as_path(workdir)
  config = read_config(path / 'config.json')
  labels = records.read_labels(workdir)
  try:
    model = classifier.build_model(config, len(labels))
  except UserError as e:
    raise UserError(f'{path}/config.json: {e}') from e
  with Checkpoints(workdir, read_only=True) as checkpoints:
    def choose() -> int:
      steps = checkpoints.steps()
      best, latest = checkpoints.best(), checkpoints.latest()
      if which is None:
        step = chosen_step(config, best, latest)
      elif which in ('best', 'latest'):
        step = best if which == 'best' else latest
      else:
        step = int(which) if which.isascii() and which.isdigit() else None
      if step is None or step not in steps:
        name = 'latest' if which is None else which
        raise UserError(
            f'{workdir} has no {name} step, steps found: {steps}: '
            + ('choose one with --step' if steps else 'train first'))
      return step
    step, params = restore_eval_params(checkpoints, choose, config, model)
  tokenizer = load_tokenizer(path / 'tokenizer.json', config.data.vocab_size)
  known = ngrams.load(path / 'ngrams.npz', config, len(labels))
  temperature = records.read_temperature(path / 'calibration.json', step)
  return Run(config, tokenizer, known, model, params, step, temperature, labels)


def restore_eval_params(
    checkpoints: Checkpoints, choose: Callable[[], int], config: ConfigDict,
    model: classifier.SentimentClassifier) -> tuple[int, Params]:
  """The step chosen, and its parameters to evaluate with: averaged, if any.

  Float32, replicated; see `Checkpoints.restore_chosen`, which also raises.
  """
  shapes = classifier.param_shapes(model)
  step, items = checkpoints.restore_chosen(choose, {'model': {
      'params': shapes,
      'ema': classifier.averaged(shapes) if config.ema_decay else {}}})
  return step, items['model']['params'] | items['model']['ema']


def initial_params(
    config: ConfigDict, model: classifier.SentimentClassifier) -> Params:
  """The parameters that training begins with: drawn, or config.init_from.

  From a run that predicts words where this one predicts labels it takes what
  both have, the embedding and the recurrent layers; the rest is drawn. NumPy
  arrays, float32. Raises UserError if that can't be read or is another's.
  """
  source, shapes = config.init_from, classifier.param_shapes(model)
  def drawn() -> Params:
    init_key, _ = classifier.seed_keys(config.seed)
    return jax.device_get(
        jax.jit(lambda: classifier.init_params(model, init_key))())
  if not source:
    return drawn()
  if not is_run(source):
    params = keras_weights.read_weights(source)
  else:
    found = _restore(source, None)
    params = devices.to_host(found.params)
    if found.config.objective != config.objective:
      _check_words(source, found.config, config,
                   ['name', 'punctuation', 'vocab_size'])
      params = {name: x for name, x in params.items() if name in shapes}
      check_shapes(source, {name: shapes[name] for name in params}, params)
      return drawn() | params
  check_shapes(source, shapes, params)
  return params


def _check_words(source: str, made_with: ConfigDict, config: ConfigDict,
                 fields: Sequence[str]) -> None:
  """Raises UserError if a run reads other words, by these fields of data."""
  for field in fields:
    there, here = made_with.data[field], config.data[field]
    if there != here:
      raise UserError(
          f'{source} was made with config.data.{field}={there}, this run has '
          f'{here}: words would not mean the same; give '
          f'--config.data.{field}={there}')


def is_pretraining(workdir: str) -> bool:
  """Whether a run directory's model predicts words; raises as `read_config`."""
  made_with = read_config(files.as_path(workdir) / 'config.json')
  return made_with.objective == 'language_model'


def is_run(path: str) -> bool:
  """Whether this is a run directory; raises as `files.exists`."""
  return files.exists(files.as_path(path) / 'config.json')
