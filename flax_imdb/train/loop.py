"""The training run: from a config and a run directory to a summary."""

from collections.abc import Callable, Iterator
import dataclasses
import time
from typing import Any

from ml_collections import ConfigDict
import numpy as np
from tokenizers import Tokenizer

from flax_imdb.checkpoint import run
from flax_imdb.checkpoint.manager import Checkpoints, Progress
from flax_imdb.cluster import devices, preemption, processes
from flax_imdb.data import ngrams, pseudo_labels, sources
from flax_imdb.data.batches import TrainBatches
from flax_imdb.data.ngrams import Ngrams
from flax_imdb.data.reading import Reading, Share
from flax_imdb.data.reviews import (
  LABELS,
  Reviews,
  data_sha256,
  joined,
  load_splits,
  training_tokenizer,
)
from flax_imdb.data.tokenizer import load_tokenizer
from flax_imdb.inference import calibration, evaluate, predict
from flax_imdb.model import classifier
from flax_imdb.storage import files
from flax_imdb.terminal import CompileClock, Rate, Terminal
from flax_imdb.train import language_model, stopping
from flax_imdb.train.metrics import Metrics
from flax_imdb.train.optimizer import build_optimizer, learning_rate_schedule
from flax_imdb.train.step import (
  TrainState,
  init_state,
  make_train_step,
  state_shapes,
)
from flax_imdb.train.writers import Writers

# The host looks at the metrics and the votes each so many steps, and then at
# those of the look before: an accelerator's queue is bounded, never runs dry.
WAIT_EVERY = 8


def train(config: ConfigDict, workdir: str,
          terminal: Terminal) -> dict[str, Any]:
  """Trains, or goes on where `workdir` holds a run, and evaluates the best.

  Of several processes all do the same, and the first one writes. `config` is
  one that `check_fields` has seen. Returns what summary.json holds. Raises
  UserError if data, devices or run directory don't fit, TransientError if they
  may soon, as where another process trains there, FloatingPointError if the
  loss is no longer finite, of which nothing is saved, and Preempted if a signal
  asked for it, when the last step is saved.
  """
  devices.check_batch_size(config.global_batch_size)
  model = classifier.build_model(config)
  with run.locked(workdir, terminal.announce):
    task = _load(config, workdir, terminal, model)
    with (preemption.deferred(WAIT_EVERY) as stop,
          Checkpoints(workdir) as checkpoints):
      training = _begin_or_resume(task, checkpoints)
      _run_epochs(task, training, stop)
      return _finish(task, training, stop)


@dataclasses.dataclass(frozen=True)
class _Task:
  """What stays as it is while a run trains."""
  config: ConfigDict
  workdir: str
  terminal: Terminal
  tokenizer: Tokenizer
  splits: dict[str, Reviews]
  batches: TrainBatches
  model: classifier.SentimentClassifier
  optimizer: Any
  train_step: Callable[[TrainState, dict], tuple[TrainState, Metrics]]
  outputs: evaluate.Logits  # or what `language_model.make_sums` returns
  compiled: CompileClock

  @property
  def steps_total(self) -> int:
    return self.config.num_epochs * self.batches.steps_per_epoch


@dataclasses.dataclass
class _Training:
  """How far a run has come, and where that is kept."""
  state: TrainState  # on the devices
  step: int  # steps done, without asking the devices
  progress: Progress
  began_at: int  # steps that were done when this process began
  checkpoints: Checkpoints

  def save(self, score: float | None) -> None:
    processes.report_alive('save')
    self.checkpoints.save(
        self.step, self.state.to_items(), self.progress, score)


