"""Text to token ids: the only encoder of the program.

Training, evaluation and prediction all call `encode`; the fitted tokenizer is
saved as `tokenizer.json` in the run directory, so they can't disagree.

Ids as in Keras' IMDB: 0 padding, 1 start of review, 2 unknown word, 3 never
used, words from 4 by falling frequency.
"""

from collections.abc import Iterable, Sequence
import json
import os

import numpy as np
from tokenizers import (
  Regex,
  Tokenizer,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from flax_imdb.errors import UserError
from flax_imdb.storage import files

PADDING_ID, START_ID, UNKNOWN_ID, FIRST_WORD_ID = 0, 1, 2, 4
_SPECIAL = ['[PAD]', '[START]', '[UNK]', '[UNUSED]']  # their ids, in order

# Part of the key of the ids cache: raise it when `encode` changes its answer.
VERSION = 1
# Of tokenizer.json: a million words of 20 letters. What is read takes 20 times
# as much memory at worst.
_MOST_BYTES = 1 << 25


def fit_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Learns the most frequent words of reviews: of the training split alone.

  Returns a word-level tokenizer of at most `vocab_size` ids, at least 5, the 4
  special ones included: lower case, `<br />` and punctuation read as a space,
  apostrophes inside words kept, words of equal frequency in alphabetical order.
  """
  tokenizer = Tokenizer(models.WordLevel(unk_token='[UNK]'))
  tokenizer.normalizer = normalizers.Sequence([
      normalizers.Lowercase(),
      normalizers.Replace(Regex(r'<br\s*/?>'), ' '),
      normalizers.Replace('\u2019', "'"),  # so that don\u2019t is don't
      normalizers.Replace(Regex(r"[^\w\s']|_|(?<![^\W_])'|'(?![^\W_])"), ' '),
  ])
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer.post_processor = processors.TemplateProcessing(
      single='[START] $A', special_tokens=[('[START]', START_ID)])
  trainer = trainers.WordLevelTrainer(
      vocab_size=vocab_size, special_tokens=_SPECIAL, show_progress=False)
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.encode_special_tokens = True  # a review that says [PAD] is text
  return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
  """One int32 array a review: `START_ID`, then the ids of all its words."""
  encodings = tokenizer.encode_batch_fast(list(texts))
  return [np.asarray(e.ids, np.int32) for e in encodings]


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
  """Writes `tokenizer.json`; UserError if it is too large to load again."""
  content = tokenizer.to_str(pretty=True).encode()
  if len(content) > _MOST_BYTES:
    raise UserError(f'the words take {len(content):,} bytes, more than '
                    f'{_MOST_BYTES:,}: lower config.data.vocab_size')
  files.write(path, content)


def load_tokenizer(path: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
  """Reads what `save_tokenizer` wrote, in which only the words may differ.

  The file may be a stranger's: another normalizer's pattern could take for
  ever, and the embedding would clip an id that is too large without a word.
  Raises UserError if it is missing, or is none of
  `fit_tokenizer(..., vocab_size)`.
  """
  content = files.read_bytes(path, _MOST_BYTES)
  try:
    found, ours = json.loads(content), json.loads(fit_tokenizer([], 5).to_str())
    vocab = ours['model']['vocab'] = found['model']['vocab']
    if found != ours:
      raise ValueError('it reads texts by other rules than this version')
    words = sorted(vocab, key=vocab.__getitem__)
    if (words[:len(_SPECIAL)] != _SPECIAL
        or [vocab[word] for word in words] != list(range(len(words)))):
      raise ValueError('its ids are not 0, 1, 2, ..., special ones first')
    if len(words) > vocab_size:
      raise ValueError(f'it has {len(words)} ids, config.data.vocab_size is '
                       f'{vocab_size}')
    # Not the file's text, of which another reader may make something else.
    tokenizer = Tokenizer.from_str(json.dumps(found))
    tokenizer.encode_special_tokens = True  # the file does not keep it
    return tokenizer
  except Exception as e:  # whatever the file holds; the library raises it bare
    raise UserError(
        f'{os.fspath(path)} is not a tokenizer ({e}): copy it again from the '
        'run directory, or train again') from e
