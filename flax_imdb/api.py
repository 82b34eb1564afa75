"""From Python: open a run directory, or train one; see `flax_imdb`."""

from collections.abc import Sequence
import functools
import os
import sys
from typing import Any
import warnings

from ml_collections import ConfigDict

from flax_imdb import environment
from flax_imdb.config import read_config
from flax_imdb.errors import UserError
from flax_imdb.fields import check_fields
from flax_imdb.storage import files
from flax_imdb.terminal import Terminal, quiet_libraries


def _start_jax(global_batch_size: int) -> None:
  """Sets what jax reads when it starts; warns where it has started already."""
  environment.check_jaxlib()
  before, imported = dict(os.environ), 'jax' in sys.modules
  environment.configure(global_batch_size)
  changed = sorted(name for name, value in os.environ.items()
                   if before.get(name) != value)
  if imported and changed:
    warnings.warn(
        f'jax was imported before flax_imdb could set {", ".join(changed)}, '
        'which no longer takes effect: call flax_imdb before you import jax',
        stacklevel=4)
  quiet_libraries()


class OpenedRun:
  """A run directory that answers for any text; `flax_imdb.load` makes one.

  Attributes:
    config: of the run, a ConfigDict.
    labels: the names of the classes, in order.
    step: after which the weights were so.
    workdir: where it lies.
  """

  def __init__(self, workdir: str, step: str | int | None = None):
    """See `flax_imdb.load`."""
    self.workdir = workdir = files.absolute(workdir)
    saved = files.as_path(workdir) / 'config.json'
    if files.exists(saved):
      _start_jax(read_config(saved).global_batch_size)
    from flax_imdb.checkpoint import run
    from flax_imdb.inference import evaluate
    self._run = run.restore(workdir, None if step is None else str(step))
    self.config, self.labels = self._run.config, self._run.labels
    self.step = self._run.step
    self._logits = evaluate.make_logits(
        self.config, evaluate.forward_of(self._run), self._run.ngrams.annotate)

  @property
  def summary(self) -> dict[str, Any]:
    """What `flax_imdb.train` returned; UserError if it has not ended."""
    from flax_imdb.checkpoint import records
    return records.read_summary(self.workdir)

  @property
  def history(self) -> list[dict[str, Any]]:
    """A dict an epoch: epoch, step, and the scores of train and validation.

    These are dicts of loss in nats, accuracy and n, and of validation macro F1;
    a run without validation has none. Raises UserError if they are damaged.
    """
    from flax_imdb.checkpoint import records
    return records.read_history(self.workdir)

  def predict(self, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Label and probability of each text, a dict each.

    Of two classes `probability` is that of the second one, such as a positive
    review; of more it is that of the label, and `probabilities` has all.
    Raises UserError for one text that is not in a list.
    """
    return self._predict(texts, None)

  def explain(self, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The same, and which words decided.

    `words` are [begin, end, score] of text[begin:end], `baseline` the logit
    without any; together they are the logit, but for `gap`.
    """
    return self._predict(texts, self._explanation)

  @functools.cached_property
  def _explanation(self) -> Any:
    from flax_imdb.inference import explain
    return explain.make_explain(self.config, self._run.model, self._run.ngrams)

  def _predict(self, texts: Sequence[str],
               explanation: Any) -> list[dict[str, Any]]:
    if isinstance(texts, str):  # a sequence, too, of its characters
      raise UserError('these are texts to predict: give a list, [text] of one')
    if not len(texts):  # `not texts` is an error of arrays
      return []
    from flax_imdb.inference import predict
    found = self._run
    return list(predict.predict(
        self._logits, found.params, found.tokenizer, texts, found.labels,
        found.temperature, explanation))

  def evaluate(self, split: str = 'test') -> dict[str, Any]:
    """Loss in nats, accuracy, macro F1 and n on train, validation or test.

    Raises UserError if the data set can't be had, or there is no such split.
    """
    from flax_imdb.data.reviews import SPLITS, load_splits
    from flax_imdb.inference import evaluate
    if split not in SPLITS:
      raise UserError(f'{split!r} is none of {", ".join(SPLITS)}')
    reviews = load_splits(
        self.config, self._run.tokenizer, lambda line: None, [split],
        len(self.labels))[split]
    return evaluate.score(
        self._logits(self._run.params, reviews), reviews.labels)


def train(config: ConfigDict, workdir: str, quiet: bool) -> dict[str, Any]:
  """See `flax_imdb.train`."""
  check_fields(config)
  _start_jax(config.global_batch_size)
  from flax_imdb.train import selftrain
  with Terminal(quiet=quiet) as terminal:
    return selftrain.train(config, files.absolute(workdir), terminal)
