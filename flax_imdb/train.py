"""The training run: from a config and a run directory to a summary."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict
import numpy as np
from tokenizers import Tokenizer

from flax_imdb import batches as batches_lib
from flax_imdb import builders
from flax_imdb import dataset
from flax_imdb import evaluate
from flax_imdb import metrics
from flax_imdb import model as model_lib
from flax_imdb import optimizer as optimizer_lib
from flax_imdb import parallel
from flax_imdb import preemption
from flax_imdb import processes
from flax_imdb import run
from flax_imdb import step as step_lib
from flax_imdb import tokenizer as tokenizer_lib
from flax_imdb.checkpoint import Checkpoints
from flax_imdb.progress import Progress

# The host looks at the sums this often, and then only at those of the steps
# before the last ones: an accelerator's queue is bounded and never runs dry.
WAIT_EVERY = 8


def train(config: ConfigDict, workdir: str,
          terminal: metrics.Terminal) -> dict[str, Any]:
  """Trains, or goes on, and evaluates the best weights.

  Args:
    config: checked by `config.check`.
    workdir: the run directory; one that holds a run of this config is resumed.
    terminal: told what happens.

  Of several processes all do the same, and the first one writes.

  Returns:
    What summary.json holds.

  Raises:
    UserError: data, devices or run directory don't fit.
    FloatingPointError: the loss is no longer finite; nothing was saved since.
    Preempted: a signal asked for it; the last step's state is saved.
  """
  parallel.check(config.global_batch_size)
  writes = processes.index() == 0
  if writes:
    run.check(workdir, config)
  processes.check_shared(workdir)
  tokenizer = _tokenizer(config, workdir, terminal)
  reviews = dataset.load(config, tokenizer, 'train', terminal.announce)
  validation = dataset.load(config, tokenizer, 'validation', terminal.announce)
  # Now, or a mistake in its name would be told when all is trained.
  test = dataset.load(config, tokenizer, 'test', terminal.announce)
  several = processes.count() > 1
  if several:
    processes.check_same('config', config.to_json(sort_keys=True))
    processes.check_same('tokenizer or data', run.digest(tokenizer, reviews))
  if writes:
    run.begin(workdir, config, tokenizer)
  batches = batches_lib.TrainBatches(
      reviews, config.seed, config.global_batch_size, config.data.bucket_width,
      config.data.max_length, parallel.own_rows(config.global_batch_size))

  model = model_lib.build(config)
  optimizer = optimizer_lib.build(config, batches.steps_per_epoch)
  clock = parallel.CompileClock()
  train_step = clock.wrap(step_lib.make_train_step(
      config, model, optimizer, batches.steps_per_epoch))
  logits = evaluate.make_logits(config, model, clock)
  steps_total = config.num_epochs * batches.steps_per_epoch
  progress = Progress()

  with preemption.deferred() as request, Checkpoints(workdir) as checkpoints:
    found = checkpoints.restore_newest(
        run.template(config, model), terminal.announce)
    if found is None:
      step = 0
      state = parallel.replicate(step_lib.init_state(config, model, optimizer))
      if config.init_from:
        params = run.initial_params(config, model)
        # Put there twice: the step donates both, and no buffer goes twice.
        state = state.replace(
            params=parallel.replicate(params),
            ema=parallel.replicate(params) if state.ema else {})
    else:
      state, saved = found
      step = int(parallel.to_host(state.step))
      progress = Progress(**saved)
    terminal.announce(run.parameter_table(state.params))
    if found is not None:
      done = progress.stopped or step == steps_total
      terminal.announce(
          ('already at' if done else 'resuming from')
          + f' step {step} of {steps_total}'
          + (', stopped early' if progress.stopped else ''))
    else:
      terminal.announce(
          f'{steps_total:,} steps, {batches.steps_per_epoch:,} an epoch of '
          f'{len(reviews):,} reviews; each new batch shape compiles once')

    writers = metrics.Writers(workdir, step) if writes else None
    terminal.start(step, steps_total)
    first, rate, waiting = step, metrics.Rate(), None
    asked = False  # to stop, as all processes know
    try:
      # NOTE: the order matters. The metrics line is on disk before the
      # checkpoint that stands for it: a kill in between repeats the epoch and
      # its line, and loses neither.
      while (step < steps_total and not progress.stopped
             and not (asked if several else request.name)):
        batch = batches(step)
        if several:
          batch['asked'] = np.full_like(
              batch['weights'], request.name is not None)
        state, sums = train_step(state, parallel.shard(batch))
        step += 1
        processes.turn(step)
        rate.add(len(batches.rows(step - 1)))
        if step == first + 1:
          terminal.announce('first step done' + clock.take())
        if step % WAIT_EVERY == 0:
          if waiting is not None:
            sums_so_far = parallel.to_host(waiting)
            asked = sums_so_far.get('asked', 0) > 0
            _check_finite(config, sums_so_far, batches, checkpoints)
            if sums_so_far['weight']:
              terminal.update(step, _live_text(
                  sums_so_far, step, batches.steps_per_epoch, steps_total,
                  rate.per_second()))
          waiting = sums
        if step % batches.steps_per_epoch:
          continue

        sums = parallel.to_host(sums)
        asked = sums.get('asked', 0) > 0
        _check_finite(config, sums, batches, checkpoints, epoch_over=True)
        reviews_per_second = rate.per_second()
        result = evaluate.score(
            logits(state.eval_params(), validation), validation.labels)
        if not np.isfinite(result['loss']):
          raise FloatingPointError(
              f'the validation loss after step {step} is {result["loss"]}; '
              + _remedy(checkpoints))
        score = (-result['loss'] if config.early_stopping.monitor == 'loss'
                 else result['accuracy'])
        progress.update(score, config.early_stopping.patience,
                        config.early_stopping.min_delta)
        progress.seconds += rate.seconds()
        line: dict[str, Any] = {
            'epoch': step // batches.steps_per_epoch, 'step': step,
            'train': metrics.means(sums), 'validation': result}
        if config.on_nan == 'skip':
          line['train']['skipped'] = int(sums['skipped'])
        if writers:
          writers.write(line, {'reviews_per_second': reviews_per_second})
        checkpoints.save(state, dataclasses.asdict(progress), score)
        terminal.announce(
            _epoch_text(line, config.num_epochs, reviews_per_second)
            + clock.take())
        rate, waiting = metrics.Rate(), None
    finally:
      terminal.stop()
      if writers:
        writers.close()
    if checkpoints.latest() is None and not steps_total:  # only to evaluate
      checkpoints.save(state, dataclasses.asdict(progress), score=0.0)
    if (asked if several else request.name) and checkpoints.latest() != step:
      _check_finite(config, parallel.to_host(state.sums), batches, checkpoints)
      progress.seconds += rate.seconds()
      checkpoints.save(state, dataclasses.asdict(progress), score=None)
    checkpoints.wait()
    _leave_if_asked(request, step, steps_total)
    best = checkpoints.best()
    evaluated = best if config.early_stopping.restore_best else step
    assert evaluated is not None
    params = checkpoints.restore_eval_params(
        evaluated, run.template(config, model))
    splits = {'train': reviews, 'validation': validation, 'test': test}
    scores = {}
    for name, split in splits.items():
      scores[name] = evaluate.score(logits(params, split), split.labels)
      _leave_if_asked(request, step, steps_total)

  summary = {
      'config': config.to_dict(), 'step': step, 'steps_total': steps_total,
      'best_step': best, 'evaluated_step': evaluated,
      'stopped_epoch': (
          step // batches.steps_per_epoch if progress.stopped else None),
      **scores,
      'seconds': round(progress.seconds, 3),
      'parameters': run.parameter_count(state.params),
      'params_sha256': run.params_sha256(parallel.to_host(state.params)),
  }
  if writes:
    run.write_summary(workdir, summary)
  terminal.announce(f'evaluated: the weights of step {evaluated} of {step}')
  for name, result in scores.items():
    terminal.announce(evaluate.text(name, result))
  if config.show_examples:
    texts, labels = builders.read(config.data.name, config.data.test_split)
    shortest = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    for row in shortest[:config.show_examples]:
      prediction, = evaluate.predict(logits, params, tokenizer, [texts[row]])
      terminal.announce(f'is {evaluate.LABELS[labels[row]]}, predicted '
                        + evaluate.prediction_text(prediction))
  return summary


def _leave_if_asked(
    request: preemption.Request, step: int, steps_total: int) -> None:
  """Raises Preempted if any process got a signal; `step` must be saved."""
  signals = {name for name in processes.gather(request.name or '') if name}
  if signals:
    raise preemption.Preempted(
        f'stopped by {" and ".join(sorted(signals))} after step {step} of '
        f'{steps_total}, which is saved: the same command goes on from there')


def _tokenizer(config: ConfigDict, workdir: str,
               terminal: metrics.Terminal) -> Tokenizer:
  """The run's own tokenizer; fitted if the run is yet to begin."""
  for source in (workdir, config.init_from):  # ids must mean the same words
    if source and run.is_run(source):
      return tokenizer_lib.load(
          f'{source}/tokenizer.json', config.data.vocab_size)
  return dataset.fit_tokenizer(config, terminal.announce)