def _load(config: ConfigDict, workdir: str, terminal: Terminal,
          model: classifier.SentimentClassifier) -> _Task:
  """Reads all that training needs, then makes the run directory.

  What can be refused is, before anything is left there: a corrected config may
  begin in it. So the test split is read now, too.
  """
  processes.report_alive('load')
  run.check_directory(workdir, config)
  tokenizer = _tokenizer(config, workdir, terminal)
  wanted = {'train': True, 'validation': config.data.validation_fraction,
            'test': config.objective == 'label',
            'unlabelled': config.data.unlabelled_split}
  splits = load_splits(config, tokenizer, terminal.announce, [
      split for split in wanted if wanted[split]])
  train_reviews = splits['train']
  if unlabelled := splits.pop('unlabelled', None):
    train_reviews = joined(
        train_reviews, _pseudo_labelled(config, workdir, unlabelled))
  processes.check_same('config', lambda: config.to_json(sort_keys=True))
  processes.check_same('tokenizer or data', lambda: ' '.join(
      data_sha256(tokenizer, split)
      for split in (train_reviews, *splits.values())))
  known, train_reviews = _ngrams(config, workdir, terminal, train_reviews)
  run.begin_directory(workdir, config, tokenizer, known)
  batches = TrainBatches(
      train_reviews, config.seed, config.global_batch_size,
      Reading.of(config.data), Share(*devices.share()),
      config.min_steps_per_epoch)
  optimizer = build_optimizer(config, batches.steps_per_epoch)
  compiled = CompileClock(lambda: processes.report_alive('compile'))
  outputs = (
      language_model.make_sums(config, model, compiled)
      if config.objective == 'language_model' else
      evaluate.make_logits(config, model, known, compiled))
  return _Task(
      config, workdir, terminal, tokenizer, splits, batches, model, optimizer,
      compiled.wrap(make_train_step(
          config, model, optimizer, batches.steps_per_epoch)),
      outputs, compiled)


def _pseudo_labelled(
    config: ConfigDict, workdir: str, unlabelled: Reviews) -> Reviews:
  """With what the teachers said, if there are any; see `selftrain`."""
  if not config.self_training_rounds:
    return unlabelled
  found = pseudo_labels.load(
      files.as_path(workdir) / 'pseudo_labels.npz',
      pseudo_labels.source(config), len(unlabelled))
  return dataclasses.replace(unlabelled, labels=found.probabilities)


def _tokenizer(
    config: ConfigDict, workdir: str, terminal: Terminal) -> Tokenizer:
  """The run's own tokenizer; fitted if the run is yet to begin."""
  if source := _begun(config, workdir):
    return load_tokenizer(f'{source}/tokenizer.json', config.data.vocab_size)
  return training_tokenizer(config, terminal.announce)


def _begun(config: ConfigDict, workdir: str) -> str | None:
  """The run whose ids mean what this one's do: itself, or config.init_from."""
  return next((source for source in (workdir, config.init_from)
               if source and run.is_run(source)), None)


def _ngrams(config: ConfigDict, workdir: str, terminal: Terminal,
            reviews: Reviews) -> tuple[Ngrams, Reviews]:
  """As `ngrams.fit`; pairs are the run's own, as words are in `_tokenizer`."""
  if config.model.inputs == 'words':
    return ngrams.fit(config, reviews)
  start, pairs = time.perf_counter(), None
  source = _begun(config, workdir)
  if source and not run.is_pretraining(source):  # which knows no pairs
    pairs = ngrams.load(f'{source}/ngrams.npz', config).pairs
  known, annotated = ngrams.fit(config, reviews, pairs)
  terminal.announce(
      f'counted n-grams in {time.perf_counter() - start:.1f} s: '
      f'{len(known.pairs):,} pairs to embed, {len(known.keys):,} with log-odds')
  return known, annotated


def _begin_or_resume(task: _Task, checkpoints: Checkpoints) -> _Training:
  """The newest state that is whole, else the initial one."""
  config, announce = task.config, task.terminal.announce
  processes.report_alive('restore')
  shapes = state_shapes(config, task.model, task.optimizer)
  found = checkpoints.restore_newest(shapes.to_items(), announce)
  if found is None:
    state = devices.replicate(init_state(config, task.model, task.optimizer))
    if config.init_from:
      params = run.initial_params(config, task.model)
      processes.check_same(
          'config.init_from', lambda: classifier.params_sha256(params))
      # Put there twice: the step donates both, and no buffer goes twice.
      state = state.replace(
          params=devices.replicate(params),
          ema=devices.replicate(
              classifier.averaged(params) if state.ema else {}))
    training = _Training(state, 0, Progress(), 0, checkpoints)
  else:
    items, progress = found
    progress.stopped = stopping.is_over(config.early_stopping, progress)
    state = TrainState.from_items(**items)
    step = int(devices.to_host(state.step))
    training = _Training(state, step, progress, step, checkpoints)
  announce(classifier.parameter_table(training.state.params))
  if found is None:
    passes = task.batches.passes_per_epoch
    announce(f'{task.steps_total:,} steps, {task.batches.steps_per_epoch:,} an '
             f'epoch of {f"{passes} passes over " if passes > 1 else ""}'
             f'{len(task.batches.reviews):,} reviews; each new batch shape '
             'compiles once')
  else:
    stopped = training.progress.stopped
    done = stopped or training.step >= task.steps_total
    announce(f'{"already at" if done else "resuming from"} step '
             f'{training.step} of {task.steps_total}'
             + (', stopped early' if stopped else ''))
  return training


