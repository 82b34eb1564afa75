"""What more texts cost: to prepare, to tokenize, to begin to train; memory.

  python benchmarks/data.py --texts=10000,100000 --json=data.json

writes that many texts of about 100 words to a CSV file, sentences of the
grammar put together anew and two words of a long tail, and runs the program on
it, from its own command line and with a cache of its own: `--mode=prepare`,
which reads the file into tfds' ArrayRecord and then into ids, and a start of
training from what is then in the cache, of 40 steps, and another of 20 more. A
row is

- texts; megabytes of the file
- texts a second into ArrayRecord (the file is read twice: to see what it holds,
  and to write), and into ids, as the program says it
- seconds from the start to the first step, the ids in the cache: the second
  start, whose programs are compiled
- of preparing and of training the most memory of all processes together, in
  megabytes: what they hold themselves, and with what the system has mapped of
  files, which it takes back where memory is short (RssAnon, and RssFile and
  RssShmem beside, of /proc, looked at each 50 ms)

All texts are on disk four times for a while: CSV, ArrayRecord, numbers of
words, ids.
"""

import argparse
from collections.abc import Iterator
import csv
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from flax_imdb.data import grammar

ROOT = pathlib.Path(__file__).parents[1]
WORDS = 100
_TAIL = 2  # words of a text that are of the long tail


def sentences() -> list[list[str]]:
  """Sentences of the grammar's reviews, by label."""
  found: list[set[str]] = [set(), set()]
  for text, label in grammar.generate(0, 2_000):
    found[label] |= {*re.findall(r'[^.!?]+[.!?]', text)}
  return [sorted(x) for x in found]


def write_texts(path: pathlib.Path, n: int) -> None:
  """Writes n texts and labels, the same for the same n."""
  rng, pools = random.Random(0), sentences()
  lengths = [[len(x.split()) for x in pool] for pool in pools]
  with path.open('w', newline='') as f:
    writer = csv.writer(f)
    writer.writerow(['text', 'label'])
    for i in range(n):
      label, words, parts = i % 2, _TAIL, []
      while words < WORDS:
        at = int(rng.random() * len(pools[label]))
        parts.append(pools[label][at])
        words += lengths[label][at]
      tail = ' '.join(f'w{int(rng.paretovariate(0.3)) % 10**9}'
                      for _ in range(_TAIL))
      writer.writerow([f'{tail} {"".join(parts)}', ('bad', 'good')[label]])


def processes_of(root: int) -> Iterator[int]:
  """A process and all below it."""
  yield root
  try:
    threads = os.listdir(f'/proc/{root}/task')
    for thread in threads:
      children = pathlib.Path(f'/proc/{root}/task/{thread}/children')
      for child in children.read_text().split():
        yield from processes_of(int(child))
  except OSError:  # it has ended
    return


def memory(root: int) -> tuple[int, int]:
  """KiB that a process and all below hold themselves, and with files."""
  own = mapped = 0
  for process in processes_of(root):
    try:
      status = pathlib.Path(f'/proc/{process}/status').read_text()
    except OSError:
      continue
    found = dict(re.findall(r'^(Rss\w+):\s+(\d+)', status, re.MULTILINE))
    own += int(found.get('RssAnon', 0))
    mapped += int(found.get('RssFile', 0)) + int(found.get('RssShmem', 0))
  return own, own + mapped


def run(folder: pathlib.Path, *flags: str) -> dict[str, Any]:
  """Runs the program; its output by line with the time each came; memory."""
  environment = os.environ | {'XDG_CACHE_HOME': str(folder / 'cache')}
  output = folder / 'output.txt'
  start = time.perf_counter()
  with output.open('w') as f:
    child = subprocess.Popen(
        [sys.executable, '-u', '-m', 'flax_imdb.main',
         '--config=configs/texts.py', '--config.model.inputs=words',
         f'--config.data.train_file={folder}/texts.csv', *flags],
        cwd=ROOT, env=environment, stdout=f, stderr=subprocess.STDOUT)
  first, most = None, (0, 0)
  while child.poll() is None:
    now = memory(child.pid)
    most = max(most[0], now[0]), max(most[1], now[1])
    if first is None and 'first step done' in output.read_text():
      first = time.perf_counter() - start
    time.sleep(0.05)
  text = output.read_text()
  if child.returncode:
    raise SystemExit(text)
  return {'seconds': time.perf_counter() - start, 'first_step': first,
          'own': most[0] / 1000, 'with_files': most[1] / 1000, 'text': text}


def measure(n: int, folder: pathlib.Path) -> dict[str, Any]:
  """A row of the table."""
  write_texts(folder / 'texts.csv', n)
  prepared = run(folder, '--mode=prepare')
  into_records, = re.findall(r'^prepared .* in ([\d.]+) s', prepared['text'],
                             re.MULTILINE)
  encoded = [(int(count.replace(',', '')), float(seconds)) for count, seconds in
             re.findall(r'encoded ([\d,]+) .*?in ([\d.]+) s', prepared['text'])]
  assert sum(count for count, _ in encoded) <= n
  steps = '--config.max_steps_per_epoch=20', f'--workdir={folder}/run'
  constant = '--config.schedule=constant'
  run(folder, *steps, constant, '--config.num_epochs=2',
      '--config.data.test_split=test[:100]')
  trained = run(folder, *steps, constant, '--config.num_epochs=3',
                '--config.data.test_split=test[:100]')
  return {'texts': n, 'mb': (folder / 'texts.csv').stat().st_size / 1e6,
          'records_per_second': n / float(into_records),
          'ids_per_second': sum(c for c, _ in encoded) / sum(
              s for _, s in encoded),
          'first_step': trained['first_step'],
          'prepare_own': prepared['own'],
          'prepare_with_files': prepared['with_files'],
          'train_own': trained['own'],
          'train_with_files': trained['with_files']}


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
  parser.add_argument('--texts', default='10000,100000,1000000,5000000')
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args()
  rows = []
  print('| texts | MB | texts a second into ArrayRecord | into ids | seconds '
        'to the first step | memory to prepare, MB: own, with files '
        '| to train |')
  print('|---|---|---|---|---|---|---|')
  for n in map(int, args.texts.split(',')):
    with tempfile.TemporaryDirectory(prefix='data_') as folder:
      row = measure(n, pathlib.Path(folder))
    rows.append(row)
    print('| {texts:,} | {mb:,.0f} | {records_per_second:,.0f} | '
          '{ids_per_second:,.0f} | {first_step:.1f} | {prepare_own:,.0f}, '
          '{prepare_with_files:,.0f} | {train_own:,.0f}, '
          '{train_with_files:,.0f} |'.format(**row), flush=True)
    if args.json:
      args.json.write_text(json.dumps(rows, indent=2) + '\n')


if __name__ == '__main__':
  main()