def _check_finite(config: ConfigDict, sums: dict[str, np.ndarray],
                  batches: batches_lib.TrainBatches, checkpoints: Checkpoints,
                  epoch_over: bool = False) -> None:
  """Raises FloatingPointError, so that a broken run never saves over a good.

  At config.on_nan='skip' only if an epoch had no other steps.
  """
  none_left = epoch_over and not sums['weight']
  if not sums['skipped'] or config.on_nan == 'skip' and not none_left:
    return
  bad_step = int(sums['bad_step'])
  rate = optimizer_lib.schedule(config, batches.steps_per_epoch)(bad_step - 1)
  raise FloatingPointError(
      f'step {bad_step} is not finite: loss {sums["bad_loss"]:.6g}, gradient '
      f'norm {sums["bad_grad_norm"]:.6g}, learning rate {float(rate):.6g}; '
      + _remedy(checkpoints))


def _remedy(checkpoints: Checkpoints) -> str:
  latest = checkpoints.latest()
  saved = 'nothing' if latest is None else f'step {latest}'
  return (f'{saved} was saved before: lower config.learning_rate, set '
          'config.clip_norm, or leave such steps out with --config.on_nan=skip')


def _live_text(sums: dict[str, np.ndarray], step: int, steps_per_epoch: int,
               steps_total: int, rate: float) -> str:
  so_far = metrics.means(sums)
  return (
      f'epoch {(step - 1) // steps_per_epoch + 1}  step {step}/{steps_total}  '
      f'loss {so_far["loss"]:.4f}  accuracy {so_far["accuracy"]:.4f}  '
      f'{rate:,.0f} reviews/s')


def _epoch_text(line: dict[str, Any], num_epochs: int, rate: float) -> str:
  train_, validation = line['train'], line['validation']
  return (
      f'epoch {line["epoch"]}/{num_epochs}  step {line["step"]}  '
      f'train loss {train_["loss"]:.4f} accuracy {train_["accuracy"]:.4f}  '
      f'validation loss {validation["loss"]:.4f} accuracy '
      f'{validation["accuracy"]:.4f}  {rate:,.0f} reviews/s')

