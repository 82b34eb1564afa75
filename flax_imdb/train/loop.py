"""The training run: from a config and a run directory to a summary."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import time
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from flax_imdb.checkpoint import records, run
from flax_imdb.checkpoint.manager import Checkpoints, Progress
from flax_imdb.cluster import devices, preemption, processes
from flax_imdb.data import sources
from flax_imdb.data.batches import TrainBatches
from flax_imdb.data.reviews import Reviews
from flax_imdb.inference import (
  calibration,
  confusion,
  evaluate,
  model_card,
  predict,
)
from flax_imdb.model import classifier
from flax_imdb.terminal import Rate, Terminal
from flax_imdb.train import board, language_model, loggers, programs, stopping
from flax_imdb.train.metrics import Metrics
from flax_imdb.train.optimizer import learning_rate_schedule
from flax_imdb.train.profiling import Profile
from flax_imdb.train.screen import Screen
from flax_imdb.train.step import TrainState, init_state, state_shapes
from flax_imdb.train.task import Task, load
from flax_imdb.train.writers import Writers, scalars

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
  loggers.check(config)
  devices.check_batch_size(config.global_batch_size)
  # Refused early is what is too much for two classes: how many there are is not
  # known before there is data.
  classifier.for_device(config, classifier.build_model(config),
                        jax.local_devices()[0], lambda line: None)
  with run.locked(workdir, terminal.announce):
    task = load(config, workdir, terminal)
    with (preemption.deferred(WAIT_EVERY, terminal.leave) as stop,
          Checkpoints(workdir) as checkpoints):
      training = _begin_or_resume(task, checkpoints)
      with loggers.told(config, workdir, terminal.announce) as told:
        _compile(task, training, stop)
        _run_epochs(task, training, stop, told)
        return _finish(task, training, stop, told)


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


def _begin_or_resume(task: Task, checkpoints: Checkpoints) -> _Training:
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
    announce(f'{task.steps_total:,} steps, {task.batches.steps_per_epoch:,} an '
             f'epoch{_epoch_size(task.batches)}; each new batch shape compiles '
             'once')
  else:
    stopped = training.progress.stopped
    done = stopped or training.step >= task.steps_total
    announce(f'{"already at" if done else "resuming from"} step '
             f'{training.step} of {task.steps_total}'
             + (', stopped early' if stopped else ''))
  return training


def _epoch_size(batches: TrainBatches) -> str:
  passes, n = batches.passes_per_epoch, len(batches.reviews)
  part = batches.steps_per_epoch * batches.batch_size
  if part < n:
    return f' of {part:,} of {n:,} reviews'
  return f' of {f"{passes} passes over " if passes > 1 else ""}{n:,} reviews'


def _compile(task: Task, training: _Training, stop: preemption.Stop) -> None:
  """Compiles what is left to do, where that pays, see `programs`."""
  start = time.perf_counter()
  steps_total = 0 if training.progress.stopped else task.steps_total
  steps = range(training.step, steps_total)
  programs.compile_ahead(task, training.state, steps, stop)
  if steps:  # to evaluate once more is no training
    training.progress.seconds += time.perf_counter() - start


def _run_epochs(task: Task, training: _Training, stop: preemption.Stop,
                told: loggers.Loggers) -> None:
  """Trains to the end, or until it is stopped; all that was done is saved.

  The order matters. The metrics line is on disk before the checkpoint that
  stands for it: a kill in between repeats the epoch and its line, and loses
  neither. An interrupted epoch has no line, and its last step is saved. Raises
  FloatingPointError and Preempted as `train`.
  """
  checkpoints, early_stopping = training.checkpoints, task.config.early_stopping
  writers = Writers(task.workdir, training.step)
  profile = Profile(task.config, task.workdir, task.terminal.announce)
  train_step = profile.traced(stop.voting(task.train_step), training.step)
  histograms = board.make_histograms(task)
  with profile, task.terminal.showing(_screen(task, training, writers.lines)):
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
      rates = {'reviews_per_second': reviews_per_second}
      writers.write(line, rates, histograms(
          line['epoch'], training.state.eval_params()))
      training.save(score)
      told.log(training.step, scalars(line | rates))
      task.terminal.announce(
          _epoch_text(line, task.config.num_epochs, reviews_per_second)
          + task.compiled.take())
  if not task.steps_total and checkpoints.latest() is None:  # only to evaluate
    training.save(score=None)
  if stop.agreed() and checkpoints.latest() != training.step:
    _check_finite(task, training, devices.to_host(training.state.metrics))
    training.save(score=None)
  processes.report_alive('save')
  checkpoints.wait()
  stop.leave_if_asked(training.step, task.steps_total)


def _screen(task: Task, training: _Training,
            lines: Sequence[dict[str, Any]]) -> Screen:
  """What is shown of a run that goes on after these lines of epochs."""
  first = jax.local_devices()[0]
  return Screen(
      task.config, task.batches, training.step, lines, training.progress,
      f'{jax.local_device_count()} x {first.device_kind}',
      classifier.explain_form(task.config, task.model, first))


def _train_epoch(task: Task, training: _Training, train_step: Callable,
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
    rate.tokens += batches.tokens(training.step)
    training.step += 1
    if training.step == training.began_at + 1:
      task.terminal.announce('first step done' + task.compiled.take())
    if training.step % WAIT_EVERY == 0:
      if before is not None:
        processes.report_alive('wait')
        so_far = devices.to_host(before)
        _check_finite(task, training, so_far)
        if so_far.weight:
          task.terminal.update(training.step, so_far.means(), rate)
      before = metrics
    if training.step % batches.steps_per_epoch == 0:
      processes.report_alive('wait')
      metrics = devices.to_host(metrics)
      _check_finite(task, training, metrics, epoch_over=True)
      task.terminal.update(training.step, metrics.means(), rate)
      return metrics
  return None


def _validate(task: Task, training: _Training) -> dict[str, float]:
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


def _score(task: Task, outputs: np.ndarray,
           reviews: Reviews) -> dict[str, float]:
  """The scores of what `task.outputs` returned for these reviews."""
  if task.config.objective == 'language_model':
    return language_model.score(outputs)
  return evaluate.score(outputs, reviews.labels)


def _finish(task: Task, training: _Training, stop: preemption.Stop,
            told: loggers.Loggers) -> dict[str, Any]:
  """Evaluates what the config asks for, and writes how that went.

  The summary comes last: beside one nothing is missing.
  """
  config, step = task.config, training.step
  best = training.checkpoints.best() or None  # see `run.chosen_step` of 0
  def choose() -> int:
    chosen = run.chosen_step(config, best, step)
    assert chosen is not None
    return chosen
  processes.report_alive('restore')
  evaluated, params = run.restore_eval_params(
      training.checkpoints, choose, config, task.model)
  outputs: dict[str, Any] = {}
  scores: dict[str, dict[str, Any]] = {}
  # Of training that of its last epoch: to evaluate it again takes long.
  metrics = devices.to_host(training.state.metrics)
  if metrics.weight:
    scores['train'] = metrics.means()
  linear, tables = {}, []
  for name in ('validation', 'test'):
    if not (split := task.splits.get(name)):
      continue
    split = task.annotate(split)
    outputs[name] = task.outputs(params, split)
    scores[name] = _score(task, outputs[name], split)
    if config.objective == 'label':
      matrix = evaluate.confusion_matrix(outputs[name], split.labels)
      scores[name] |= confusion.summary(matrix, task.labels)
      if name == 'test' and len(task.labels) > 2:
        tables.append(confusion.table(matrix, task.labels))
    if split.linear is not None:
      linear[name] = evaluate.score(split.linear, split.labels)
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
      'stopped_epoch': epoch if training.progress.stopped else None,
      'data': task.counts(), **scores,
      **({'linear': linear} if linear else {}), **calibrated,
      'seconds': round(training.progress.seconds, 3),
      'environment': devices.environment(),
      'parameters': classifier.parameter_count(trained),
      'params_sha256': classifier.params_sha256(trained)}
  processes.report_alive('save')
  if calibrated:
    records.write_calibration(task.workdir, evaluated, temperature)
  board.write_results(task, params, summary, outputs)
  model_card.write(task.workdir, config, task.labels,
                   task.tokenizer.get_vocab_size(), summary)
  told.log_results(evaluated, board.final_scalars(summary))
  records.write_summary(task.workdir, summary)
  what = 'reviews' if config.objective == 'label' else 'words'
  task.terminal.announce(
      f'evaluated: the weights of step {evaluated} of {step}')
  task.terminal.table(
      [('', 'loss', 'accuracy', what),
       *((name, f'{x["loss"]:.4f}', f'{x["accuracy"]:.4f}', f'{x["n"]:,}')
         for name, x in scores.items())],
      [evaluate.score_text(name, scores[name], what) for name in outputs])
  for line in (*tables,
               *(f'the linear model alone, on {evaluate.score_text(*item)}'
                 for item in linear.items()),
               *map(calibration.text, calibrated.values()),
               *_examples(task, params, temperature)):
    task.terminal.announce(line)
  return summary


def _examples(task: Task, params: classifier.Params,
              temperature: float) -> Iterator[str]:
  """Lines on the shortest test reviews: their label and what is predicted."""
  if not (most := task.config.show_examples):
    return
  data = task.config.data
  processes.report_alive('load')
  texts, labels = sources.read_texts(data, data.test_split)
  for row in sorted(range(len(texts)), key=lambda i: len(texts[i]))[:most]:
    prediction, = predict.predict(
        task.outputs, params, task.tokenizer, [texts[row]], task.labels,
        temperature)
    yield (f'is {task.labels[labels[row]]}, predicted '
           + predict.prediction_text(prediction))


def _check_finite(task: Task, training: _Training, metrics: Metrics,
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


def _line(task: Task, step: int, metrics: Metrics,
          validation: dict[str, float]) -> dict[str, Any]:
  """What metrics.jsonl says of an epoch."""
  train_: dict[str, Any] = metrics.means()
  if task.config.on_nan == 'skip':
    train_['skipped'] = int(metrics.skipped)
  line = {'epoch': step // task.batches.steps_per_epoch, 'step': step,
          'train': train_}
  return line | {'validation': validation} if validation else line


def _epoch_text(line: dict[str, Any], num_epochs: int, rate: float) -> str:
  results = '  '.join(
      f'{name} loss {line[name]["loss"]:.4f} accuracy '
      f'{line[name]["accuracy"]:.4f}'
      for name in ('train', 'validation') if name in line)
  return (f'epoch {line["epoch"]}/{num_epochs}  step {line["step"]}  {results}'
          f'  {rate:,.0f} reviews/s')
