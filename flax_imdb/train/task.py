"""What a training run works on: the data, the model, its compiled programs."""

from collections.abc import Callable
import dataclasses
import time
from typing import Any

from ml_collections import ConfigDict
from tokenizers import Tokenizer

from flax_imdb.checkpoint import run
from flax_imdb.cluster import devices, processes
from flax_imdb.config import validates
from flax_imdb.data import ngrams, pseudo_labels
from flax_imdb.data.batches import TrainBatches
from flax_imdb.data.ngrams import Ngrams
from flax_imdb.data.reading import Reading, Share
from flax_imdb.data.reviews import (
  Reviews,
  data_sha256,
  joined,
  load_splits,
  training_tokenizer,
)
from flax_imdb.data.tokenizer import load_tokenizer
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
  optimizer: Any
  train_step: Callable[[TrainState, dict], tuple[TrainState, Metrics]]
  forward: Callable[[Any, dict], Any]  # that of evaluation
  outputs: evaluate.Logits  # or what `language_model.make_sums` returns
  compiled: CompileClock

  @property
  def steps_total(self) -> int:
    return self.config.num_epochs * self.batches.steps_per_epoch


def load(config: ConfigDict, workdir: str, terminal: Terminal,
         model: classifier.SentimentClassifier) -> Task:
  """Reads all that training needs, then makes the run directory.

  What can be refused is, before anything is left there: a corrected config may
  begin in it. So the test split is read now, too. Of several processes all call
  this. Raises UserError for what does not fit, and TransientError for what soon
  may.
  """
  processes.report_alive('load')
  run.check_directory(workdir, config)
  tokenizer = _tokenizer(config, workdir, terminal)
  wanted = {'train': True, 'validation': validates(config.data),
            'test': config.objective == 'label',
            'unlabelled': config.data.unlabelled_split}
  splits = load_splits(config, tokenizer, terminal.announce, [
      split for split in wanted if wanted[split]])
  train_reviews = splits['train']
  if unlabelled := splits.pop('unlabelled', None):
    train_reviews = joined(
        train_reviews, _pseudo_labelled(config, workdir, unlabelled))
  processes.check_same('config', lambda: config.to_json(sort_keys=True))
  processes.check_same('tokenizer or data', lambda: ' '.join(
      data_sha256(tokenizer, split)
      for split in (train_reviews, *splits.values())))
  known, train_reviews = _ngrams(config, workdir, terminal, train_reviews)
  run.begin_directory(workdir, config, tokenizer, known)
  batches = TrainBatches(
      train_reviews, config.seed, config.global_batch_size,
      Reading.of(config.data), Share(*devices.share()),
      config.min_steps_per_epoch, config.max_steps_per_epoch)
  optimizer = build_optimizer(config, batches.steps_per_epoch)
  compiled = CompileClock(lambda: processes.report_alive('compile'))
  words = config.objective == 'language_model'
  forward = compiled.wrap(
      (language_model if words else evaluate).make_forward(model))
  outputs = (language_model.make_sums(config, forward) if words else
             evaluate.make_logits(config, forward, known))
  return Task(
      config, workdir, terminal, tokenizer, splits, batches, model, optimizer,
      compiled.wrap(make_train_step(
          config, model, optimizer, batches.steps_per_epoch)),
      forward, outputs, compiled)


def _pseudo_labelled(
    config: ConfigDict, workdir: str, unlabelled: Reviews) -> Reviews:
  """With what the teachers said, if there are any; see `selftrain`."""
  if not config.self_training_rounds:
    return unlabelled
  found = pseudo_labels.load(
      files.as_path(workdir) / 'pseudo_labels.npz',
      pseudo_labels.source(config), len(unlabelled))
  return dataclasses.replace(unlabelled, labels=found.probabilities)


def _tokenizer(
    config: ConfigDict, workdir: str, terminal: Terminal) -> Tokenizer:
  """The run's own tokenizer; fitted if the run is yet to begin."""
  if source := _begun(config, workdir):
    return load_tokenizer(f'{source}/tokenizer.json', config.data.vocab_size)
  return training_tokenizer(config, terminal.announce)


def _begun(config: ConfigDict, workdir: str) -> str | None:
  """The run whose ids mean what this one's do: itself, or config.init_from."""
  return next((source for source in (workdir, config.init_from)
               if source and run.is_run(source)), None)


def _ngrams(config: ConfigDict, workdir: str, terminal: Terminal,
            reviews: Reviews) -> tuple[Ngrams, Reviews]:
  """As `ngrams.fit`; pairs are the run's own, as words are in `_tokenizer`."""
  if config.model.inputs == 'words':
    return ngrams.fit(config, reviews)
  start, pairs = time.perf_counter(), None
  source = _begun(config, workdir)
  if source and not run.is_pretraining(source):  # which knows no pairs
    pairs = ngrams.load(f'{source}/ngrams.npz', config).pairs
  known, annotated = ngrams.fit(config, reviews, pairs)
  terminal.announce(
      f'counted n-grams in {time.perf_counter() - start:.1f} s: '
      f'{len(known.pairs):,} pairs to embed, {len(known.keys):,} with log-odds')
  return known, annotated
