"""Texts that arrive together are answered together, by the one thread of jax.

The next batch is what waits when the model becomes free, up to a maximum: with
little to do a text is answered alone and at once, with much the batches are
full. Explanations take far longer, so one is made between two batches.
"""

import collections
from collections.abc import Callable, Sequence
import concurrent.futures
import dataclasses
import threading
from typing import Any

from ml_collections import ConfigDict

from flax_imdb.checkpoint import run
from flax_imdb.data.reading import Reading
from flax_imdb.inference import evaluate, explain, predict

# Texts of a batch, each a program of its own: a batch takes the smallest that
# holds it. More than the last are not answered faster on a CPU.
_SIZES = 1, 8, 32
# Who comes when so many wait is told to come later. On two cores the first are
# answered in half a second, the others in some five.
MOST_WAITING, MOST_EXPLAINED_WAITING = 256, 32
_WIDTHS = 4  # programs for whole reviews of different lengths


class Full(Exception):
  """As many texts wait as may."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Waiting:
  text: str
  answer: concurrent.futures.Future[dict[str, Any]]


class Batcher:
  """Takes texts from any thread; the one that calls `work` answers them.

  `note_batch` is told how many texts each batch has.
  """

  def __init__(self, found: run.Run, note_batch: Callable[[int], None]):
    self._run, self._note_batch = found, note_batch
    self._config = _few_widths(found.config)
    forward = evaluate.forward_of(found)
    self._logits = {size: evaluate.make_logits(
        _sized(self._config, size), forward, found.ngrams.annotate)
                    for size in _SIZES}
    self._explanation = explain.make_explain(
        self._config, found.model, found.ngrams)
    self._plain: collections.deque[_Waiting] = collections.deque()
    self._explained: collections.deque[_Waiting] = collections.deque()
    self._changed = threading.Condition()

  def warm(self) -> None:
    """Compiles all that any text will need, or loads it."""
    for length in _lengths(self._config):
      text = 'a ' * (length - 1)  # and the start
      for size in _SIZES:
        self._predict([text] * size)
      self._predict([text], self._explanation)

  def ask(self, texts: Sequence[str], explained: bool = False,
          ) -> list[concurrent.futures.Future[dict[str, Any]]]:
    """Lets texts wait; each future will have what `predict.predict` yields.

    Raises Full if they are too many with those that wait. A future that is
    cancelled in time costs nothing.
    """
    waiting, most = ((self._explained, MOST_EXPLAINED_WAITING) if explained
                     else (self._plain, MOST_WAITING))
    new = [_Waiting(text, concurrent.futures.Future()) for text in texts]
    with self._changed:
      if len(waiting) + len(new) > most:
        raise Full
      waiting.extend(new)
      self._changed.notify()
    return [one.answer for one in new]

  def waiting(self) -> int:
    """How many texts wait now."""
    return len(self._plain) + len(self._explained)

  def work(self, seconds: float) -> None:
    """Answers a batch of what waits and one explanation, or waits for some.

    Returns after so many seconds if nothing has come.
    """
    with self._changed:
      self._changed.wait_for(self.waiting, seconds)
      plain = _take(self._plain, _SIZES[-1])
      explained = _take(self._explained, 1)
    self._answer(plain)
    self._answer(explained, self._explanation)

  def _answer(self, some: Sequence[_Waiting],
              explanation: explain.Explain | None = None) -> None:
    some = [one for one in some if one.answer.set_running_or_notify_cancel()]
    if not some:
      return
    self._note_batch(len(some))
    try:
      found = self._predict([one.text for one in some], explanation)
    except Exception as e:  # those who asked tell of it
      for one in some:
        one.answer.set_exception(e)
      return
    for one, prediction in zip(some, found, strict=True):
      one.answer.set_result(prediction)

  def _predict(self, texts: Sequence[str],
               explanation: explain.Explain | None = None,
               ) -> list[dict[str, Any]]:
    size = next(size for size in _SIZES if size >= len(texts))
    return list(predict.predict(
        self._logits[size], self._run.params, self._run.tokenizer, texts,
        self._run.labels, self._run.temperature, explanation))


def _take(waiting: collections.deque[_Waiting], most: int) -> list[_Waiting]:
  return [waiting.popleft() for _ in range(min(most, len(waiting)))]


def _sized(config: ConfigDict, size: int) -> ConfigDict:
  config = config.copy_and_resolve_references()
  config.eval_batch_size = size
  return config


def _few_widths(config: ConfigDict) -> ConfigDict:
  """With buckets so wide that there are four; padding changes no answer."""
  config = config.copy_and_resolve_references()
  data = config.data
  if data.bucket_width:
    data.bucket_width = max(data.bucket_width, -(-data.max_length // _WIDTHS))
  return config


def _lengths(config: ConfigDict) -> list[int]:
  """Tokens of texts, one for each shape that a program can have."""
  reading, longest = Reading.of(config.data), config.data.max_length
  if reading.segment_length:  # see `explain`: a power of two of segments
    lengths, length = [], reading.segment_length
    while length < longest:
      lengths.append(length)
      length *= 2
    return [*lengths, longest]
  width = reading.bucket_width or longest
  return [*range(width, longest, width), longest]
