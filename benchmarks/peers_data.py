"""What peers.py's systems share: batches, reviews and weights, on disk.

`prepare`, in a process of its own, writes them with this package; a peer reads
them with NumPy and none of our libraries.
"""

import json
import pathlib
import sys

import numpy as np

Batch = dict[str, np.ndarray]


def bucket_width(recipe: dict, padding: str) -> int:
  """Tokens that a batch's width is a multiple of; 0: of the most allowed."""
  if padding == 'own':
    return recipe['data']['bucket_width']
  if padding.startswith('bucketed '):
    return int(padding.split()[1])
  return 1 if padding in ('trimmed', 'packed') else 0


def eval_batches(recipe: dict, padding: str, reviews, size: int):
  """(rows, batch) of `eval_batches` of the program, `size` reviews each."""
  from flax_imdb.data.batches import eval_batches
  from flax_imdb.data.reading import Reading
  for rows, batch in eval_batches(reviews, size, Reading(
      recipe['data']['max_length'], bucket_width(recipe, padding))):
    yield rows[rows >= 0], batch


def load_batches(directory: pathlib.Path, recipe: dict, padding: str
                 ) -> list[Batch]:
  """The batches that `prepare` wrote, as wide as the padding asks for."""
  with np.load(directory / (
      'plain.npz' if padding == 'plain' else 'epoch.npz')) as f:
    ids, lengths, labels = (f[k] for k in ('ids', 'lengths', 'labels'))
  step, most = bucket_width(recipe, padding), ids.shape[2]
  widths = [min(-(-max(some) // step) * step, most) if step else most
            for some in lengths]
  return [{'ids': np.ascontiguousarray(ids[i, :, :width]),
           'lengths': lengths[i], 'labels': labels[i],
           'weights': np.ones(len(labels[i]), np.float32),
           'places': np.arange(len(labels[i]), dtype=np.int32)}
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
  np.savez(directory / f'{name}.npz', **{
      k: np.stack([batch[k] for batch in batches])
      for k in ('ids', 'lengths', 'labels')})


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
            reviews: int, seeds: int) -> dict:
  """Writes recipes, batches, reviews and initial weights for all systems.

  Args:
    directory: where to.
    steps: padded batches, the first of the notebook's run.
    epoch_steps: batches of its first epoch, where those of similar lengths
      are one batch: sorted by the longest review, every k-th, so that their
      mean is the epoch's. The short last one is left out.
    reviews: of the notebook's validation split, at equal distances.
    seeds: of configs/words.py to write initial weights for.

  Returns:
    steps_per_epoch, and the mean length of a batch's longest review, of the
    epoch and of the sample.
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
  masked = notebook.copy_and_resolve_references()
  masked.data.bucket_width = default.data.bucket_width
  masked.model.recurrence = default.model.recurrence
  (directory / 'recipes.json').write_text(json.dumps(
      {'plain': notebook.to_dict(), 'masked': masked.to_dict(),
       'accuracy': default.to_dict()}))

  def initial_params(config):
    return init_state(config, classifier.build_model(config),
                               build_optimizer(config, 1)).params

  np.savez(directory / 'notebook.npz',
           *keras_weights.to_keras(initial_params(notebook)))
  for seed in range(seeds):
    default.seed = seed
    np.savez(directory / f'accuracy{seed}.npz',
             *in_keras_order(initial_params(default)))

  data = notebook.data
  tokenizer = training_tokenizer(notebook, announce)
  splits = load_splits(notebook, tokenizer, announce, ['train', 'validation'])
  train, validation = splits['train'], splits['validation']
  padded, sorted_ = (
      TrainBatches(train, notebook.seed, notebook.global_batch_size,
                   Reading(data.max_length, width))
      for width in (0, masked.data.bucket_width))
  _save_batches(directory, 'plain', [padded(step) for step in range(steps)])
  epoch = [sorted_(step) for step in range(sorted_.steps_per_epoch)]
  longest = [max(batch['lengths']) for batch in epoch]
  full = [i for i in np.argsort(longest, kind='stable')
          if epoch[i]['weights'].all()]
  places = (np.arange(epoch_steps) + 0.5) * len(full) / epoch_steps
  sample = sorted(full[int(place)] for place in places)
  for i in sample:
    ids = epoch[i]['ids']
    epoch[i]['ids'] = np.pad(
        ids, ((0, 0), (0, data.max_length - ids.shape[1])))
  _save_batches(directory, 'epoch', [epoch[i] for i in sample])

  _save_reviews(directory, 'evaluate', validation, np.linspace(
      0, len(validation) - 1, reviews).astype(int))
  tokenizer = training_tokenizer(default, announce)
  splits = load_splits(default, tokenizer, announce, ['train', 'validation'])
  for split, some in splits.items():
    _save_reviews(directory, split, some, range(len(some)))
  return {'steps_per_epoch': sorted_.steps_per_epoch,
          'epoch_longest': float(np.mean(longest)),
          'sample_longest': float(np.mean([longest[i] for i in sample]))}
