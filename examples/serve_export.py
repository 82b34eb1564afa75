"""Classifies reviews with an exported model: jax, NumPy and tokenizers.

  pip install -r examples/requirements.txt
  python examples/serve_export.py runs/default/export < reviews.txt

prints a JSON object for each line. On a CPU, labels and probabilities are those
of --mode=predict --json bit for bit, on a machine with as many devices as the
one that exported: the last bits depend on how many reviews a device is given at
once and on the width of vectors, so both are as there. They depend neither on
padding nor on the other reviews.
"""

import html
import json
import math
import pathlib
import re
import sys

import jax
import numpy as np
from tokenizers import Tokenizer

folder = pathlib.Path(sys.argv[1])
about = json.loads((folder / 'model.json').read_text('utf-8'))
tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
tokenizer.encode_special_tokens = True  # a review that says [PAD] is text
entity = re.compile(r'&#?\w{1,32};', re.ASCII)  # &eacute; or &#39;
exported = jax.export.deserialize((folder / 'model.stablehlo').read_bytes())
options = {'xla_cpu_prefer_vector_width': 512}
logits = jax.jit(exported.call, compiler_options=(
    options if jax.default_backend() == 'cpu' else None))
inputs, reading = about['inputs'], about['reading']
temperature = about.get('temperature', 1)  # an older export has none
ngrams = (np.load(folder / 'ngrams.npz')
          if (folder / 'ngrams.npz').exists() else None)


def tokens(texts):
  """The ids of each text, int64 [n]."""
  if about['unescape']:
    texts = [entity.sub(lambda e: html.unescape(e[0]), text) for text in texts]
  return [np.array(row.ids)[:sum(row.attention_mask)]
          for row in tokenizer.encode_batch(texts)]


def place(known, ids, order):
  """Where the n-gram that ends at each token stands in an array; -1 if not."""
  keys = np.full(len(ids), order << 60)
  for back in range(order):
    keys[back:] |= ids[:len(ids) - back] << 20 * back
  keys[:order - 1] = -1
  at = np.searchsorted(known, keys)
  at[at == len(known)] = 0
  return np.where(known[at] == keys, at, -1) if len(known) else 0 * keys - 1


def read(ids):
  """What the model reads of a review, by name, a row a token."""
  found = {'ids': ids}
  if 'bigrams' in inputs:
    found['bigrams'] = 1 + place(ngrams['pairs'], ids, 2)
  if 'log_odds' in inputs:
    none = np.zeros((1, ngrams['log_odds'].shape[1]))
    table = np.append(ngrams['log_odds'], none, axis=0).astype('f4')
    found['log_odds'] = np.concatenate(
        [table[place(ngrams['keys'], ids, order)]
         for order in range(1, 1 + about['order'])], axis=-1)
  return found


def linear(ids):
  """The logit of the linear model, which counts each n-gram once.

  An array of more than two classes, which have one each.
  """
  weights, logit = ngrams['weights'], 0.0
  for order in range(1, 1 + about['order']):
    found = np.unique(place(ngrams['keys'], ids, order))
    found = found[found >= 0]
    # Adds up in this order, as predict does; np.sum would not.
    sums = [np.bincount(0 * found, own[found], minlength=1)[0]
            for own in np.atleast_2d(weights.T)]
    logit = logit + (sums[0] if weights.ndim == 1 else np.array(sums))
  return np.float32(logit)


def spans(n):
  """Which tokens of n are read: (start, stop) of each segment."""
  most, length = reading['max_length'], reading['segment_length']
  whole = n if reading['read'] == 'spread' else min(n, most)
  first = n - whole if reading['read'] == 'last' else 0
  if not length:
    return [(first, first + whole)]
  count = -(-min(n, most) // length)
  starts = [first + k * (whole - length) // max(count - 1, 1) if count > 1
            else first for k in range(count)]
  return [(start, start + min(whole, length)) for start in starts]


def batches(reviews):
  """As many reviews as one call takes, with the arrays that it takes."""
  length, rows = reading['segment_length'], about['rows']
  size = about['segments'] if length else rows
  i = 0
  while i < len(reviews):
    found, parts, first = [], [], i
    while i < len(reviews) and i - first < rows:
      cut = spans(len(reviews[i]['ids']))
      if len(parts) + len(cut) > size:
        break
      found.append(range(len(parts), len(parts) + len(cut)))
      parts += [(reviews[i], *span) for span in cut]
      i += 1
    most, bucket = reading['max_length'], reading['bucket_width']
    longest = max(stop - start for _, start, stop in parts)
    width = length or min(
        -(-longest // bucket) * bucket if bucket else most, most)
    arrays = {name: np.zeros((size, width, *x.shape[1:]), 'f4' if x.dtype.kind
                             == 'f' else 'i4')
              for name, x in reviews[0].items()}
    # What fills up the rows of a call is a token long, as predict's is.
    arrays['lengths'] = np.full(size, 0 if length else 1, 'i4')
    for row, (review, start, stop) in enumerate(parts):
      arrays['lengths'][row] = stop - start
      for name, x in review.items():
        arrays[name][row, :stop - start] = x[start:stop]
    if length:
      arrays['segments'] = np.full((rows, -(-most // length)), size, 'i4')
      for row, places in enumerate(found):
        arrays['segments'][row, :len(places)] = places
    if 'linear' in inputs:
      arrays['linear'] = np.zeros((rows, *ngrams['weights'].shape[1:]), 'f4')
      arrays['linear'][:len(found)] = [
          linear(review['ids']) for review in reviews[first:i]]
    yield len(found), [arrays[name] for name in inputs]


def answer(z):
  """Label and probability, of a logit or of the logits of all classes.

  Of two classes that is the probability of the second one.
  """
  labels = about['labels']
  if len(labels) == 2:
    odds = math.exp(-abs(z / temperature))
    return {'label': labels[z > about['threshold']],
            'probability': 1 / (1 + odds) if z > 0 else odds / (1 + odds)}
  most = max(z)
  odds = [math.exp(x / temperature - most / temperature) for x in z]
  total = math.fsum(odds)
  each = [x / total for x in odds]
  best = z.index(most)
  return {'label': labels[best], 'probability': each[best],
          'probabilities': dict(zip(labels, each, strict=True))}


sys.stdin.reconfigure(encoding='utf-8', newline='\n')
texts = [line.rstrip('\r\n') for line in sys.stdin]
answers = []
for count, arrays in batches([read(ids) for ids in tokens(texts)]):
  answers += logits(*arrays).tolist()[:count]
for text, z in zip(texts, answers, strict=True):
  print(json.dumps(answer(z) | {'text': text}, ensure_ascii=False))
