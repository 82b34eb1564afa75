"""Text to token ids: the only encoder of the program.

Training, evaluation and prediction all call `encode`; the fitted tokenizer is
saved as `tokenizer.json` in the run directory, so they can't disagree.

Ids as in Keras' IMDB: 0 padding, 1 start of review, 2 unknown word, 3 never
used, words from 4 by falling frequency.

`_build` has the rules for what a word is, as `tokenizers` keeps them in the
file. Nearly all texts are read by `_words` with `re`, five times as fast.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import html
import itertools
import json
import os
import re
import unicodedata

import numpy as np
from tokenizers import (
  Regex,
  Tokenizer,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from flax_imdb.errors import UserError
from flax_imdb.storage import files

PADDING_ID, START_ID, UNKNOWN_ID, FIRST_WORD_ID = 0, 1, 2, 4
_SPECIAL = ['[PAD]', '[START]', '[UNK]', '[UNUSED]']  # their ids, in order

# Part of the key of the ids cache: raise it when `encode` changes its answer,
# and keep the rules before in `_build`, for the run directories made with them.
VERSION = 2
# Of tokenizer.json: a million words of 20 letters. What is read takes 20 times
# as much memory at worst.
_MOST_BYTES = 1 << 25
_MOST_WORDS = 1 << 22  # distinct ones, counted at a time: some 0.5 GB

# &eacute; and &#39;, which `tokenizers` has no rule for. They are bounded, for
# html.unescape raises at a number of 5,000 digits, and have their semicolon, or
# in AT&notes it would see a logical not.
_ENTITY = re.compile(r'&#?\w{1,32};', re.ASCII)
# After lower case, and of any name, as a browser does it: not 'a < b' or '<3'.
_TAG = r'</?[a-z][^<>]*>'
_APOSTROPHES = '\u2019\u02bc\u00b4`'  # what is typed for ' inside words
# Scripts that put no space between words: each character is one, with its
# marks. Other words are letters and digits, with apostrophes inside.
_UNSPACED = (r'\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}'
             r'\p{Myanmar}')
_PART = (rf'[\p{{L}}\p{{Nd}}&&[^{_UNSPACED}]]'
         rf'[\p{{L}}\p{{Nd}}\p{{M}}&&[^{_UNSPACED}]]*')
_MARKS = '[!?.,;:()"*]'  # what may be a word of its own, each time it comes
_WORD = rf"[{_UNSPACED}]\p{{M}}*|{_PART}(?:'{_PART})*"
# Where `re` and `tokenizers` agree: no marks to compose, and lower case is that
# of each character. Not so the dotted capital I, which becomes two of them.
_LATIN = '\0-\u012f\u0131-\u017f\u2010-\u2027'
_NOT_LATIN = re.compile(f'[^{_LATIN}]')
_LATIN_PART = '[0-9a-z\u00aa\u00b5\u00ba\u00df-\u00f6\u00f8-\u017f]+'
_LATIN_WORD = f"{_LATIN_PART}(?:'{_LATIN_PART})*"
# Without and with marks.
_LATIN_WORDS = re.compile(_LATIN_WORD), re.compile(f'{_LATIN_WORD}|{_MARKS}')
_LATIN_TAG = re.compile(_TAG)
_MOST_MARKS = 30  # on a letter, as of the Unicode Standard's Annex 15


def _build(words: Iterable[str], marks: bool = False,
           version: int = VERSION) -> Tokenizer:
  """A tokenizer of these words, with the rules of a version of this module.

  `marks` are words, too, but not of version 1.
  """
  vocab = {word: i for i, word in enumerate([*_SPECIAL, *words])}
  ' '.join(vocab).encode()  # the library tells half a character in ten lines
  tokenizer = Tokenizer(models.WordLevel(vocab, unk_token='[UNK]'))
  if version == 1:
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r'<br\s*/?>'), ' '),
        normalizers.Replace('\u2019', "'"),
        normalizers.Replace(
            Regex(r"[^\w\s']|_|(?<![^\W_])'|'(?![^\W_])"), ' '),
    ])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  else:
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFC(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(_TAG), ' '),
        normalizers.Replace(Regex(f'[{_APOSTROPHES}]'), "'"),
    ])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(f'{_WORD}|{_MARKS}' if marks else _WORD), 'removed', invert=True)
  tokenizer.post_processor = processors.TemplateProcessing(
      single='[START] $A', special_tokens=[('[START]', START_ID)])
  tokenizer.add_special_tokens(_SPECIAL)
  tokenizer.encode_special_tokens = True  # a review that says [PAD] is text
  return tokenizer


def unescapes(tokenizer: Tokenizer) -> bool:
  """Whether `encode` reads HTML's entities first; not of version 1."""
  return not isinstance(
      tokenizer.pre_tokenizer, pre_tokenizers.WhitespaceSplit)


