"""Classifies reviews with an exported model: jax and tokenizers, nothing else.

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
import jax.numpy as jnp
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

sys.stdin.reconfigure(encoding='utf-8', newline='\n')
texts = [line.rstrip('\r\n') for line in sys.stdin]
for start in range(0, len(texts), about['rows']):
  chunk = texts[start:start + about['rows']]
  rows = chunk + [''] * (about['rows'] - len(chunk))
  if about.get('unescape'):  # not in exports of runs made by 0.1
    rows = [entity.sub(lambda e: html.unescape(e[0]), text) for text in rows]
  filled = tokenizer.encode_batch(rows)
  ids = jnp.array([row.ids for row in filled], 'i4')
  lengths = jnp.array([sum(row.attention_mask) for row in filled], 'i4')
  for text, z in zip(chunk, logits(ids, lengths).tolist(), strict=False):
    odds = math.exp(-abs(z))
    print(json.dumps({
        'label': about['labels'][z > about['threshold']],
        'probability': 1 / (1 + odds) if z > 0 else odds / (1 + odds),
        'text': text}, ensure_ascii=False))
