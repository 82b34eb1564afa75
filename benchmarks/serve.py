"""The server under load: up to where it is busy, and beyond.

  python benchmarks/serve.py [--workdir=runs/default] [--seconds=10]

starts `--mode=serve` on a run directory and lets `hey`, which must be on the
PATH (github.com/rakyll/hey), send it a test review of median length by ever
more clients at once, each as fast as it is answered, then a text to explain.
Prints a table: requests a second that were answered, their latency, how many
were told to come later (503), how many failed otherwise, and the memory that
the server holds afterwards. The last row repeats the first: what it holds
there it never gives back.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from flax_imdb.config import read_config
from flax_imdb.data import sources

CLIENTS = 1, 8, 32, 64, 128, 256, 512, 1000, 2000
EXPLAINED = 1, 8, 64
TEXTS = 1000  # of the test split, of which one has the median length


def load(url: str, body: dict, clients: int, seconds: int,
         folder: str) -> dict[str, float]:
  """What hey says; latencies in ms, of all answers, nan of few."""
  file = pathlib.Path(folder, 'body.json')
  file.write_text(json.dumps(body))
  printed = subprocess.run(
      ['hey', '-z', f'{seconds}s', '-c', str(clients), '-m', 'POST', '-T',
       'application/json', '-D', str(file), f'{url}/predict'],
      capture_output=True, text=True, check=True).stdout
  statuses, _, errors = printed.partition('Error distribution:')
  counts = {int(status): int(n) for status, n in re.findall(
      r'\[(\d{3})\]\s+(\d+) responses', statuses)}
  total = re.search(r'Total:\s+(\S+) secs', printed)
  assert total, printed
  latency = {name: 1e3 * float(found[1]) if (found := re.search(
      rf'{name}% in (\S+) secs', printed)) else float('nan')
             for name in ('50', '99')}
  return {
      'answered': counts.get(200, 0) / float(total[1]), **latency,
      '503': counts.get(503, 0),
      'failed': sum(n for status, n in counts.items()
                    if status not in (200, 503))
      + sum(map(int, re.findall(r'\[(\d+)\]', errors)))}


def memory(pid: int) -> int:
  """The MB that a process holds."""
  status = pathlib.Path(f'/proc/{pid}/status').read_text()
  found = re.search(r'VmRSS:\s+(\d+) kB', status)
  assert found
  return int(found[1]) // 1000


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', default='runs/default')
  parser.add_argument('--seconds', type=int, default=10)
  args = parser.parse_args()
  data = read_config(f'{args.workdir}/config.json').data
  texts, _ = sources.read_texts(data, data.test_split, 0, TEXTS)
  text = sorted(texts, key=len)[len(texts) // 2]
  rows = [*((n, False) for n in CLIENTS), *((n, True) for n in EXPLAINED),
          (1, False)]
  with tempfile.TemporaryDirectory() as folder, subprocess.Popen(
      [sys.executable, '-m', 'flax_imdb.main', '--mode=serve', '--port=0',
       f'--workdir={args.workdir}'], stdout=subprocess.PIPE,
      text=True) as process:
    try:
      assert process.stdout
      where = re.search(r'http://[^,]*', process.stdout.readline())
      if not where:
        raise SystemExit('the server did not start')
      print(f'a review of {len(text):,} characters, {args.seconds} s a row; '
            f'load average before: {os.getloadavg()[0]:.1f}; the server holds '
            f'{memory(process.pid)} MB\n')
      print('| clients | answered a second | median ms | 99th percentile ms | '
            '503 | other failures | MB |\n|---|---|---|---|---|---|---|')
      for clients, explain in rows:
        found = load(where[0], {'text': text, 'explain': explain}, clients,
                     args.seconds, folder)
        print(f'| {clients}{", explained" * explain} | {found["answered"]:.0f} '
              f'| {found["50"]:.1f} | {found["99"]:.1f} | {found["503"]} | '
              f'{found["failed"]} | {memory(process.pid)} |', flush=True)
    finally:
      process.terminate()


if __name__ == '__main__':
  main()
