"""Plays the command line of a run: its files and signals, without training.

python -m flax_imdb.main FLAGS is called as played_run.py -m flax_imdb.main
FLAGS. The loss of an epoch is known, see `loss`. In the environment are

PLAY_STOP: it tells its parent to stop when it runs in such a directory
PLAY_FAIL: it fails there
PLAY_WAIT: it does its first epoch badly there, and then waits for its end
PLAY_TOGETHER: how many must run at a time for them to go on
"""

import json
import math
import os
import pathlib
import signal
import sys
import time

from flax_imdb import cli
from flax_imdb.config import differences, read_config, write_config

TEST_ACCURACY = '0.43215678'  # that nobody is to see


def loss(config):
  """Least at a learning rate of 0.02; a little more with each seed."""
  return 0.5 + abs(math.log(config.learning_rate / 0.02)) + config.seed / 100


def main(argv):
  _, config = cli.parse(argv)
  workdir = pathlib.Path(cli.parse(argv)[0].workdir)
  print(f'begins with {os.environ.get("JAX_NUM_CPU_DEVICES")} devices',
        flush=True)
  if (workdir / 'config.json').exists():
    changed = differences(read_config(workdir / 'config.json'), config)
    assert set(changed) <= {'show_examples'}, changed
  write_config(config, workdir / 'config.json')
  (workdir / 'checkpoints').mkdir(exist_ok=True)
  (workdir / 'checkpoints' / 'saved').touch()
  signal.signal(signal.SIGTERM, lambda number, frame: leave())
  if _is_at('PLAY_STOP', workdir):
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
  if _is_at('PLAY_FAIL', workdir):
    sys.exit('error: step 7 is not finite')
  bad = _is_at('PLAY_WAIT', workdir)
  lines = [{'epoch': epoch, 'step': 7 * epoch, 'validation': {
      'loss': loss(config) + 9 * bad, 'accuracy': 1 / (1 + loss(config))}}
           for epoch in range(1, config.num_epochs + 1)]
  with open(workdir / 'metrics.jsonl', 'w', encoding='utf-8') as file:
    for line in lines:
      file.write(json.dumps(line) + '\n')
      file.flush()
      if bad:
        time.sleep(60)
  together = int(os.environ.get('PLAY_TOGETHER', '0'))
  end = time.monotonic() + 60
  while len(list(workdir.parent.glob('*/metrics.jsonl'))) < together:
    assert time.monotonic() < end
    time.sleep(0.05)
  (workdir / 'summary.json').write_text(json.dumps({
      'config': config.to_dict(), 'validation': lines[-1]['validation'],
      'test': {'loss': 1.0, 'accuracy': float(TEST_ACCURACY)},
      'seconds': 10.0 + config.seed}))


def _is_at(name, workdir):
  return os.environ.get(name) == workdir.name


def leave():
  """As a run that has saved."""
  print('stopped by SIGTERM after step 7, which is saved', file=sys.stderr)
  sys.exit(75)


if __name__ == '__main__':
  main(sys.argv[3:])
