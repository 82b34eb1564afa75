"""What peers.py's systems share: batches, reviews and weights, on disk.

`prepare`, in a process of its own, writes them with this package; a peer reads
them with NumPy and none of our libraries.
"""

import json
import pathlib
import sys

import numpy as np

Batch = dict[str, np.ndarray]


def bucket_width(recipe: dict, mode: str) -> int:
  """Tokens; 0 pads every batch to the longest review allowed."""
  return recipe['data']['bucket_width'] if mode in (
      'bucketed', 'accuracy') else 0


def eval_batches(recipe: dict, mode: str, reviews):
  """The batches of `eval_batches`, as wide as the mode asks for."""
  from flax_imdb.data.batches import eval_batches
  from flax_imdb.data.reading import Reading
  for rows, batch in eval_batches(
      reviews, recipe['global_batch_size'], Reading(
          recipe['data']['max_length'], bucket_width(recipe, mode))):
    yield rows[rows >= 0], batch


def load(directory: pathlib.Path, mode: str) -> list[Batch]:
  """The batches that `prepare` wrote, for one mode."""
  name = 'plain' if mode == 'plain' else 'epoch'
  with np.load(directory / f'{name}.npz') as f:
    widths, ids, lengths, labels = (
        f[k] for k in ('widths', 'ids', 'lengths', 'labels'))
  if mode == 'padded':
    widths = np.full_like(widths, ids.shape[2])
  return [{'ids': np.ascontiguousarray(ids[i, :, :width]),
           'lengths': lengths[i], 'labels': labels[i],
           'weights': np.ones(len(labels[i]), np.float32)}
          for i, width in enumerate(widths)]


def load_weights(directory: pathlib.Path, name: str) -> list[np.ndarray]:
  """Initial weights in Keras' order."""
  with np.load(directory / f'{name}.npz') as f:
    return [f[f'arr_{i}'] for i in range(len(f.files))]


def load_reviews(directory: pathlib.Path, name: str):
  """A split that `prepare` wrote."""
  from flax_imdb.data.reviews import Reviews
  with np.load(directory / f'{name}.npz') as f:
    return Reviews(f['ids'], f['offsets'], f['labels'])


def _save_reviews(directory: pathlib.Path, name: str, reviews, rows) -> None:
  spans = [reviews.ids[reviews.offsets[i]:reviews.offsets[i + 1]] for i in rows]
  np.savez(directory / f'{name}.npz', ids=np.concatenate(spans),
           offsets=np.cumsum([0] + [len(span) for span in spans]),
           labels=reviews.labels[rows])


def _save_batches(directory: pathlib.Path, name: str, batches: list) -> None:
  widest = max(batch['ids'].shape[1] for batch in batches)
  np.savez(
      directory / f'{name}.npz',
      widths=[batch['ids'].shape[1] for batch in batches],
      ids=np.stack([np.pad(b['ids'], ((0, 0), (0, widest - b['ids'].shape[1])))
                    for b in batches]),
      **{k: np.stack([b[k] for b in batches]) for k in ('lengths', 'labels')})


def in_keras_order(params) -> list:
  """Arrays of the model of configs/words.py, as a peer's `build` takes them."""
  cells = [params[f'{direction}_0']['steps']['cell']
           for direction in ('forward', 'backward')]
  return [params['embed']['embedding'],
          *(cell[name] for cell in cells
            for name in ('kernel', 'recurrent_kernel', 'bias')),
          *(params[layer][name] for layer in ('hidden', 'logit')
            for name in ('kernel', 'bias'))]


def prepare(directory: pathlib.Path, steps: int, epoch_steps: int,
            reviews: int, repeats: int) -> dict:
  """Writes recipes, batches, reviews and initial weights for all systems.

  Args:
    directory: where to.
    steps: padded batches, the first of the notebook's run.
    epoch_steps: bucketed batches of its first epoch: sorted by width, every
      k-th, so that their mean width is the epoch's. The short last one is left
      out.
    reviews: of the notebook's validation split, at equal distances.
    repeats: seeds of the default recipe to write initial weights for.

  Returns:
    steps_per_epoch, and the mean width of the epoch and of the sample.
  """
  import functools

  from flax_imdb.config import load_config
  from flax_imdb.data.batches import TrainBatches
  from flax_imdb.data.reading import Reading
  from flax_imdb.data.reviews import load_splits, training_tokenizer
  from flax_imdb.model import classifier, keras_weights
  from flax_imdb.train.optimizer import build_optimizer
  from flax_imdb.train.step import init_state
  announce = functools.partial(print, file=sys.stderr)
  notebook = load_config('configs/notebook.py')
  default = load_config('configs/words.py')
  notebook.data.bucket_width = default.data.bucket_width
  (directory / 'recipes.json').write_text(json.dumps(
      {'notebook': notebook.to_dict(), 'accuracy': default.to_dict()}))

  def initial_params(config):
    return init_state(config, classifier.build_model(config),
                               build_optimizer(config, 1)).params

  np.savez(directory / 'notebook.npz',
           *keras_weights.to_keras(initial_params(notebook)))
  for seed in range(repeats):
    default.seed = seed
    np.savez(directory / f'accuracy{seed}.npz',
             *in_keras_order(initial_params(default)))

  data = notebook.data
  tokenizer = training_tokenizer(notebook, announce)
  splits = load_splits(notebook, tokenizer, announce, ['train', 'validation'])
  train, validation = splits['train'], splits['validation']
  padded, bucketed = (
      TrainBatches(train, notebook.seed, notebook.global_batch_size,
                   Reading(data.max_length, width))
      for width in (0, data.bucket_width))
  _save_batches(directory, 'plain', [padded(step) for step in range(steps)])
  epoch = [bucketed(step) for step in range(bucketed.steps_per_epoch)]
  widths = [batch['ids'].shape[1] for batch in epoch]
  full = [i for i in np.argsort(widths, kind='stable')
          if epoch[i]['weights'].all()]
  places = (np.arange(epoch_steps) + 0.5) * len(full) / epoch_steps
  sample = sorted(full[int(place)] for place in places)
  _save_batches(directory, 'epoch', [epoch[i] for i in sample])

  _save_reviews(directory, 'evaluate', validation, np.linspace(
      0, len(validation) - 1, reviews).astype(int))
  tokenizer = training_tokenizer(default, announce)
  splits = load_splits(default, tokenizer, announce, ['train', 'validation'])
  for split, some in splits.items():
    _save_reviews(directory, split, some, range(len(some)))
  return {'steps_per_epoch': bucketed.steps_per_epoch,
          'epoch_width': float(np.mean(widths)),
          'sample_width': float(np.mean([widths[i] for i in sample]))}
