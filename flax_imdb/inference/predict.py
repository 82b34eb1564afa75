"""Raw texts in, labels and probabilities out."""

from collections.abc import Iterator, Sequence
import json
import math
import sys
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from flax_imdb.checkpoint import run
from flax_imdb.data.reviews import encode_reviews
from flax_imdb.data.tokenizer import UNKNOWN_ID
from flax_imdb.errors import UserError
from flax_imdb.inference import evaluate
from flax_imdb.storage import files

_PART_CHARACTERS = 1 << 22  # some 2,000 reviews
# Bytes: some 50,000 reviews of IMDB. They are read whole, so that a mistake in
# the last one is told before the first is predicted.
_MOST_BYTES = 64 << 20
# The longest review of IMDB has 14,000; a million, if each is a word of its own
# as in Chinese, take 0.5 GB to encode.
_MOST_CHARACTERS = 1 << 20


def predict_run(workdir: str, which: str | None, texts: Sequence[str],
                as_json: bool) -> None:
  """Prints `prediction_text` for each review, or what `predict` returns.

  `which` and errors as of `run.restore`, and of `files.writing`.
  """
  found = run.restore(workdir, which)
  logits = evaluate.make_logits(
      found.config, evaluate.forward_of(found), found.ngrams.annotate)
  for part in _parts(texts):
    for prediction in predict(
        logits, found.params, found.tokenizer, part, found.labels,
        found.temperature):
      with files.writing('standard output'):
        print(json.dumps(prediction, ensure_ascii=False) if as_json
              else prediction_text(prediction))


def read_reviews(words: Sequence[str], file: str | None) -> list[str]:
  """One review of these words, or else one a line of a file.

  `file` is None for standard input. Raises UserError if both are given, or the
  lines can't be read, are none, are too many, too long or not UTF-8.
  """
  if words:
    if file:
      raise UserError('give a review after the flags or --input, not both')
    return [' '.join(words)]
  source = file or 'standard input'
  try:
    if file:
      with open(file, 'rb') as f:
        raw = f.read(_MOST_BYTES + 1)  # a pipe may never end
    else:  # None if it is closed
      raw = sys.stdin.buffer.read(_MOST_BYTES + 1) if sys.stdin else b''
    if len(raw) > _MOST_BYTES:
      raise UserError(f'{source} has more than {_MOST_BYTES:,} bytes: divide '
                      'it, for instance with split -C 64M')
    text = raw.decode('utf-8')
  except OSError as e:
    raise UserError(f'cannot read {source} ({e.strerror})') from e
  except UnicodeDecodeError as e:
    line = raw[:e.start].count(b'\n') + 1
    raise UserError(f'{source} is not UTF-8 in line {line}: convert it, for '
                    'instance with iconv -t UTF-8') from e
  if not text:
    raise UserError(f'{source} is empty: give one review a line')
  # splitlines() would also split where a review has a form feed.
  lines = text.replace('\r\n', '\n').removesuffix('\n').split('\n')
  for number, review in enumerate(lines, 1):
    if len(review) > _MOST_CHARACTERS:
      raise UserError(
          f'{source} has {len(review):,} characters in line {number}, more '
          f'than {_MOST_CHARACTERS:,}: give one review a line')
  return lines


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
  """Divides texts so that the encoding of each part takes 0.5 GB at most."""
  start = size = 0
  for stop, text in enumerate(texts, 1):
    size += len(text) + 1000  # an empty one takes memory, too
    if size > _PART_CHARACTERS or stop == len(texts):
      yield texts[start:stop]
      start, size = stop, 0


def predict(logits: evaluate.Logits, params: Any, tokenizer: Tokenizer,
            texts: Sequence[str], labels: Sequence[str],
            temperature: float = 1.0) -> list[dict[str, Any]]:
  """Returns label, probability and text, for each text.

  `labels` are the names of the classes. Of two the probability is that of the
  second one, of a positive review; of more it is that of the label, and
  `probabilities` has those of all by name. They are those of logits /
  temperature, see `run.Run`; the label is that of the logits. And a note where
  the text is empty or has only words not in the tokenizer.
  """
  reviews = encode_reviews(tokenizer, texts)
  rows = np.split(reviews.ids, reviews.offsets[1:-1])
  predictions: list[dict[str, Any]] = []
  for text, row, z in zip(texts, rows, logits(params, reviews), strict=True):
    if len(labels) == 2:
      prediction = {'label': labels[int(z > 0)],
                    'probability': probability(float(z) / temperature)}
    else:
      each = probabilities([x / temperature for x in z.tolist()])
      best = int(z.argmax())
      prediction = {'label': labels[best], 'probability': each[best],
                    'probabilities': dict(zip(labels, each, strict=True))}
    prediction['text'] = text
    if len(row) == 1:
      prediction['note'] = 'no words'
    elif (row[1:] == UNKNOWN_ID).all():
      prediction['note'] = 'only unknown words'
    predictions.append(prediction)
  return predictions


def probability(logit: float) -> float:
  """The probability of a positive review: the logistic function."""
  odds = math.exp(-abs(logit))  # of a negative number: it can't overflow
  return 1 / (1 + odds) if logit > 0 else odds / (1 + odds)


def probabilities(logits: Sequence[float]) -> list[float]:
  """The probability of each class: the softmax."""
  most = max(logits)
  odds = [math.exp(z - most) for z in logits]
  total = math.fsum(odds)  # the same in any version of Python
  return [x / total for x in odds]


def prediction_text(prediction: dict[str, Any]) -> str:
  """One line about what `predict` returned for a text."""
  note = f'  ({prediction["note"]})' if 'note' in prediction else ''
  return (f'{prediction["label"]} {prediction["probability"]:.3f}  '
          f'{prediction["text"]}{note}')