def _run_epochs(
    task: _Task, training: _Training, stop: preemption.Stop) -> None:
  """Trains to the end, or until it is stopped; all that was done is saved.

  The order matters. The metrics line is on disk before the checkpoint that
  stands for it: a kill in between repeats the epoch and its line, and loses
  neither. An interrupted epoch has no line, and its last step is saved. Raises
  FloatingPointError and Preempted as `train`.
  """
  checkpoints, early_stopping = training.checkpoints, task.config.early_stopping
  writers = Writers(task.workdir, training.step)
  train_step = stop.voting(task.train_step)
  task.terminal.start(training.step, task.steps_total)
  try:
    while (training.step < task.steps_total and not training.progress.stopped
           and not stop.agreed(wait=True)):
      rate = Rate()
      metrics = _train_epoch(task, training, train_step, rate, stop)
      if metrics is None:
        training.progress.seconds += rate.seconds()
        break
      reviews_per_second = rate.per_second()
      validation, score = _validate(task, training), None
      if validation:
        score = stopping.score(early_stopping, validation)
        stopping.update(early_stopping, training.progress, score)
      training.progress.seconds += rate.seconds()
      line = _line(task, training.step, metrics, validation)
      processes.report_alive('save')
      writers.write(line, {'reviews_per_second': reviews_per_second})
      training.save(score)
      task.terminal.announce(
          _epoch_text(line, task.config.num_epochs, reviews_per_second)
          + task.compiled.take())
  finally:
    task.terminal.stop()
  if not task.steps_total and checkpoints.latest() is None:  # only to evaluate
    training.save(score=0.0)
  if stop.agreed() and checkpoints.latest() != training.step:
    _check_finite(task, training, devices.to_host(training.state.metrics))
    training.save(score=None)
  processes.report_alive('save')
  checkpoints.wait()
  stop.leave_if_asked(training.step, task.steps_total)


def _train_epoch(task: _Task, training: _Training, train_step: Callable,
                 rate: Rate, stop: preemption.Stop) -> Metrics | None:
  """Trains to the end of the epoch, whose metrics it returns, on the host.

  None if it was interrupted. Raises FloatingPointError as `_check_finite`.
  """
  batches, before = task.batches, None
  while not stop.agreed():
    batch = devices.shard(batches(training.step))
    processes.report_alive('step', training.step + 1)
    training.state, metrics = train_step(training.state, batch)
    rate.reviews += len(batches.rows(training.step))
    training.step += 1
    if training.step == training.began_at + 1:
      task.terminal.announce('first step done' + task.compiled.take())
    if training.step % WAIT_EVERY == 0:
      if before is not None:
        processes.report_alive('wait')
        so_far = devices.to_host(before)
        _check_finite(task, training, so_far)
        if so_far.weight:
          task.terminal.update(training.step, _live_text(
              task, so_far, training.step, rate.per_second()))
      before = metrics
    if training.step % batches.steps_per_epoch == 0:
      processes.report_alive('wait')
      metrics = devices.to_host(metrics)
      _check_finite(task, training, metrics, epoch_over=True)
      return metrics
  return None


def _validate(task: _Task, training: _Training) -> dict[str, float]:
  """The scores on validation, {} if all reviews train.

  Raises FloatingPointError if they are not finite.
  """
  if not (validation := task.splits.get('validation')):
    return {}
  result = _score(task, task.outputs(
      training.state.eval_params(), validation), validation)
  if not np.isfinite(result['loss']):
    raise FloatingPointError(
        f'the validation loss after step {training.step} is {result["loss"]}; '
        + _remedy(training))
  return result


def _score(task: _Task, outputs: np.ndarray,
           reviews: Reviews) -> dict[str, float]:
  """Loss, accuracy and n of what `task.outputs` returned for these reviews."""
  if task.config.objective == 'language_model':
    return language_model.score(outputs)
  return evaluate.score(outputs, reviews.labels)


