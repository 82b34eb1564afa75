"""The start: python -m flax_imdb.main --help."""

import argparse
import contextlib
import io
import os
import re
import shlex
import signal
import sys
from typing import NoReturn

from ml_collections import ConfigDict

try:
  from flax_imdb import __version__, cli, environment
  from flax_imdb.cluster import processes
  from flax_imdb.config import differences, packaged, read_config
  from flax_imdb.errors import (
    ChildError,
    Preempted,
    Terminated,
    TransientError,
    UserError,
  )
  from flax_imdb.storage import bucket, files
  from flax_imdb.terminal import Terminal, quiet_libraries
except ModuleNotFoundError as e:
  if e.name != 'fcntl':
    raise
  print('error: Windows is not supported: use Linux, macOS or, on Windows, WSL',
        file=sys.stderr)
  sys.exit(2)


def main(argv: list[str]) -> int:
  """Runs the program and returns its exit status, one of `errors.STATUSES`."""
  debug = goes_on = False
  try:
    if sys.stdout is None:
      raise UserError('standard output is closed: add > /dev/null')
    args, config = cli.parse(argv)
    debug = config.debug
    goes_on = args.mode in ('train', *cli.PARENTS)
    _start_jax(args, config)
    # At a terminal a person sees it stand still, or made it: with Ctrl-S, or in
    # a debugger.
    watch = args.mode in ('train', 'eval') and not (
        config.debug or sys.stdout.isatty())
    with (processes.watched() if watch else contextlib.nullcontext(),
          Terminal(quiet=args.quiet or processes.index() > 0) as terminal):
      _run_mode(args, config, terminal)
    with files.writing('standard output'):
      sys.stdout.flush()
    processes.shut_down()
    return 0
  except (UserError, FloatingPointError, TransientError, ChildError) as e:
    if debug and processes.count() == 1 and not isinstance(e, Terminated):
      raise
    return _fail(str(e), getattr(e, 'status', 1))
  except Preempted as e:
    # That of one process of several is its launcher's to type.
    command = f': {_command(*argv)}' if processes.count() == 1 else ''
    processes.shut_down()
    print(f'{e}{command}', file=sys.stderr)
    return e.status
  except KeyboardInterrupt:
    again = f'; started again, it goes on from what is saved: {_command(*argv)}'
    return _fail('interrupted' + again * goes_on, 130)
  except BrokenPipeError:  # the reader, such as head, has seen enough
    _give_up_output()
    return 0
  except Exception as e:
    if why := bucket.failure(e):
      return _fail(f'the store failed ({why}): start it again',
                   TransientError.status)
    processes.end_all_after(e)
    raise


