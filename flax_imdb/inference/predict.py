"""Raw texts in, labels and probabilities out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import html
import io
import json
import math
import select
import sys
import time
from typing import Any, NoReturn

import numpy as np
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from flax_imdb.checkpoint import run
from flax_imdb.data.reviews import encode_reviews
from flax_imdb.data.tokenizer import UNKNOWN_ID, spans
from flax_imdb.errors import UserError
from flax_imdb.inference import evaluate, explain, highlight
from flax_imdb.storage import files

# Some 2,000 reviews, which take 0.5 GB at most to encode. A line takes memory
# beside its bytes, also if it is empty.
_PART_BYTES, _LINE_BYTES = 1 << 22, 1000
# The longest review of IMDB has 14,000; a million, if each is a word of its own
# as in Chinese, take 0.5 GB to encode.
_MOST_CHARACTERS = 1 << 20
_MOST_BYTES = 4 * _MOST_CHARACTERS + 1  # of these in UTF-8, and a CR
_CHUNK_BYTES = 1 << 16  # what a pipe holds
# Who writes a line is given so long for the next one, for many are answered
# faster than one by one; and no line waits longer than that for others.
_PAUSE_SECONDS, _WAIT_SECONDS = 0.005, 0.05


def predict_run(workdir: str, which: str | None, parts: Iterable[Sequence[str]],
                as_json: bool, explained: bool = False,
                page: str | None = None) -> None:
  """Prints `prediction_text` for each review, or what `predict` returns.

  Each part is answered before the next one is taken. If they are `explained`,
  words are coloured on a terminal, and written to a `page`, a file of HTML.
  `which` and errors as of `run.restore`, and of `files.writing`.
  """
  found = run.restore(workdir, which)
  logits = evaluate.make_logits(
      found.config, evaluate.forward_of(found), found.ngrams.annotate)
  explanation = explain.make_explain(
      found.config, found.model, found.ngrams) if explained else None
  console = Console(highlight=False, soft_wrap=True)
  colours = (sys.stdout.isatty() and not console.no_color
             and console.color_system is not None)
  is_utf8 = (sys.stdout.encoding or 'utf-8').lower().startswith('utf')
  with contextlib.ExitStack() as stack:
    write_page: Callable[[str], None] | None = None
    for part in parts:
      for prediction in predict(
          logits, found.params, found.tokenizer, part, found.labels,
          found.temperature, explanation):
        if page and not write_page:  # not before there is something to write
          write_page = stack.enter_context(_writing_page(
              page, found.labels))
        if write_page:
          write_page(highlight.page_review(prediction))
        with files.writing('standard output'):
          if as_json:
            print(json.dumps(prediction, ensure_ascii=not is_utf8))
          elif explained and colours:
            console.print(_coloured_text(prediction))
          else:
            print(prediction_text(prediction))
          if explained:
            sys.stdout.flush()
      with files.writing('standard output'):
        sys.stdout.flush()  # whoever wrote the lines may wait for it


@contextlib.contextmanager
def _writing_page(
    path: str, labels: Sequence[str]) -> Iterator[Callable[[str], None]]:
  """Opens a page and yields what adds to it, so that it is whole each time."""
  def fail(error: OSError) -> NoReturn:
    files.raise_failure(error, f'cannot write {path}', 'give another --html')
    raise error
  try:
    file = open(path, 'w', encoding='utf-8')
  except OSError as e:
    fail(e)
  def write(content: str) -> None:
    try:
      file.write(content)
      file.flush()
    except OSError as e:
      fail(e)
  with file:
    write(highlight.PAGE % html.escape(
        labels[1] if len(labels) == 2 else 'what is predicted'))
    yield write


def read_reviews(
    words: Sequence[str], file: str | None) -> Iterator[Sequence[str]]:
  """One review of these words, or else one a line of a file, in parts.

  `file` is None for standard input. A part has the lines that are there, up to
  some 2,000 of them: whoever writes one and waits is answered, and a pipe need
  not end. Raises UserError if both are given; and between parts, once all lines
  before were in one, if the file can't be read, has no lines, or one that is
  too long or not UTF-8.
  """
  if not words:
    return _read(file)
  if file:
    raise UserError('give a review after the flags or --input, not both')
  return iter([[' '.join(words)]])


def _read(file: str | None) -> Iterator[Sequence[str]]:
  source = file or 'standard input'
  try:
    if file or sys.stdin:
      with open(file or sys.stdin.fileno(), 'rb', buffering=0,
                closefd=bool(file)) as stream:
        yield from _parts(stream, source)
    else:  # it is closed
      yield from _parts(io.BytesIO(), source)
  except OSError as e:
    raise UserError(f'cannot read {source} ({e.strerror or e})') from e


def _parts(stream: io.RawIOBase | io.BytesIO,
           source: str) -> Iterator[Sequence[str]]:
  part: list[str] = []
  size, number, rest, ended = 0, 0, b'', False
  while not ended:
    # None of a file that does not wait: then this does.
    while (chunk := stream.read(_CHUNK_BYTES)) is None:
      select.select([stream], [], [])
    ended = not chunk
    *lines, rest = (rest + chunk).split(b'\n')
    if rest and (ended or len(rest) > _MOST_BYTES):
      lines.append(rest)
    for line in lines:
      number += 1
      if not part:
        until = time.monotonic() + _WAIT_SECONDS
      try:
        part.append(_review(line, source, number))
      except UserError:
        if part:
          yield part
        raise
      size += len(line) + _LINE_BYTES
      if size > _PART_BYTES:
        yield part
        part, size = [], 0
    if part and (ended or time.monotonic() > until or not select.select(
        [stream], [], [], _PAUSE_SECONDS)[0]):
      yield part
      part, size = [], 0
  if not number:
    raise UserError(f'{source} is empty: give one review a line')


def _review(line: bytes, source: str, number: int) -> str:
  """The text of a line; UserError, with its number, if it can't be one."""
  long = UserError(
      f'{source} has more than {_MOST_CHARACTERS:,} characters in line '
      f'{number}: give one review a line')
  if len(line) > _MOST_BYTES:
    raise long
  try:
    text = line.removesuffix(b'\r').decode('utf-8')
  except UnicodeDecodeError as e:
    raise UserError(f'{source} is not UTF-8 in line {number}: convert it, for '
                    'instance with iconv -t UTF-8') from e
  if len(text) > _MOST_CHARACTERS:
    raise long
  return text


