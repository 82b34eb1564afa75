#!/usr/bin/env python3
"""Runs a pod on this machine: N processes with M CPU devices each.

  launch/local.py --processes=2 --devices=1 -- --workdir=runs/two

What stands after -- goes to python -m flax_imdb.main, with the address of a
free port and the number of the process. Each line of output begins with that
number. Signals go to all processes; when one fails the others get 30 s to say
why they end, too. The exit status is that of the first that failed, as
docs/troubleshooting.md explains them: after 69 and 75 the same command goes on.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

# The others notice within 20 s that one was lost, and say so.
GRACE_SECONDS = 30


def _parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      prog='launch/local.py', allow_abbrev=False,
      usage='%(prog)s [--processes=N] [--devices=M] -- ARGS...',
      description='Runs several processes of flax_imdb on this machine.')
  parser.add_argument('--processes', type=int, default=2)
  parser.add_argument('--devices', type=int, default=1,
                      help='CPU devices of each process; default: 1')
  parser.add_argument('args', nargs='*', metavar='ARGS',
                      help='for python -m flax_imdb.main')
  args = parser.parse_args(argv)
  if args.processes < 1 or args.devices < 1:
    parser.error('--processes and --devices must be at least 1')
  return args


def _free_port() -> int:
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


def _start(args: argparse.Namespace) -> list[subprocess.Popen]:
  env = dict(os.environ, JAX_PLATFORMS='cpu',
             JAX_NUM_CPU_DEVICES=str(args.devices), PYTHONUNBUFFERED='1')
  address = f'127.0.0.1:{_free_port()}'
  # A session of its own each: Ctrl-C comes from here alone, and so only once.
  return [subprocess.Popen(
      [sys.executable, '-m', 'flax_imdb.main', *args.args,
       f'--coordinator_address={address}',
       f'--num_processes={args.processes}', f'--process_id={i}'],
      env=env, start_new_session=True, stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE)
      for i in range(args.processes)]


def _copy(number: int, source, target) -> None:
  """Copies line by line, so that those of two processes do not mix.

  Where the reader, such as head, has seen enough, the rest goes nowhere: if it
  were not read, who writes it would wait for ever.
  """
  for line in source:
    try:
      target.write(f'{number}: '.encode() + line.removesuffix(b'\n') + b'\n')
      target.flush()
    except BrokenPipeError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), target.fileno())


def main(argv: list[str]) -> int:
  """Runs them all; returns 0 or the first status that is not 0."""
  processes = _start(_parse(argv))

  def forward(number, frame):
    del frame
    for process in processes:
      process.send_signal(number)
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, forward)
  copies = [threading.Thread(target=_copy, args=(i, *streams))
            for i, process in enumerate(processes)
            for streams in ((process.stdout, sys.stdout.buffer),
                            (process.stderr, sys.stderr.buffer))]
  for copy in copies:
    copy.start()

  status, end = 0, float('inf')
  running = processes
  while running:
    time.sleep(0.05)
    for process in running:
      if not status and process.poll():
        status, end = process.returncode, time.monotonic() + GRACE_SECONDS
    running = [process for process in running if process.poll() is None]
    if time.monotonic() > end:
      for process in running:
        process.kill()  # also one that is stopped
  for copy in copies:
    copy.join()
  return status if status >= 0 else 128 - status


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
