"""The most confident mistakes: their texts, and which words decided."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from flax_imdb.checkpoint import run
from flax_imdb.data import sources
from flax_imdb.inference import evaluate, explain, highlight, predict

_MOST_CHARACTERS = 1200  # of a text that are shown


@dataclasses.dataclass(frozen=True, eq=False)
class Mistake:
  """A review of test that is taken for another class than its own."""
  is_class: str
  predicted: str
  probability: float  # of what is predicted
  note: str  # of what is left out of the text; or ''
  text: str
  words: list[highlight.Word]  # of the text
  sums: str  # see `highlight.sums`


def explained(restored: run.Run, logits: evaluate.Logits, rows: Sequence[int],
              labels: np.ndarray) -> list[Mistake]:
  """The reviews of these rows of config.data.test_split, with their words.

  `logits` are those of `evaluate.make_logits`; `labels` int [n] are those of
  all rows. Raises UserError as `sources.read_texts`.
  """
  if not rows:
    return []
  data = restored.config.data
  texts = [sources.read_texts(data, data.test_split, row, row + 1)[0][0]
           for row in rows]
  explanation = explain.make_explain(
      restored.config, restored.model, restored.ngrams)
  found = predict.predict(
      logits, restored.params, restored.tokenizer, texts, restored.labels,
      restored.temperature, explanation)
  return [_mistake(prediction, restored.labels[labels[row]], restored.labels)
          for row, prediction in zip(rows, found, strict=True)]


def _mistake(prediction: dict[str, Any], is_class: str,
             labels: Sequence[str]) -> Mistake:
  predicted, probability = prediction['label'], prediction['probability']
  if len(labels) == 2 and predicted == labels[0]:
    probability = 1 - probability
  text, words, note = excerpt(prediction['text'], prediction['words'])
  return Mistake(is_class, predicted, probability, note, text, words,
                 highlight.sums(prediction))


def excerpt(text: str, words: Sequence[highlight.Word]) -> tuple[
    str, list[highlight.Word], str]:
  """The part of a text whose words count most, and what it is of the whole.

  At most 1,200 characters, in which the sum of the words' scores, without
  signs, is the largest, between dots; its words, placed anew; and '' if it is
  all.
  """
  if len(text) <= _MOST_CHARACTERS:
    return text, list(words), ''
  first = stop = begin = 0
  end = _MOST_CHARACTERS
  if words:
    begins = np.array([word[0] for word in words])
    ends = np.array([word[1] for word in words])
    totals = np.concatenate([[0], np.cumsum([abs(word[2]) for word in words])])
    # Of each word, the first after those that fit behind it.
    stops = np.searchsorted(ends, begins + _MOST_CHARACTERS, 'right')
    first = int(np.argmax(totals[stops] - totals[:len(words)]))
    stop = int(max(stops[first], first + 1))
    if stop == len(words):  # there is room for some before
      fits = np.searchsorted(begins, ends[-1] - _MOST_CHARACTERS)
      first = min(first, int(fits))
    begin = int(begins[first])
    end = min(int(ends[stop - 1]), begin + _MOST_CHARACTERS)
  before, after = '…' * (begin > 0), '…' * (end < len(text))
  return before + text[begin:end] + after, [
      [a - begin + len(before), min(b, end) - begin + len(before), score]
      for a, b, score in words[first:stop]], (
          f'{end - begin:,} of its {len(text):,} characters, where its words '
          'count most')
