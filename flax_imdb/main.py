"""The command line: python -m flax_imdb.main --help."""

import argparse
import importlib.metadata
import json
import logging
import os
import pathlib
import sys
from typing import NoReturn

from ml_collections import ConfigDict

from flax_imdb import __version__
from flax_imdb import config as config_lib
from flax_imdb import environment
from flax_imdb import files
from flax_imdb import metrics
from flax_imdb import preemption
from flax_imdb import processes
from flax_imdb import remote
from flax_imdb import texts as texts_lib
from flax_imdb.errors import UserError

# Flags that only some modes take.
_MODES = {'step': ('eval', 'predict', 'export'), 'split': ('eval',),
          'input': ('predict',), 'json': ('predict',), 'format': ('export',)}


class _Parser(argparse.ArgumentParser):
  """Raises a UserError where argparse would print its usage and exit."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f'{message}; see --help')


def _parse(argv: list[str]) -> tuple[argparse.Namespace, ConfigDict]:
  """Reads the flags and the config; the config is checked unless restored."""
  parser = _Parser(
      prog='python -m flax_imdb.main', allow_abbrev=False,
      description='Learns whether film reviews are positive or negative.',
      epilog='--config.FIELD=VALUE changes a field of the config, such as '
      '--config.model.width=32; configs/default.py explains them all.')
  add = parser.add_argument
  add('--mode', default='train',
      choices=['train', 'eval', 'predict', 'report', 'export', 'compile',
               'prepare'],
      help='train or resume; evaluate, predict with, report on or export a run '
      'directory; compile for other devices; or only prepare the data')
  add('--config', default='configs/default.py', metavar='FILE')
  add('--workdir', metavar='DIR',
      help='run directory; default: runs/ and the name of the config file')
  add('--step', metavar='N',
      help='eval, predict, export: best, latest or a number; default: what the '
      'run itself evaluated at its end')
  add('--split', default='test', choices=['train', 'validation', 'test'],
      help='eval: which reviews; default: test')
  add('--input', metavar='FILE',
      help='predict: one review a line; default: standard input')
  add('--json', action='store_true', help='predict: one JSON object a line')
  add('--format', default='stablehlo', choices=['stablehlo', 'keras'],
      help='export: a program for jax alone, or model.get_weights() as .npz')
  add('--topology', metavar='NAME',
      help='compile: the devices, which need not be there, such as v5e:2x2 or '
      'cuda:h100x8')
  add('--coordinator_address', metavar='HOST:PORT',
      help='train, eval in several processes: where process 0 listens; not '
      'needed on SLURM and Cloud TPU')
  add('--num_processes', type=int, metavar='N', help='how many there are')
  add('--process_id', type=int, metavar='I', help='which this is, from 0')
  add('words', nargs='*',
      help='predict: a review; report: more run directories to compare with')
  args, rest = parser.parse_known_args(argv)

  if args.words and args.mode not in ('predict', 'report'):
    raise UserError(f'unexpected {args.words[0]!r}: write fields as '
                    '--config.FIELD=VALUE')
  for flag, modes in _MODES.items():
    if (getattr(args, flag) != parser.get_default(flag)
        and args.mode not in modes):
      raise UserError(f'--{flag} is for --mode={" or ".join(modes)}, not for '
                      f'--mode={args.mode}')
  if (args.mode == 'compile') != (args.topology is not None):
    raise UserError('--mode=compile and --topology=NAME, such as v5e:2x2, go '
                    'together: give both or neither')
  processes.check(
      args.coordinator_address, args.num_processes, args.process_id)
  if args.num_processes is not None and args.mode not in ('train', 'eval'):
    raise UserError(f'--mode={args.mode} runs in one process: leave out '
                    '--num_processes')
  config = config_lib.load(args.config)
  for word in rest:
    field, equals, value = word.removeprefix('--config.').partition('=')
    if not word.startswith('--config.') or not equals:
      raise UserError(f'unknown flag {word}; see --help')
    config_lib.override(config, field, value)
  config_lib.check(config)
  if rest and args.mode not in ('train', 'prepare', 'compile'):
    raise UserError(
        f'{rest[0]}: --mode={args.mode} takes the config of the run directory')
  if not args.workdir:
    args.workdir = f'runs/{pathlib.Path(args.config).stem}'
  try:
    args.workdir = (
        remote.name(args.workdir) if remote.is_remote(args.workdir)
        else str(pathlib.Path(args.workdir).absolute()))
  except FileNotFoundError as e:
    raise UserError('the working directory is no longer there: change to '
                    'another') from e
  # TensorStore and array_record take no other paths.
  for word in (*argv, args.workdir, *(os.environ.get(name, '') for name in (
      'HOME', 'XDG_CACHE_HOME', 'TFDS_DATA_DIR'))):
    try:
      word.encode()
    except UnicodeEncodeError as e:
      raise UserError(f'{word!r} is not UTF-8: rename or convert it, for '
                      'instance with convmv or iconv') from e
  return args, config


def _introduce(config: ConfigDict, args: argparse.Namespace,
               terminal: metrics.Terminal) -> None:
  """Says what runs where, before anything takes time."""
  import jax

  versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in
                       ('jax', 'flax', 'optax', 'orbax-checkpoint'))
  terminal.announce(f'flax_imdb {__version__} with {versions}')
  device = jax.local_devices()[0].device_kind
  several = (f' in each of {processes.count()} processes'
             if processes.count() > 1 else '')
  terminal.announce(f'{jax.local_device_count()} x {device}{several}; '
                    f'{args.mode} in {args.workdir}')
  default = config_lib.own('default')
  for field, (old, new) in config_lib.differences(default, config).items():
    terminal.announce(f'  config.{field} = {new}  (default {old})')


def _eval(args: argparse.Namespace, terminal: metrics.Terminal) -> None:
  """--mode=eval: prints the scores of a restored run."""
  from flax_imdb import dataset
  from flax_imdb import evaluate
  from flax_imdb import parallel
  from flax_imdb import run

  restored = run.restore(args.workdir, args.step)
  _introduce(restored.config, args, terminal)
  reviews = dataset.load(
      restored.config, restored.tokenizer, args.split, terminal.announce)
  clock = parallel.CompileClock()
  logits = evaluate.make_logits(restored.config, restored.model, clock)
  result = evaluate.score(logits(restored.params, reviews), reviews.labels)
  terminal.announce(f'step {restored.step}{clock.take()}')
  terminal.announce(evaluate.text(args.split, result))


def _predict(args: argparse.Namespace) -> None:
  """--mode=predict: prints a label, a probability and the text per review."""
  from flax_imdb import evaluate
  from flax_imdb import parallel
  from flax_imdb import run

  texts = texts_lib.read(args.words, args.input)
  restored = run.restore(args.workdir, args.step)
  logits = evaluate.make_logits(
      restored.config, restored.model, parallel.CompileClock())
  for part in evaluate.parts(texts):
    for prediction in evaluate.predict(
        logits, restored.params, restored.tokenizer, part):
      with files.writing('standard output'):
        print(json.dumps(prediction, ensure_ascii=False) if args.json
              else evaluate.prediction_text(prediction))


def _run(args: argparse.Namespace, config: ConfigDict) -> None:
  """Does what the command line says."""
  if args.mode == 'compile':  # or jax would look for the devices
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  elif args.mode not in ('train', 'prepare'):
    saved = files.path(args.workdir) / 'config.json'
    if saved.exists():
      config = config_lib.read(saved)
  environment.configure(
      config.global_batch_size // (args.num_processes or 1))
  # orbax warns of each reading of a run directory that is not to be changed,
  # and prints the errors that it also raises.
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  try:
    import jax  # only now: it reads the environment when it starts
  except ValueError as e:
    raise UserError(f'jax cannot start ({e}): correct or unset what is wrong '
                    'of the JAX_ variables in the environment') from e

  if args.mode in ('train', 'eval'):
    processes.initialize(
        args.coordinator_address, args.num_processes, args.process_id)
    if config.debug and processes.count() > 1:
      raise UserError('config.debug=True runs in one process only')
  try:
    jax.local_devices()
  except (RuntimeError, AssertionError) as e:  # the latter without a plugin
    platforms = os.environ.get('JAX_PLATFORMS', '')
    raise UserError(
        f'jax finds no devices for JAX_PLATFORMS={platforms!r}: install .[gpu] '
        'or .[tpu], or unset it') from e
  if config.debug:
    jax.config.update('jax_disable_jit', True)
    jax.config.update('jax_debug_nans', True)
  terminal = metrics.Terminal(quiet=processes.index() > 0)
  if args.mode == 'train':
    from flax_imdb import train
    _introduce(config, args, terminal)
    train.train(config, args.workdir, terminal)
  elif args.mode == 'eval':
    _eval(args, terminal)
  elif args.mode == 'predict':
    _predict(args)
  elif args.mode == 'report':
    from flax_imdb import report
    report.report([args.workdir, *args.words], terminal.announce)
  elif args.mode == 'export':
    from flax_imdb import export
    write = {'stablehlo': export.export_stablehlo, 'keras': export.export_keras}
    terminal.announce(write[args.format](args.workdir, args.step))
  elif args.mode == 'compile':
    from flax_imdb import ahead_of_time
    ahead_of_time.compile_for(config, args.topology, terminal.announce)
  else:
    from flax_imdb import dataset
    tokenizer = dataset.fit_tokenizer(config, terminal.announce)
    for split in ('train', 'test'):
      reviews = dataset.load(config, tokenizer, split, terminal.announce)
      terminal.announce(f'{split}: {len(reviews):,} reviews are ready')


def main(argv: list[str]) -> int:
  """Runs the program and returns its exit status.

  0: done; 1: the run failed; 2: a mistake in what was given; 75: stopped by a
  signal, with all of the run saved; 130: interrupted with nothing to save.
  """
  debug = False
  try:
    if sys.stdout is None:
      raise UserError('standard output is closed: add > /dev/null')
    args, config = _parse(argv)
    debug = config.debug
    _run(args, config)
    with files.writing('standard output'):
      sys.stdout.flush()
    processes.leave()
    return 0
  except (UserError, FloatingPointError, remote.StoreError) as e:
    if debug and processes.count() == 1:
      raise
    return _fail(str(e), 2 if isinstance(e, UserError) else 1)
  except preemption.Preempted as e:
    processes.leave()
    print(e, file=sys.stderr)
    return preemption.EXIT_STATUS
  except KeyboardInterrupt:
    return _fail('interrupted; started again, training goes on from the last '
                 'checkpoint', 130)
  except BrokenPipeError:  # the reader, such as head, has seen enough
    _give_up_output()
    return 0
  except Exception as e:
    if why := remote.failure(e):
      return _fail(f'the store failed ({why}): start it again', 1)
    processes.explain(e)
    raise


def _fail(message: str, status: int) -> int:
  """Prints one line on standard error; returns `status`."""
  processes.fail(message, status)
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


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