def _finish(task: _Task, training: _Training,
            stop: preemption.Stop) -> dict[str, Any]:
  """Evaluates what the config asks for, and writes how that went.

  The summary comes last: beside one nothing is missing.
  """
  config, step = task.config, training.step
  best = training.checkpoints.best()
  def choose() -> int:
    chosen = best if run.evaluates_best(config) else step
    assert chosen is not None
    return chosen
  processes.report_alive('restore')
  evaluated, params = run.restore_eval_params(
      training.checkpoints, choose, config, task.model)
  outputs, scores = {}, {}
  for name, split in task.splits.items():
    outputs[name] = task.outputs(params, split)
    scores[name] = _score(task, outputs[name], split)
    stop.leave_if_asked(step, task.steps_total)
  calibrated, temperature = {}, 1.0
  if 'validation' in outputs and config.objective == 'label':
    calibrated = {'calibration': calibration.calibrate(*(
        (outputs[name], task.splits[name].labels)
        for name in ('validation', 'test')))}
    temperature = calibrated['calibration']['temperature']
  epoch = step // task.batches.steps_per_epoch
  trained = devices.to_host(training.state.params)
  summary = {
      'config': config.to_dict(), 'step': step, 'steps_total': task.steps_total,
      'best_step': best, 'evaluated_step': evaluated,
      'stopped_epoch': epoch if training.progress.stopped else None, **scores,
      **calibrated, 'seconds': round(training.progress.seconds, 3),
      'parameters': classifier.parameter_count(trained),
      'params_sha256': classifier.params_sha256(trained)}
  processes.report_alive('save')
  if calibrated:
    run.write_calibration(task.workdir, evaluated, temperature)
  run.write_summary(task.workdir, summary)
  what = 'reviews' if config.objective == 'label' else 'words'
  for line in (f'evaluated: the weights of step {evaluated} of {step}',
               *(evaluate.score_text(*item, what) for item in scores.items()),
               *map(calibration.text, calibrated.values()),
               *_examples(task, params, temperature)):
    task.terminal.announce(line)
  return summary


def _examples(task: _Task, params: classifier.Params,
              temperature: float) -> Iterator[str]:
  """Lines on the shortest test reviews: their label and what is predicted."""
  if not (most := task.config.show_examples):
    return
  data = task.config.data
  processes.report_alive('load')
  texts, labels = sources.read_texts(data.name, data.test_split)
  for row in sorted(range(len(texts)), key=lambda i: len(texts[i]))[:most]:
    prediction, = predict.predict(
        task.outputs, params, task.tokenizer, [texts[row]], temperature)
    yield (f'is {LABELS[labels[row]]}, predicted '
           + predict.prediction_text(prediction))


def _check_finite(task: _Task, training: _Training, metrics: Metrics,
                  epoch_over: bool = False) -> None:
  """Raises FloatingPointError, so that a broken run never saves over a good.

  At config.on_nan='skip' only if an epoch had no other steps.
  """
  none_left = epoch_over and not metrics.weight
  if not metrics.skipped or task.config.on_nan == 'skip' and not none_left:
    return
  bad_step = int(metrics.bad_step)
  rate = learning_rate_schedule(
      task.config, task.batches.steps_per_epoch)(bad_step - 1)
  raise FloatingPointError(
      f'step {bad_step} is not finite: loss {metrics.bad_loss:.6g}, gradient '
      f'norm {metrics.bad_grad_norm:.6g}, learning rate {float(rate):.6g}; '
      + _remedy(training))


def _remedy(training: _Training) -> str:
  latest = training.checkpoints.latest()
  saved = 'nothing' if latest is None else f'step {latest}'
  return (f'{saved} was saved before: lower config.learning_rate, set '
          'config.clip_norm, or leave such steps out with --config.on_nan=skip')


def _line(task: _Task, step: int, metrics: Metrics,
          validation: dict[str, float]) -> dict[str, Any]:
  """What metrics.jsonl says of an epoch."""
  train_: dict[str, Any] = metrics.means()
  if task.config.on_nan == 'skip':
    train_['skipped'] = int(metrics.skipped)
  line = {'epoch': step // task.batches.steps_per_epoch, 'step': step,
          'train': train_}
  return line | {'validation': validation} if validation else line


def _live_text(task: _Task, metrics: Metrics, step: int, rate: float) -> str:
  so_far, epoch = metrics.means(), (step - 1) // task.batches.steps_per_epoch
  return (f'epoch {epoch + 1}  step {step}/{task.steps_total}  loss '
          '{loss:.4f}  accuracy {accuracy:.4f}  '.format(**so_far)
          + f'{rate:,.0f} reviews/s')


def _epoch_text(line: dict[str, Any], num_epochs: int, rate: float) -> str:
  results = '  '.join(
      f'{name} loss {line[name]["loss"]:.4f} accuracy '
      f'{line[name]["accuracy"]:.4f}'
      for name in ('train', 'validation') if name in line)
  return (f'epoch {line["epoch"]}/{num_epochs}  step {line["step"]}  {results}'
          f'  {rate:,.0f} reviews/s')
