"""How far back a logit depends on what was read: gradients by lag, as a figure.

The notebook claims that an LSTM keeps its gradient over hundreds of steps and a
SimpleRNN does not. Here that is measured, on real reviews without padding.
"""

from collections.abc import Callable, Sequence
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
from flax_imdb.data.reading import Batch, Reading
from flax_imdb.data.reviews import Reviews, load_splits
from flax_imdb.errors import UserError
from flax_imdb.inference import evaluate
from flax_imdb.model import classifier
from flax_imdb.storage import files

LENGTH = 400  # tokens; shorter reviews are left out, longer ones cut
_MOST_REVIEWS = 256
_PLACES = {'h': 'hidden state', 'c': 'cell state', 'x': 'embedded input'}

# [lag, review] gradient norms by place
Norms = dict[str, np.ndarray]


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
          for place in _PLACES if place in found}


def long_reviews(config: ConfigDict, reviews: Reviews) -> Batch:
  """The first 256 long reviews, cut to T tokens, as of `evaluate.inputs`.

  T is `LENGTH`, or what the model reads in one if less. UserError without any.
  """
  length = min(LENGTH, config.data.segment_length or config.data.max_length)
  rows = np.flatnonzero(reviews.lengths(length) == length)[:_MOST_REVIEWS]
  if not len(rows):
    raise UserError(f'no validation review has {length} tokens to report on')
  return evaluate.inputs(pad(reviews, rows, len(rows), Reading(length)))


def report(workdirs: Sequence[str], announce: Callable[[str], None]) -> None:
  """Writes gradient.csv and gradient.png into the first directory's report/.

  Of each run the weights before the first step, and those that it evaluated.
  Raises UserError as `run.restore`, `load_splits` and `long_reviews`.
  """
  measured: list[tuple[str, str, Norms]] = []
  for workdir in workdirs:
    restored = run.restore(workdir, None)
    config = restored.config
    reviews = load_splits(config, restored.tokenizer, announce,
                          ['validation'], len(restored.labels))['validation']
    batch = long_reviews(config, restored.ngrams.annotate(reviews))
    initial = run.initial_params(config, restored.model)
    name = pathlib.Path(workdir).name
    for when, params in (('before', initial), ('after', restored.params)):
      if restored.model.members > 1:
        params = jax.tree.map(lambda x: x[0], params)  # of the first member
      params = jax.device_put(params, jax.local_devices()[0])
      measured.append((name, when, gradient_norms(
          restored.model, params, batch)))
    announce(f'{name}: gradients at {batch["ids"].shape[1]} lags of '
             f'{len(batch["ids"])} reviews, '
             f'before training and at step {restored.step}')
  folder = files.as_path(workdirs[0]) / 'report'
  files.write(folder / 'gradient.csv', _csv(measured))
  files.write(folder / 'gradient.png', _figure(measured))
  announce(f'wrote {folder}/gradient.csv and gradient.png')


def _quartiles(norms: np.ndarray) -> np.ndarray:
  """[lag, review] -> [3, lag]: lower quartile, median, upper quartile."""
  return np.quantile(norms, [0.25, 0.5, 0.75], axis=1)


def _csv(measured: list[tuple[str, str, Norms]]) -> str:
  table = io.StringIO()
  writer = csv.writer(table)
  writer.writerow(['run', 'training', 'gradient with respect to', 'lag',
                   'lower quartile', 'median', 'upper quartile'])
  for name, when, norms in measured:
    for place, values in norms.items():
      for lag, row in enumerate(_quartiles(values).T):
        writer.writerow([name, when, _PLACES[place], lag,
                         *(f'{x:.6g}' for x in row)])
  return table.getvalue()


def _figure(measured: list[tuple[str, str, Norms]]) -> bytes:
  """A PNG: a panel a place, a colour a run, dashed before and solid after."""
  try:
    from matplotlib.figure import Figure
  except ImportError as e:
    raise UserError('the figure needs matplotlib: pip install matplotlib; the '
                    'CSV is written') from e

  figure = Figure(figsize=(12, 4.5), layout='constrained')
  panels = figure.subplots(1, len(_PLACES), sharey=True)
  colours = {name: f'C{i}' for i, name in
             enumerate(dict.fromkeys(name for name, _, _ in measured))}
  for panel, (place, title) in zip(panels, _PLACES.items(), strict=True):
    panel.set(title=title, xlabel='lag from the last token', yscale='log')
    panel.grid(alpha=0.3)
    for name, when, norms in measured:
      if place not in norms:
        continue
      quartiles = _quartiles(norms[place])
      # A log axis has no place for the zeros that float32 makes below 1e-45.
      low, median, high = np.where(quartiles > 0, quartiles, np.nan)
      panel.plot(median, '--' if when == 'before' else '-',
                 color=colours[name], label=f'{name}, {when} training')
      panel.fill_between(range(len(low)), low, high, color=colours[name],
                         alpha=0.15, linewidth=0)
  panels[0].set_ylabel('gradient of the logit: norm, median and quartiles')
  figure.legend(*panels[0].get_legend_handles_labels(),
                loc='outside lower center', ncols=4)
  image = io.BytesIO()
  figure.savefig(image, format='png', dpi=120)
  return image.getvalue()
