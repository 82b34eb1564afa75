"""Random changes of files that are right, read for a while: only UserErrors.

python tests/hostile/fuzz_texts.py --seconds=600

prints how many files were read and refused, and ends with status 1 at the first
that raises anything else, which it leaves in the working directory. The memory
that the process may map is bounded, and so is what it takes while a file is
read. The same command changes the same files; --seed makes it others.
"""

import argparse
import collections
import contextlib
import csv
import gzip
import io
import json
import os
import pathlib
import random
import re
import resource
import sys
import tempfile
import time

import pyarrow as pa
import pyarrow.parquet as pq

from flax_imdb.config import packaged
from flax_imdb.data import texts
from flax_imdb.errors import UserError

_MOST_BYTES = 4 << 30  # of address space; threads' stacks are counted, too
_MOST_GROWTH = 600 << 20  # bytes of memory beyond what importing took
# What is put in where it hurts.
_TOKENS = [b'"', b'""', b',', b';', b'\t', b'\n', b'\r', b'\r\n', b'\0', b'{',
           b'}', b'[', b']', b'\xff', b'\xef\xbb\xbf', b'\\u0000', b'\\ud800',
           b'null', b'1e999', b'NaN', b'-0', 'ü'.encode(), 'ü'.encode('utf-16')]


def _valid(rng: random.Random) -> dict[str, bytes]:
  """{name: content} of a right file in each format."""
  n = rng.randrange(2, 60)
  rows = [(f'text "{rng.random()}",\n ü {"x" * rng.randrange(40)}',
           rng.choice(['gut', 'übel', '3'])) for _ in range(n)]
  file = io.StringIO(newline='')
  writer = csv.writer(file, delimiter=rng.choice(',;\t'))
  writer.writerows([('text', 'label'), *rows])
  table = file.getvalue().encode()
  lines = '\n'.join(
      json.dumps({'id': 1, 'text': t, 'label': y}) for t, y in rows).encode()
  columns = io.BytesIO()
  pq.write_table(
      pa.table({'text': [t for t, _ in rows], 'label': [y for _, y in rows]}),
      columns, compression=rng.choice(['none', 'snappy', 'zstd', 'gzip']),
      row_group_size=rng.choice([5, 1_000]))
  return {'a.csv': table, 'a.jsonl': lines, 'a.parquet': columns.getvalue(),
          'a.csv.gz': gzip.compress(table, 1), 'a.jsonl.zst': pa.compress(
              lines, 'zstd', asbytes=True), 'a.tsv': table}


def _changed(rng: random.Random, content: bytes) -> bytes:
  """Some bytes are changed, put in, repeated, moved or left out."""
  data = bytearray(content)
  for _ in range(rng.choice([0, 1, 1, 2, 8])):
    at = rng.randrange(len(data) + 1)
    to = min(len(data), at + rng.choice([1, 4, 40, 400]))
    kind = rng.randrange(6)
    if kind == 0:
      data[at:to] = rng.randbytes(to - at)
    elif kind == 1:
      data[at:at] = rng.choice(_TOKENS) * rng.choice([1, 1, 3, 1_000])
    elif kind == 2:
      data[at:at] = data[at:to] * rng.choice([1, 20])
    elif kind == 3:
      del data[at:to]
    elif kind == 4:
      del data[at:]
    elif at < len(data):
      data[at] ^= 1 << rng.randrange(8)
  return bytes(data)


def _resident() -> int:
  """Bytes of memory that this process has now."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * os.sysconf('SC_PAGE_SIZE')


def main() -> int:
  """Returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--seconds', type=float, default=600)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  rng = random.Random(args.seed)
  _, hard = resource.getrlimit(resource.RLIMIT_AS)
  resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, hard))
  data = packaged('default').data
  counts: collections.Counter[str] = collections.Counter()
  end, most, begun = time.monotonic() + args.seconds, 0, 0
  with tempfile.TemporaryDirectory() as folder:
    while time.monotonic() < end:
      for name, valid in _valid(rng).items():
        content = _changed(rng, valid)
        if name.endswith(('.gz', '.zst')) and rng.random() < 0.5:
          # Changed inside, packed well: what is read is the text.
          inner = _changed(rng, b'text,label\na,b\n' * rng.randrange(1, 99))
          content = (gzip.compress(inner, 1) if name.endswith('.gz') else
                     pa.compress(inner, 'zstd', asbytes=True))
        path = pathlib.Path(folder, name)
        path.write_bytes(content)
        data.update(name='files', train_file=str(path), test_fraction=0.3)
        counts['files'] += 1
        try:
          found = texts.survey(data, lambda line: None)
          counts['read'] += 1
          assert len(found.classes) > 1
        except UserError as e:
          message = str(e)
          assert message.isprintable() and len(message) < 900, message
          what = re.sub(r'.*?a\.\w+(\.\w+)?(, (line|row) [\d,]+)?:?', '',
                        message)
          counts['  ' + re.sub(r'\d+|\(.*|byte .*?;', '#', what)[:30]] += 1
        except BaseException:
          pathlib.Path(f'failing_{name}').write_bytes(content)
          print(f'left failing_{name}; after {counts["files"]:,} files')
          raise
        begun = begun or _resident()
        most = max(most, _resident())
  refused = counts['files'] - counts['read']
  print(f'{counts["files"]:,} files in {args.seconds:.0f} s: '
        f'{counts["read"]:,} read, {refused:,} refused; memory grew by '
        f'{(most - begun) >> 20} MB')
  for what, n in counts.most_common(20):
    print(f'{n:8,} {what}')
  with contextlib.suppress(BrokenPipeError):
    sys.stdout.flush()
  return int(most - begun > _MOST_GROWTH)


if __name__ == '__main__':
  sys.exit(main())
