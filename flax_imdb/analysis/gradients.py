"""How far back a logit depends on what was read: gradients by lag, as a figure.

The notebook claims that an LSTM keeps its gradient over hundreds of steps and a
SimpleRNN does not. Here that is measured, on real reviews without padding.
"""

from collections.abc import Callable
import csv
import io
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from flax_imdb.checkpoint import run
from flax_imdb.data.batches import pad
from flax_imdb.data.ngrams import Ngrams
from flax_imdb.data.reading import Batch, Reading
from flax_imdb.data.reviews import Reviews, load_splits
from flax_imdb.errors import UserError
from flax_imdb.inference import evaluate
from flax_imdb.model import classifier
from flax_imdb.storage import files

LENGTH = 400  # tokens; shorter reviews are left out, longer ones cut
_MOST_REVIEWS = 256
PLACES = {'h': 'hidden state', 'c': 'cell state', 'x': 'embedded input'}

# By place: gradient norms [lag, review], or [3, lag], their lower quartile,
# median and upper quartile over reviews.
Norms = dict[str, np.ndarray]
Quartiles = dict[str, np.ndarray]


def gradient_norms(model: classifier.SentimentClassifier, params: Any,
                   batch: Batch) -> Norms:
  """Norms of the gradient of the logit, by the distance from the end.

  Of the model's first forward layer. The batch is one of `evaluate.inputs`, of
  n reviews of T tokens, without padding. Of more classes than two the logit is
  that of the class that is predicted.

  Returns for 'h' hidden state, 'c' cell state (an LSTM's) and 'x' embedded
  input float64 [T, n], row k the norm at step T - 1 - k: lag k from the last
  step. A state's gradient is the total one, through all later steps; that of
  the last cell state is 0, for no later step reads it.
  """
  # A change of nothing, added at every step; its gradient is the state's.
  shapes = jax.eval_shape(model.init, jax.random.key(0), **batch)
  nothing = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), shapes['perturbations'])

  inputs: dict[str, Any] = dict(batch)

  @jax.jit
  def gradient(params, nothing):
    def logits(nothing):
      found: Any = model.apply(
          {'params': params, 'perturbations': nothing}, **inputs)
      return jnp.sum(found if found.ndim == 1 else found.max(axis=-1))
    return jax.grad(logits)(nothing)

  found = gradient(params, nothing)
  found = {'x': found['x']} | found['forward_0']['steps']
  # In float64: the squares of what is below 1e-19 are 0 in float32.
  return {place: np.linalg.norm(
      np.asarray(found[place], np.float64), axis=-1)[::-1]
          for place in PLACES if place in found}


def long_reviews(
    config: ConfigDict, ngrams: Ngrams, reviews: Reviews) -> Batch:
  """The first 256 long reviews, cut to T tokens, as of `evaluate.inputs`.

  T is `LENGTH`, or what the model reads in one if less. UserError without any.
  """
  length = min(LENGTH, config.data.segment_length or config.data.max_length)
  rows = np.flatnonzero(reviews.lengths(length) == length)[:_MOST_REVIEWS]
  if not len(rows):
    raise UserError(f'no validation review has {length} tokens to report on')
  chosen = ngrams.annotate(reviews[rows])
  return evaluate.inputs(
      pad(chosen, np.arange(len(rows)), len(rows), Reading(length)))


def measure(restored: run.Run,
            announce: Callable[[str], None]) -> dict[str, Quartiles]:
  """Of the norms 'before' the first step and 'after' the last, on validation.

  After it are the weights that the run evaluated. `announce` is told what takes
  time and of how many reviews they are; UserError as `load_splits` and
  `long_reviews`.
  """
  config = restored.config
  reviews = load_splits(config, restored.tokenizer, announce,
                        ['validation'], len(restored.labels))['validation']
  batch = long_reviews(config, restored.ngrams, reviews)
  found = {}
  for when, params in (
      ('before', run.initial_params(config, restored.model)),
      ('after', restored.params)):
    if restored.model.members > 1:
      params = jax.tree.map(lambda x: x[0], params)  # of the first member
    params = jax.device_put(params, jax.local_devices()[0])
    norms = gradient_norms(restored.model, params, batch)
    found[when] = {place: quartiles(x) for place, x in norms.items()}
  announce(f'gradients at {batch["ids"].shape[1]} lags of {len(batch["ids"])} '
           f'reviews, before training and at step {restored.step}')
  return found


def write(folder: pathlib.Path,
          measured: dict[str, dict[str, Quartiles]]) -> None:
  """Writes gradient.csv and gradient.png of runs by name, as of `measure`.

  Errors as of `files.write`.
  """
  files.write(folder / 'gradient.csv', _csv(measured))
  files.write(folder / 'gradient.png', _figure(measured))


def quartiles(norms: np.ndarray) -> np.ndarray:
  """float64 [lag, review] -> [3, lag]: lower, median, upper."""
  return np.quantile(norms, [0.25, 0.5, 0.75], axis=1)


def _csv(measured: dict[str, dict[str, Quartiles]]) -> str:
  table = io.StringIO()
  writer = csv.writer(table)
  writer.writerow(['run', 'training', 'gradient with respect to', 'lag',
                   'lower quartile', 'median', 'upper quartile'])
  for name, found in measured.items():
    for when, by_place in found.items():
      for place, three in by_place.items():
        for lag, row in enumerate(three.T):
          writer.writerow([name, when, PLACES[place], lag,
                           *(f'{x:.6g}' for x in row)])
  return table.getvalue()


def _figure(measured: dict[str, dict[str, Quartiles]]) -> bytes:
  """A PNG: a panel a place, a colour a run, dashed before and solid after."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(12, 4.5), layout='constrained')
  panels = figure.subplots(1, len(PLACES), sharey=True)
  for panel, (place, title) in zip(panels, PLACES.items(), strict=True):
    panel.set(title=title, xlabel='lag from the last token', yscale='log')
    panel.grid(alpha=0.3)
    for i, (name, found) in enumerate(measured.items()):
      for when, by_place in found.items():
        if place not in by_place:
          continue
        # A log axis has no place for the zeros that float32 makes below 1e-45.
        three = by_place[place]
        low, median, high = np.where(three > 0, three, np.nan)
        panel.plot(median, '--' if when == 'before' else '-',
                   color=f'C{i}', label=f'{name}, {when} training')
        panel.fill_between(range(len(low)), low, high, color=f'C{i}',
                           alpha=0.15, linewidth=0)
  panels[0].set_ylabel('gradient of the logit: norm, median and quartiles')
  figure.legend(*panels[0].get_legend_handles_labels(),
                loc='outside lower center', ncols=4)
  image = io.BytesIO()
  figure.savefig(image, format='png', dpi=120)
  return image.getvalue()