def predict(logits: evaluate.Logits, params: Any, tokenizer: Tokenizer,
            texts: Sequence[str], labels: Sequence[str],
            temperature: float = 1.0,
            explanation: explain.Explain | None = None,
            ) -> Iterator[dict[str, Any]]:
  """Yields label, probability and text, for each text.

  `labels` are the names of the classes. Of two the probability is that of the
  second one, of a positive review; of more it is that of the label, and
  `probabilities` has those of all by name. They are those of logits /
  temperature, see `run.Run`; the label is that of the logits. And a note where
  the text is empty or has only words not in the tokenizer. With an
  `explanation` also words, a list of [begin, end, score] of text[begin:end],
  baseline and gap; see `explain.Explanation`.
  """
  reviews = encode_reviews(tokenizer, texts)
  rows = np.split(reviews.ids, reviews.offsets[1:-1])
  found = logits(params, reviews)
  for i, (text, row, z, best) in enumerate(
      zip(texts, rows, found, evaluate.predicted(found), strict=True)):
    prediction: dict[str, Any] = {'label': labels[best]}
    if len(labels) == 2:
      prediction['probability'] = probability(float(z) / temperature)
    else:
      each = probabilities([x / temperature for x in z.tolist()])
      prediction |= {'probability': each[best],
                     'probabilities': dict(zip(labels, each, strict=True))}
    prediction['text'] = text
    if len(row) == 1:
      prediction['note'] = 'no words'
    elif (row[1:] == UNKNOWN_ID).all():
      prediction['note'] = 'only unknown words'
    if explanation:
      parts = explanation(params, reviews[i:i + 1], z)
      prediction |= {
          'words': _words(spans(tokenizer, text), parts.scores.tolist()),
          'baseline': parts.baseline, 'gap': parts.gap}
    yield prediction


def _words(places: Sequence[tuple[int, int]],
           scores: Sequence[float]) -> list[list[Any]]:
  """[begin, end, score] each; all that one entity stands for is one word."""
  found: list[list[Any]] = []
  for (begin, end), score in zip(places, scores, strict=True):
    if found and begin < found[-1][1]:
      found[-1][1:] = max(end, found[-1][1]), found[-1][2] + score
    else:
      found.append([begin, end, score])
  return found


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
  """One line about what `predict` returned for a text.

  And one about its words, if there is something.
  """
  start, note = _around(prediction)
  line = f'{start}{prediction["text"]}{note}'
  if 'words' not in prediction:
    return line
  words = highlight.strongest(prediction['text'], prediction['words'])
  return f'{line}\n  {words}{"  " * bool(words)}({highlight.sums(prediction)})'


def _coloured_text(prediction: dict[str, Any]) -> Text:
  """The same with the words themselves coloured."""
  start, note = _around(prediction)
  return Text.assemble(
      start, highlight.coloured(prediction['text'], prediction['words']),
      f'{note}\n  ({highlight.sums(prediction)})')


def _around(prediction: dict[str, Any]) -> tuple[str, str]:
  """What is said before the text and after it."""
  note = f'  ({prediction["note"]})' if 'note' in prediction else ''
  return f'{prediction["label"]} {prediction["probability"]:.3f}  ', note