_RULES = _build([]), _build([], marks=True)


def reads_marks(tokenizer: Tokenizer) -> bool:
  """Whether marks are words of a tokenizer of this version."""
  return _state(tokenizer) == _state(_RULES[True])


def _state(tokenizer: Tokenizer) -> bytes:
  assert tokenizer.pre_tokenizer is not None
  return tokenizer.pre_tokenizer.__getstate__()


def _words(text: str, marks: bool) -> list[str]:
  """The words of a text by the rules of this version, entities read first."""
  text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
  if not text.isascii() and _NOT_LATIN.search(text):
    # Not their truth: in tokenizers 0.21 a sequence has a length, of 0.
    rules = _RULES[marks]
    assert rules.normalizer is not None and rules.pre_tokenizer is not None
    return [word for word, _ in rules.pre_tokenizer.pre_tokenize_str(
        rules.normalizer.normalize_str(text))]
  text = _LATIN_TAG.sub(' ', text.lower())
  for mark in _APOSTROPHES:
    text = text.replace(mark, "'")
  return _LATIN_WORDS[marks].findall(text)


class Vocabulary:
  """Counts the words of texts, part by part, until the commonest are known.

  Memory holds the distinct words, up to some four million of them: then those
  that have come once at most are forgotten.

  Attributes:
    forgot: whether words were. One that comes again has another number then.
  """

  def __init__(self) -> None:
    self._numbers = {_SPECIAL[START_ID]: 0}
    self._next = 1
    self.forgot = False
    self._limit = _MOST_WORDS  # more where more come twice
    self._counts = np.zeros(1 << 16, np.int64)  # by number; longer if need be

  def add(self, words: Sequence[str], counts: np.ndarray) -> np.ndarray:
    """Adds words of `number_words`, and int [words] how often each came.

    Returns int32 [words], the number of each word here, which stays its own
    until it is forgotten.
    """
    if len(self._numbers) > self._limit:
      self._numbers = {word: i for word, i in self._numbers.items()
                       if self._counts[i] > 1 or not i}
      self._limit = max(_MOST_WORDS, 2 * len(self._numbers))
      self.forgot = True
    numbers = np.empty(len(words), np.int32)
    for place, word in enumerate(words):
      number = self._numbers.get(word)
      if number is None:
        number = self._numbers[word] = self._next
        self._next += 1
      numbers[place] = number
    if self._next > len(self._counts):
      self._counts = np.pad(self._counts, (0, self._next))
    self._counts[numbers] += counts
    return numbers

  def learn(self, vocab_size: int,
            marks: bool = False) -> tuple[Tokenizer, np.ndarray]:
    """Makes the tokenizer of the words that came most often.

    As `fit_tokenizer`. Also returns int32 [numbers], the id of each number.
    """
    counts, most = self._counts[:self._next], vocab_size - FIRST_WORD_ID
    least = 1
    if self._next - 1 > most:  # of the words, no more than can be taken
      least = max(1, np.partition(counts[1:], -most)[-most])
    learned = sorted(
        ((word, i) for word, i in self._numbers.items()
         if i and counts[i] >= least),
        key=lambda item: (-counts[item[1]], item[0]))[:most]
    ids = np.full(self._next, UNKNOWN_ID, np.int32)
    ids[0] = START_ID
    ids[[i for _, i in learned]] = np.arange(len(learned)) + FIRST_WORD_ID
    return _build((word for word, _ in learned), marks), ids