def _start_jax(args: argparse.Namespace, config: ConfigDict) -> None:
  """Sets the environment, meets other processes and finds the devices."""
  environment.check_jaxlib()
  if args.mode == 'compile':  # or jax would look for the devices
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  elif args.mode not in ('train', 'prepare'):
    saved = files.as_path(args.workdir) / 'config.json'
    if files.exists(saved):
      config = read_config(saved)
      config.debug = config.debug if args.debug is None else args.debug
  several = args.mode in ('train', 'eval')
  count = args.num_processes or several and environment.slurm_tasks() or 1
  if args.mode not in cli.PARENTS:  # whose runs would inherit it
    environment.configure(config.global_batch_size // count)
  quiet_libraries()
  try:
    import jax  # only now: it reads the environment when it starts
  except ValueError as e:
    raise UserError(f'jax cannot start ({e}): correct or unset what is wrong '
                    'of the JAX_ variables in the environment') from e
  if args.mode in cli.PARENTS:  # whose runs need the devices themselves
    if (environment.slurm_tasks() or 1) > 1:
      raise UserError(f'--mode={args.mode} runs in one process: start it with '
                      'srun --ntasks=1')
    return

  if several:
    processes.initialize(
        args.coordinator_address, args.num_processes, args.process_id)
    if config.debug and processes.count() > 1:
      raise UserError('config.debug=True runs in one process only')
  try:
    jax.local_devices()
  except (RuntimeError, AssertionError) as e:
    _raise_no_devices(e)
  if config.debug:
    jax.config.update('jax_disable_jit', True)
    jax.config.update('jax_debug_nans', True)


def _raise_no_devices(error: Exception) -> NoReturn:
  """Raises UserError where a platform is missing, else TransientError.

  Devices that an old process holds, or whose host is not ready yet, are told of
  in many ways: 'already in use', 'No visible GPU devices', 'out of memory'.
  What is missing has few; an AssertionError is jax' own for no GPU at all.
  """
  platforms = os.environ.get('JAX_PLATFORMS', '')
  where = f'jax finds no devices for JAX_PLATFORMS={platforms!r}'
  if isinstance(error, AssertionError) or re.search(
      'not in the list of known|cannot open shared object', str(error)):
    raise UserError(
        f'{where}: install .[gpu] or .[tpu], or unset it') from error
  raise TransientError(f'{where} ({error}): end the process that holds them, '
                       'and start again') from error


def _run_mode(args: argparse.Namespace, config: ConfigDict,
              terminal: Terminal) -> None:
  """Does what the command line says; imports what that takes, and no more."""
  announce = terminal.announce
  def introduce(config: ConfigDict) -> None:
    announce(_introduction(config, args))
  if args.mode == 'train':
    from flax_imdb.cluster import preemption
    from flax_imdb.train import selftrain
    introduce(config)
    with preemption.heeded():
      summary = selftrain.train(config, args.workdir, terminal)
    announce(f'{summary["seconds"]:.1f} s of training; the run lies in '
             f'{args.workdir}')
    for line in _next(config, args.workdir):
      terminal.announce(line, whole=True)
  elif args.mode == 'eval':
    from flax_imdb.inference import evaluate
    evaluate.evaluate_run(
        args.workdir, args.step, args.split, introduce, announce,
        terminal.progress)
  elif args.mode == 'predict':
    from flax_imdb.inference import predict
    predict.predict_run(
        args.workdir, args.step, predict.read_reviews(args.words, args.input),
        args.json, args.explain, args.html)
  elif args.mode == 'serve':
    from flax_imdb.inference import serve
    serve.serve_run(args.workdir, args.step, args.host, args.port,
                    args.texts_per_minute, announce)
  elif args.mode == 'report':
    from flax_imdb.analysis import report
    report.report([args.workdir, *args.words], announce)
  elif args.mode == 'export':
    from flax_imdb.inference import export
    write = {'stablehlo': export.export_stablehlo, 'keras': export.export_keras}
    announce(write[args.format](args.workdir, args.step))
  elif args.mode == 'compile':
    from flax_imdb.analysis import ahead_of_time
    ahead_of_time.compile_for(config, args.topology, announce)
  elif args.mode == 'sweep':
    from flax_imdb.analysis import sweep
    sweep.sweep(config, args.config, args.workdir, args.set, args.seeds,
                args.jobs, announce)
  elif args.mode == 'tune':
    from flax_imdb.analysis import tune
    tune.tune(config, args.config, args.workdir, args.minutes, announce)
  else:
    from flax_imdb.data import reviews, sources
    tokenizer = reviews.training_tokenizer(
        config, announce, terminal.progress)
    splits = reviews.load_splits(
        config, tokenizer, announce, ['train', 'test'],
        len(sources.class_names(config.data)), terminal.progress)
    for name, split in splits.items():
      announce(f'{name}: {len(split):,} reviews are ready')


def _introduction(config: ConfigDict, args: argparse.Namespace) -> str:
  """What runs where, and the fields that differ from configs/default.py."""
  import jax

  from flax_imdb.cluster import devices

  versions = devices.versions()
  named = ', '.join(f'{name} {versions[name]}' for name in (
      'jax', 'flax', 'optax', 'orbax-checkpoint'))
  device = jax.local_devices()[0].device_kind
  several = (f' in each of {processes.count()} processes'
             if processes.count() > 1 else '')
  changed = differences(packaged('default'), config)
  return '\n'.join([
      f'flax_imdb {__version__} with {named}',
      f'{jax.local_device_count()} x {device}{several}; '
      f'{args.mode} in {args.workdir}',
      *(f'  config.{field} = {new}  (default {old})'
        for field, (old, new) in changed.items())])


def _next(config: ConfigDict, workdir: str) -> list[str]:
  """What to type when a run is done."""
  where = f'--workdir={workdir}'
  if config.objective == 'language_model':
    commands = [[f'--config.init_from={workdir}', '--config=configs/words.py']]
  else:
    commands = [['--mode=predict', where, 'Not bad at all.'],
                ['--mode=report', where], ['--mode=serve', where]]
  return ['next:', *(f'  {_command(*flags)}' for flags in commands)]


def _command(*argv: str) -> str:
  """The command line of this program with these arguments, to be copied."""
  started = os.path.basename(sys.argv[0])
  return shlex.join([
      *(['flax-imdb'] if started == 'flax-imdb' else
        ['python', '-m', 'flax_imdb.main']), *argv])


def _fail(message: str, status: int) -> int:
  """Prints one line on standard error; returns `status`."""
  processes.end_all(message, status)
  try:
    if sys.stdout:
      sys.stdout.flush()
  except OSError:
    _give_up_output()
  print('error: ' + ' '.join(message.split()), file=sys.stderr)
  return status


def _give_up_output() -> None:
  """Or Python, when it ends, would complain of what it can't print."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run() -> NoReturn:
  """The command `flax-imdb`: the same as `python -m flax_imdb.main`."""
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')  # if it is not of UTF-8
    if sys.stdout.isatty():  # else what is live would be left half-drawn
      signal.signal(signal.SIGTERM, signal.default_int_handler)
  sys.exit(main(sys.argv[1:]))


if __name__ == '__main__':
  run()
