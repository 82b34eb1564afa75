"""What a training run works on: the data, the model, its compiled programs."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
from tokenizers import Tokenizer

from flax_imdb.checkpoint import records, run
from flax_imdb.cluster import devices, processes
from flax_imdb.config import read_config
from flax_imdb.data import classes, counting, ngrams, pseudo_labels, sources
from flax_imdb.data.batches import TrainBatches
from flax_imdb.data.ngrams import Ngrams
from flax_imdb.data.reading import Reading, Share
from flax_imdb.data.reviews import (
  Reviews,
  joined,
  load_splits,
  reviews_sha256,
  training_tokenizer,
)
from flax_imdb.data.tokenizer import load_tokenizer
from flax_imdb.errors import UserError
from flax_imdb.fields import validates
from flax_imdb.inference import evaluate
from flax_imdb.model import classifier
from flax_imdb.storage import files
from flax_imdb.terminal import CompileClock, Terminal
from flax_imdb.train import language_model
from flax_imdb.train.metrics import Metrics
from flax_imdb.train.optimizer import build_optimizer
from flax_imdb.train.step import TrainState, make_train_step


@dataclasses.dataclass(frozen=True)
class Task:
  """What stays as it is while a run trains."""
  config: ConfigDict
  workdir: str
  terminal: Terminal
  tokenizer: Tokenizer
  splits: dict[str, Reviews]
  batches: TrainBatches
  model: classifier.SentimentClassifier
  labels: tuple[str, ...]  # names of the classes 0, 1, 2, ...
  optimizer: Any
  train_step: Callable[[TrainState, dict], tuple[TrainState, Metrics]]
  forward: Callable[[Any, dict], Any]  # that of evaluation
  annotate: Callable[[Reviews], Reviews]  # `Ngrams.annotate`, of the last kept
  outputs: evaluate.Logits  # or what `language_model.make_sums` returns
  compiled: CompileClock

  @property
  def steps_total(self) -> int:
    return self.config.num_epochs * self.batches.steps_per_epoch

  def counts(self) -> dict[str, dict[str, Any]]:
    """The texts of each split, n, and of each class by its name.

    Those without labels that train as well are 'unlabelled'; to predict words
    no label is read.
    """
    found: dict[str, dict[str, Any]] = {}
    for split, reviews in self.splits.items():
      found[split] = {'n': len(reviews)}
      if self.config.objective == 'label':
        found[split]['classes'] = dict(zip(self.labels, np.bincount(
            reviews.labels, minlength=len(self.labels)).tolist(), strict=True))
    if more := len(self.batches.reviews) - len(self.splits['train']):
      found['unlabelled'] = {'n': more}
    return found


def load(config: ConfigDict, workdir: str, terminal: Terminal) -> Task:
  """Reads all that training needs, then makes the run directory.

  What can be refused is, before anything is left there: a corrected config may
  begin in it. So the test split is read now, too. Of several processes all call
  this. Raises UserError for what does not fit, and TransientError for what soon
  may.
  """
  processes.report_alive('load')
  run.check_directory(workdir, config)
  labels = _labels(config, workdir, terminal)
  model = classifier.for_device(
      config, classifier.build_model(config, len(labels)),
      jax.local_devices()[0], terminal.announce)
  tokenizer = _tokenizer(config, workdir, terminal)
  wanted = {'train': True, 'validation': validates(config.data),
            'test': config.objective == 'label',
            'unlabelled': config.data.unlabelled_split}
  splits = load_splits(
      config, tokenizer, terminal.announce,
      [split for split in wanted if wanted[split]], len(labels),
      terminal.progress)
  sha256 = {split: reviews_sha256(reviews) for split, reviews in splits.items()}
  processes.check_same(
      'tokenizer or data', lambda: f'{tokenizer.to_str()} {sha256}')
  sha256.pop('test', None)  # of which nothing is learned
  run.check_data(workdir, sha256)
  train_reviews = splits['train']
  if unlabelled := splits.pop('unlabelled', None):
    unlabelled = _pseudo_labelled(config, workdir, unlabelled, len(labels))
    if unlabelled.labels.ndim == 2:
      train_reviews = dataclasses.replace(
          train_reviews, labels=classes.shares(
              train_reviews.labels, len(labels)).astype(np.float32))
    train_reviews = joined(train_reviews, unlabelled)
  processes.check_same('config', lambda: config.to_json(sort_keys=True))
  known, train_reviews = _ngrams(
      config, workdir, terminal, train_reviews, len(labels))
  run.begin_directory(workdir, config, tokenizer, known, labels, sha256)
  batches = TrainBatches(
      train_reviews, config.seed, config.global_batch_size,
      Reading.of(config.data), Share(*devices.share()),
      config.min_steps_per_epoch, config.max_steps_per_epoch)
  optimizer = build_optimizer(config, batches.steps_per_epoch)
  compiled = CompileClock(
      lambda: processes.report_alive('compile'), terminal.progress)
  words = config.objective == 'language_model'
  forward = compiled.wrap(
      (language_model if words else evaluate).make_forward(model))
  class_weights = classes.weights(
      config.class_weights, train_reviews.labels, len(labels))
  annotate = functools.lru_cache(maxsize=1)(known.annotate)  # each epoch's
  outputs = (language_model.make_sums(config, forward, terminal.progress)
             if words else evaluate.make_logits(
                 config, forward, annotate, terminal.progress))
  return Task(
      config, workdir, terminal, tokenizer, splits, batches, model, labels,
      optimizer, compiled.wrap(make_train_step(
          config, model, optimizer, batches.steps_per_epoch,
          class_weights=class_weights)),
      forward, annotate, outputs, compiled)


def _labels(config: ConfigDict, workdir: str,
            terminal: Terminal) -> tuple[str, ...]:
  """The names of the data set's classes, which are those of the run.

  Raises UserError if they are not to be used, or not those that it began with.
  """
  data = config.data
  with processes.one_at_a_time():
    sources.prepare(data, terminal.announce, terminal.progress)
    names = sources.class_names(data)
  try:
    classes.check_names(names)
  except ValueError as e:
    raise UserError(f'{data.name} cannot be learned from: {e}; choose another '
                    'data set or config.data.label_field') from e
  if run.is_run(workdir) and (begun := records.read_labels(workdir)) != names:
    raise UserError(f'{workdir} was made with other classes ({len(begun)} there'
                    f', {len(names)} now, or other names): give the same data '
                    'to resume, or another --workdir')
  processes.check_same('list of classes', lambda: repr(names))
  return names


def _pseudo_labelled(config: ConfigDict, workdir: str, unlabelled: Reviews,
                     class_count: int) -> Reviews:
  """With what the teachers said, if there are any; see `selftrain`."""
  if not config.self_training_rounds:
    return unlabelled
  found = pseudo_labels.load(
      files.as_path(workdir) / 'pseudo_labels.npz',
      pseudo_labels.source(config), len(unlabelled), class_count)
  return dataclasses.replace(unlabelled, labels=found.probabilities)


def _tokenizer(
    config: ConfigDict, workdir: str, terminal: Terminal) -> Tokenizer:
  """The run's own tokenizer; fitted if the run is yet to begin."""
  if source := _begun(config, workdir):
    return load_tokenizer(f'{source}/tokenizer.json', config.data.vocab_size)
  return training_tokenizer(config, terminal.announce, terminal.progress)


def _begun(config: ConfigDict, workdir: str) -> str | None:
  """The run whose ids mean what this one's do: itself, or config.init_from."""
  return next((source for source in (workdir, config.init_from)
               if source and run.is_run(source)), None)


def _ngrams(config: ConfigDict, workdir: str, terminal: Terminal,
            reviews: Reviews, class_count: int) -> tuple[Ngrams, Reviews]:
  """As `counting.fit`; pairs are the run's own, as words in `_tokenizer`."""
  if config.model.inputs == 'words':
    return counting.fit(config, reviews)
  pairs = None
  source = _begun(config, workdir)
  if source and not run.is_pretraining(source):  # which knows no pairs
    pairs = ngrams.load(
        f'{source}/ngrams.npz',
        read_config(files.as_path(source) / 'config.json'),
        len(records.read_labels(source))).pairs
  terminal.progress('counting n-grams', 0, 0)
  return counting.fit_or_read(
      config, reviews, reviews_sha256(reviews), terminal.announce, pairs,
      class_count)