def number_words(texts: Sequence[str], marks: bool) -> tuple[
    list[str], np.ndarray, np.ndarray]:
  """Numbers the words of n texts in the order in which they come.

  Returns the distinct words, of which the first stands for `START_ID`; int32
  [tokens], the place of each token in these; and int64 [n], the tokens of each
  text, its start included.
  """
  numbers = collections.defaultdict(
      itertools.count(1).__next__, {_SPECIAL[START_ID]: 0})
  rows = [np.fromiter(map(numbers.__getitem__, [
      _SPECIAL[START_ID], *_words(text, marks)]), np.int32) for text in texts]
  return (list(numbers), np.concatenate([np.zeros(0, np.int32), *rows]),
          np.array([len(row) for row in rows], np.int64))


def fit_tokenizer(texts: Iterable[str], vocab_size: int,
                  marks: bool = False) -> Tokenizer:
  """Learns the most frequent words of reviews: of the training split alone.

  Returns a word-level tokenizer of at most `vocab_size` ids, at least 5, the 4
  special ones included: lower case, NFC, HTML's tags and entities and
  punctuation read as what they mean or as a space, apostrophes inside words
  kept, each character of a script without spaces a word, words of equal
  frequency in alphabetical order. With `marks`, ! ? . , ; : ( ) " and * are
  words, too.
  """
  vocabulary = Vocabulary()
  words, numbers, _ = number_words(list(texts), marks)
  vocabulary.add(words, np.bincount(numbers, minlength=len(words)))
  return vocabulary.learn(vocab_size, marks)[0]


