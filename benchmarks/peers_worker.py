"""One system of benchmarks/peers.py in a process of its own; it starts these.

  python benchmarks/peers_worker.py SYSTEM SETTING DIRECTORY [PADDING]

reads one request a line from standard input, JSON, answers each with one line
on standard output, and sleeps in between; DIRECTORY holds the batches and the
weights that flax_imdb wrote there; SETTING and PADDING are those of
peers_process.py. With a PADDING, such as plain, it builds the notebook's model,
takes one step, says so and ends.
"""

import json
import os
import pathlib
import resource
import sys
import time
from typing import Any

import numpy as np
from peers_data import (
  Batch,
  bucket_width,
  load_batches,
  load_reviews,
  load_weights,
  prepare,
)
from peers_process import OURS
from peers_systems import make


def time_to_accuracy(system: str, setting: str, directory: pathlib.Path,
                     padding: str, eval_batch_size: int, seed: int,
                     started: float, targets: list[float], limit: float
                     ) -> dict:
  """Trains configs/words.py until the highest target, its end or the limit.

  Args:
    system: its name.
    setting: what it is given.
    directory: of `prepare`.
    padding: how batches are padded.
    eval_batch_size: reviews.
    seed: of the weights, the order of reviews and dropout.
    started: time.monotonic() when this process was started.
    targets: accuracies on validation.
    limit: seconds.

  Returns:
    seconds: to the end of the first evaluation with each target or more, None
      if none was; accuracies: of all evaluations, one each quarter epoch; loss:
      of the initial weights on validation, for comparison.
  """
  from flax_imdb.data.batches import TrainBatches
  from flax_imdb.data.reading import Reading
  from flax_imdb.data.tokenizer import START_ID, UNKNOWN_ID
  recipe = json.loads((directory / 'recipes.json').read_text())['accuracy']
  recipe['seed'] = seed
  batches = TrainBatches(
      load_reviews(directory, 'train'), seed, recipe['global_batch_size'],
      Reading(recipe['data']['max_length'], bucket_width(recipe, padding)))
  validation = load_reviews(directory, 'validation')
  weights = load_weights(directory, f'accuracy{seed}')
  rng = np.random.default_rng(seed)
  trainer = make(system, setting)
  trainer.build(recipe, padding, weights, batches.steps_per_epoch)
  seconds, accuracies = [None] * len(targets), []
  for step in range(recipe['num_epochs'] * batches.steps_per_epoch):
    batch = batches(step)
    if system != OURS:
      # A peer drops the epoch's short batch, as its own loaders can: another
      # shape would have to be compiled for it.
      if not batch['weights'].all():
        continue
      unread = rng.random(batch['ids'].shape) < recipe['model']['word_dropout']
      batch['ids'][unread & (batch['ids'] > START_ID)] = UNKNOWN_ID
    trainer.step(batch)
    if time.monotonic() - started > limit:
      break
    if (step + 1) % (batches.steps_per_epoch // 4):
      continue
    trainer.wait()
    p = trainer.probabilities(validation, eval_batch_size)
    accuracies.append(float(np.mean((p > 0.5) == (validation.labels > 0))))
    for i, target in enumerate(targets):
      if seconds[i] is None and accuracies[-1] >= target:
        seconds[i] = time.monotonic() - started
    if None not in seconds:
      break
  trainer.build(recipe, padding, weights, batches.steps_per_epoch)
  p = trainer.probabilities(validation, eval_batch_size)
  return {'seconds': seconds, 'accuracies': accuracies,
          'loss': _loss(p, validation.labels)}


def _loss(p: np.ndarray, labels: np.ndarray) -> float:
  return float(-np.mean(np.log(np.where(labels > 0, p, 1 - p))))


class Server:
  """Answers requests; keeps a model for each kind of padding."""

  def __init__(self, system: str, setting: str, directory: pathlib.Path):
    self._system, self._setting = system, setting
    self._directory = directory
    self._trainers: dict[str, Any] = {}
    self._batches: dict[str, list[Batch]] = {}

  def build(self, padding: str) -> dict:
    recipes = json.loads((self._directory / 'recipes.json').read_text())
    recipe = recipes['plain' if padding == 'plain' else 'masked']
    self._batches[padding] = load_batches(self._directory, recipe, padding)
    self._trainers[padding] = make(self._system, self._setting)
    self._trainers[padding].build(
        recipe, padding, load_weights(self._directory, 'notebook'), 1)
    return {}

  def train(self, padding: str, count: int | None = None) -> dict:
    """Times `count` steps, by default one on each batch."""
    trainer = self._trainers[padding]
    start = time.perf_counter()
    for batch in self._batches[padding][:count]:
      trainer.step(batch)
    loss = trainer.wait()
    return {'seconds': time.perf_counter() - start, 'loss': loss}

  def evaluate(self, padding: str, eval_batch_size: int) -> dict:
    """Times the probabilities of the validation reviews."""
    reviews = load_reviews(self._directory, 'evaluate')
    start = time.perf_counter()
    p = self._trainers[padding].probabilities(reviews, eval_batch_size)
    seconds = time.perf_counter() - start
    return {'seconds': seconds, 'loss': _loss(p, reviews.labels)}

  def memory(self) -> dict:
    """This process' largest resident size so far."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {'mib': kib / (1 << 20 if sys.platform == 'darwin' else 1 << 10)}

  def prepare(self, **request) -> dict:
    return prepare(self._directory, **request)

  def time_to_accuracy(self, **request) -> dict:
    return time_to_accuracy(
        self._system, self._setting, self._directory, **request)


def main() -> None:
  """Answers until standard input ends."""
  system, setting, folder, *padding = sys.argv[1:]
  if system == OURS or setting in ('flags', 'parallel'):
    from flax_imdb import environment
    from flax_imdb.config import load_config
    environment.configure(
        load_config('configs/notebook.py').global_batch_size)
  server = Server(system, setting, pathlib.Path(folder))
  if padding:
    server.build(*padding)
    server.train(*padding, count=1)
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
