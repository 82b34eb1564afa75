"""One system of benchmarks/peers.py in a process of its own; it starts these.

  python benchmarks/peers_worker.py SYSTEM DIRECTORY [WAY]

reads one request a line from standard input, JSON, answers each with one line
on standard output, and sleeps in between; DIRECTORY holds the batches and the
weights that flax_imdb wrote there. With a WAY, such as plain, it builds the
notebook's model, takes one step, says so and ends.
"""

import json
import os
import pathlib
import resource
import sys
import time

import numpy as np
from peers_data import load, load_reviews, load_weights, prepare
from peers_systems import make


def time_to_accuracy(name: str, directory: pathlib.Path, way: str, seed: int,
                     started: float, targets: list[float], limit: float
                     ) -> dict:
  """Trains the default recipe until the highest target, its end or the limit.

  Args:
    name: the system.
    directory: of `prepare`.
    way: 'accuracy', with a number of threads as in `make`.
    seed: of the weights, the order of reviews and dropout.
    started: time.monotonic() when this process was started.
    targets: accuracies on validation.
    limit: seconds.

  Returns:
    seconds: to the first evaluation with each target or more, None if none
      was, without the time that evaluations take; accuracies: of all of them;
      loss: of the initial weights on validation, for comparison.
  """
  from flax_imdb.data.batches import TrainBatches
  from flax_imdb.data.reading import Reading
  from flax_imdb.data.tokenizer import START_ID, UNKNOWN_ID
  recipe = json.loads((directory / 'recipes.json').read_text())['accuracy']
  recipe['seed'] = seed
  batches = TrainBatches(
      load_reviews(directory, 'train'), seed, recipe['global_batch_size'],
      Reading(recipe['data']['max_length'], recipe['data']['bucket_width']))
  validation = load_reviews(directory, 'validation')
  weights = load_weights(directory, f'accuracy{seed}')
  rng = np.random.default_rng(seed)
  system, mode = make(name, way)
  system.build(recipe, mode, weights, batches.steps_per_epoch)
  evaluating, seconds, accuracies = 0.0, [None] * len(targets), []
  for step in range(recipe['num_epochs'] * batches.steps_per_epoch):
    batch = batches(step)
    if name != 'flax_imdb':
      # A peer drops the epoch's short batch, as its own loaders can: another
      # shape would have to be compiled for it.
      if not batch['weights'].all():
        continue
      unread = rng.random(batch['ids'].shape) < recipe['model']['word_dropout']
      batch['ids'][unread & (batch['ids'] > START_ID)] = UNKNOWN_ID
    system.step(batch)
    if time.monotonic() - started - evaluating > limit:
      break
    if (step + 1) % (batches.steps_per_epoch // 4):
      continue
    system.wait()
    now = time.monotonic()
    p = system.probabilities(validation)
    accuracies.append(float(np.mean((p > 0.5) == (validation.labels > 0))))
    for i, target in enumerate(targets):
      if seconds[i] is None and accuracies[-1] >= target:
        seconds[i] = now - started - evaluating
    evaluating += time.monotonic() - now
    if None not in seconds:
      break
  system.build(recipe, mode, weights, batches.steps_per_epoch)
  return {'seconds': seconds, 'accuracies': accuracies,
          'loss': _loss(system.probabilities(validation), validation.labels)}


def _loss(p: np.ndarray, labels: np.ndarray) -> float:
  return float(-np.mean(np.log(np.where(labels > 0, p, 1 - p))))


class Server:
  """Answers requests; keeps a model for each way, see `make`."""

  def __init__(self, name: str, directory: pathlib.Path):
    self._name, self._directory = name, directory
    self._systems, self._batches = {}, {}

  def build(self, way: str) -> dict:
    recipe = json.loads(
        (self._directory / 'recipes.json').read_text())['notebook']
    self._systems[way], mode = make(self._name, way)
    self._batches[way] = load(self._directory, mode)
    self._systems[way].build(
        recipe, mode, load_weights(self._directory, 'notebook'), 1)
    return {}

  def train(self, way: str, count: int | None = None) -> dict:
    """Times `count` steps, by default one on each batch."""
    system = self._systems[way]
    start = time.perf_counter()
    for batch in self._batches[way][:count]:
      system.step(batch)
    loss = system.wait()
    return {'seconds': time.perf_counter() - start, 'loss': loss}

  def evaluate(self, way: str) -> dict:
    """Times the probabilities of the validation reviews."""
    reviews = load_reviews(self._directory, 'evaluate')
    start = time.perf_counter()
    p = self._systems[way].probabilities(reviews)
    seconds = time.perf_counter() - start
    return {'seconds': seconds, 'loss': _loss(p, reviews.labels)}

  def memory(self) -> dict:
    """This process' largest resident size so far."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {'mib': kib / (1 << 20 if sys.platform == 'darwin' else 1 << 10)}

  def prepare(self, **request) -> dict:
    return prepare(self._directory, **request)

  def time_to_accuracy(self, **request) -> dict:
    return time_to_accuracy(self._name, self._directory, **request)


def main() -> None:
  """Answers until standard input ends."""
  name, directory = sys.argv[1], pathlib.Path(sys.argv[2])
  if name == 'flax_imdb':
    from flax_imdb import environment
    from flax_imdb.config import load_config
    environment.configure(
        load_config('configs/notebook.py').global_batch_size)
  server = Server(name, directory)
  if sys.argv[3:]:
    server.build(sys.argv[3])
    server.train(sys.argv[3], count=1)
    print('first step done', flush=True)
    return
  # Libraries print, too: standard output is kept for answers.
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  for line in sys.stdin:
    request = json.loads(line)
    answer = getattr(server, request.pop('op'))(**request)
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == '__main__':
  main()