def word_index_tokenizer(
    path: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
  """The words of Keras' imdb_word_index.json, {word: rank}, 1 the commonest.

  Returns a tokenizer of at most `vocab_size` ids, which are those of
  keras.datasets.imdb.load_data(num_words=vocab_size): rank + 3, the rarer words
  unknown. Raises UserError if the file is missing, too large or another.
  """
  fix = 'give the imdb_word_index.json of Keras as config.data.word_index'
  content = files.read_bytes(path, _MOST_BYTES, fix)
  try:
    ranks = json.loads(content)
    words = sorted(ranks, key=ranks.__getitem__)
    if not words or [ranks[w] for w in words] != [*range(1, len(words) + 1)]:
      raise ValueError('its ranks are not 1, 2, 3, ...')
    if special := set(words) & {*_SPECIAL}:
      raise ValueError(f'{special.pop()} is no word')
    return _build(words[:vocab_size - FIRST_WORD_ID])
  except Exception as e:  # whatever the file holds
    raise UserError(
        f'{os.fspath(path)} is not a word index ({e}): {fix}') from e


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
  """One int32 array a review: `START_ID`, then the ids of all its words."""
  if not unescapes(tokenizer):
    return [np.asarray(encoding.ids, np.int32)
            for encoding in tokenizer.encode_batch_fast(list(texts))]
  if not texts:  # of nothing np.split makes one
    return []
  words, numbers, lengths = number_words(texts, reads_marks(tokenizer))
  return np.split(ids_of(tokenizer)(words)[numbers], np.cumsum(lengths)[:-1])


def spans(tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
  """Where each word that `encode` finds begins and ends: text[begin:end].

  As many as there are ids after `START_ID`. All characters of an entity belong
  to what it stands for, as do those that are composed to one letter.
  """
  read, places = text, range(len(text))
  first: Sequence[int] = places
  last: Sequence[int] = places
  if unescapes(tokenizer):
    # The library is given NFC: its own leaves marks out of the last letter.
    for pieces in _entities, _compositions:
      read, first_here, last_here = _replace(read, pieces(read))
      first = [first[i] for i in first_here]
      last = [last[i] for i in last_here]
  return [(first[begin], last[end - 1] + 1)
          for begin, end in tokenizer.encode(read).offsets[1:]]


_Piece = tuple[int, int, str]  # of a text: begin, end, what is read for it


def _replace(text: str, pieces: Iterable[_Piece]) -> tuple[
    str, Sequence[int], Sequence[int]]:
  """A text with pieces replaced, which ascend.

  Also the place in `text` of the first character that each of it was made of,
  and of the last.
  """
  parts: list[str] = []
  first: list[int] = []
  last: list[int] = []
  done = 0
  for begin, end, new in [*pieces, (len(text), len(text), '')]:
    parts += text[done:begin], new
    first += [*range(done, begin), *[begin] * len(new)]
    last += [*range(done, begin), *[end - 1] * len(new)]
    done = end
  return ''.join(parts), first, last


def _entities(text: str) -> Iterator[_Piece]:
  """What `_words` reads as something else; &D; is none."""
  return ((entity.start(), entity.end(), new)
          for entity in _ENTITY.finditer(text)
          if (new := html.unescape(entity[0])) != entity[0])


def _compositions(text: str) -> Iterator[_Piece]:
  """The characters that NFC makes something else of, with what they join."""
  if not _NOT_LATIN.search(text):
    return
  def nfc(begin: int, end: int) -> str:
    return unicodedata.normalize('NFC', text[begin:end])
  begin = 0
  for end in range(1, len(text) + 1):
    # Not where the next character joins the letter, or is sorted into it. Marks
    # without end would take for ever to sort.
    if end == len(text) or end - begin > _MOST_MARKS or (
        not unicodedata.combining(text[end])
        and nfc(begin, end + 1) == nfc(begin, end) + nfc(end, end + 1)):
      if nfc(begin, end) != text[begin:end]:
        yield begin, end, nfc(begin, end)
      begin = end


def ids_of(tokenizer: Tokenizer) -> Callable[[Sequence[str]], np.ndarray]:
  """Makes a function of distinct words, as of `number_words`, to int32 ids."""
  # Not `get_vocab`, which copies all words: that takes longer than a review.
  def ids(words: Sequence[str]) -> np.ndarray:
    found = map(tokenizer.token_to_id, words[1:])
    return np.array([START_ID, *(
        UNKNOWN_ID if i is None else i for i in found)], np.int32)
  return ids


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
  """Writes `tokenizer.json`; UserError if it is too large to load again."""
  content = tokenizer.to_str(pretty=True).encode()
  if len(content) > _MOST_BYTES:
    raise UserError(f'the words take {len(content):,} bytes, more than '
                    f'{_MOST_BYTES:,}: lower config.data.vocab_size')
  files.write(path, content)


def load_tokenizer(path: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
  """Reads what `save_tokenizer` wrote, in which only the words may differ.

  Of this version or one before, by whose rules texts are then read. The file
  may be a stranger's: another normalizer's pattern could take for ever, and the
  embedding would clip an id that is too large without a word. Raises UserError
  if it is missing, or is none of at most `vocab_size` ids that `_build` makes.
  """
  content = files.read_bytes(path, _MOST_BYTES)
  try:
    found = json.loads(content)
    vocab = found['model']['vocab']
    words = sorted(vocab, key=vocab.__getitem__)
    if (words[:len(_SPECIAL)] != _SPECIAL
        or [vocab[word] for word in words] != list(range(len(words)))):
      raise ValueError('its ids are not 0, 1, 2, ..., special ones first')
    if len(words) > vocab_size:
      raise ValueError(f'it has {len(words)} ids, config.data.vocab_size is '
                       f'{vocab_size}')
    # Made anew, not of the file's text, of which another reader may make
    # something else.
    for marks, version in ((False, VERSION), (True, VERSION), (False, 1)):
      rules = json.loads(_state(_build([], marks, version)))
      if rules == found.get('pre_tokenizer'):  # all others differ in this, too
        tokenizer = _build(words[len(_SPECIAL):], marks, version)
        if json.loads(tokenizer.to_str()) == found:
          return tokenizer
    raise ValueError('it reads texts by other rules than this version')
  except Exception as e:  # whatever the file holds; the library raises it bare
    raise UserError(
        f'{os.fspath(path)} is not a tokenizer ({e}): copy it again from the '
        'run directory, or train again') from e
