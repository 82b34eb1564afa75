"""A run in plain words: what was trained on what, and how well it does."""

from collections.abc import Sequence
import math
import pathlib
import statistics

from ml_collections import ConfigDict

from flax_imdb.analysis.findings import Findings, Group
from flax_imdb.inference import confusion
from flax_imdb.inference.evaluate import share_error


def standard_error(values: Sequence[float]) -> float | None:
  """Of the mean: the sample's deviation over the root of n; None of one."""
  if len(values) < 2:
    return None
  return statistics.stdev(values) / math.sqrt(len(values))


def mean(values: Sequence[float], form: str) -> str:
  """The mean, with its standard error if there are several that differ."""
  if not values:
    return '–'
  error = standard_error(values)
  return f'{statistics.mean(values):{form}}' + (
      f' ±\u00a0{error:{form}}' if error else '')


def paragraph(group: Group) -> str:
  """What was trained on what, and how well, in a paragraph."""
  one = group.first
  config, summary, epochs = one.config, one.history.summary, one.history.epochs
  said = [f'{_model_text(config)} learned {_task_text(one)}'
          f'{_training_text(one)}.']
  best = next((x.number for x in epochs if x.step == one.best_step), None)
  if best is not None and epochs[-1].validation:
    said.append(f'{epochs[-1].validation["n"]:,.0f} other reviews chose the '
                f'weights of epoch {best}.')
  if summary and summary.stopped_epoch is not None:
    said.append(f'It was stopped early, after epoch {summary.stopped_epoch}.')
  if not summary:
    said.append('It has not ended yet.')
  if scores := one.scores:
    accuracies = [x.scores['accuracy'] for x in group.runs if x.scores]
    p, n = statistics.mean(accuracies), scores['n']
    error = 100 * (standard_error(accuracies) or share_error(p, n))
    seeds = (f', the mean of {len(accuracies)} seeds'
             if len(accuracies) > 1 else '')
    said.append(
        f'Of {n:,.0f} test reviews, which it had not seen, it recognises '
        f'{100 * p:.1f} % (±\u00a0{error:.1f}, a standard error{seeds})'
        f'{_than(one)}')
  if one.ece is not None:
    said.append(f'How sure it is and how often it is right are '
                f'{100 * one.ece:.1f} percentage points apart, on average.')
  return ' '.join(said)


def _model_text(config: ConfigDict) -> str:
  model = config.model
  cell = {'lstm': 'LSTM', 'simple_rnn': 'SimpleRNN'}[model.cell]
  what = (f'{model.members} {cell}s side by side' if model.members > 1
          else f'An {cell}' if model.cell == 'lstm' else f'A {cell}')
  what += (f' of {model.layers} layers' if model.layers > 1 else '')
  what += f' with {model.width} units' + (
      ' in each direction' if model.bidirectional else '')
  inputs = model.inputs.split('+')
  beside = [text for name, text in (
      ('bigrams', 'pairs of words'), ('log_odds', 'log-odds of n-grams'))
            if name in inputs]
  what += f', which reads words, {" and ".join(beside)},' if beside else ''
  return what + (' together with a linear model of n-grams,'
                 if 'linear' in inputs else '')


def _task_text(one: Findings) -> str:
  labels, data = one.history.labels, one.config.data
  where = pathlib.PurePath(data.train_file).name or data.name
  if one.config.objective == 'language_model':
    return f'words from their neighbours in {where}'
  return (f'to tell {labels[0]} from {labels[1]} reviews of {where}'
          if len(labels) == 2 else
          f'to tell the {len(labels):,} classes of {where} apart')


def _training_text(one: Findings) -> str:
  epochs = one.history.epochs
  if not epochs:
    return ''
  passes = 'epoch' if len(epochs) == 1 else 'epochs'
  what = ('words' if one.config.objective == 'language_model' else 'reviews')
  return (f', in {len(epochs):,} {passes} of {epochs[-1].train["n"]:,.0f} '
          f'{what}')


def _than(one: Findings) -> str:
  """What others reach: the linear model, and saying always the same."""
  others = []
  if one.linear:
    others.append(f'a linear model {100 * one.linear["accuracy"]:.1f} %')
  if one.confusion is not None:
    others.append('always the most frequent class '
                  f'{100 * confusion.largest_share(one.confusion):.1f} %')
  return f'; {", ".join(others)}.' if others else '.'
