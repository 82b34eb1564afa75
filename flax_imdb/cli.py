"""The command line: flags in, what to do out; a mistake is one line."""

import argparse
from collections.abc import Iterable
import difflib
import os
import pathlib
import re
from typing import NoReturn

from ml_collections import ConfigDict

from flax_imdb.cluster import discovery
from flax_imdb.config import load_config, override
from flax_imdb.errors import STATUSES, UserError
from flax_imdb.fields import check_fields, completions
from flax_imdb.storage import files

# Flags that only some modes take.
_MODES = {'step': ('eval', 'predict', 'serve', 'export'), 'split': ('eval',),
          'input': ('predict',), 'json': ('predict',),
          'explain': ('predict',), 'html': ('predict',),
          'host': ('serve',), 'port': ('serve',),
          'texts_per_minute': ('serve',), 'format': ('export',),
          'seeds': ('sweep',), 'set': ('sweep',), 'jobs': ('sweep',),
          'minutes': ('tune',),
          # Of the other modes the answer is what they print.
          'quiet': ('train', 'prepare', 'report', 'export', 'sweep', 'tune')}
# Modes that are no run themselves, but start some.
PARENTS = ('sweep', 'tune')


class _Parser(argparse.ArgumentParser):
  """Raises a UserError where argparse would print its usage and exit."""

  def error(self, message: str) -> NoReturn:
    """Raises it in one line; of a wrong choice with the nearest one."""
    if choice := re.fullmatch(
        r"argument (--\w+): invalid choice: '(.*?)' \(choose from (.*)\)",
        message, re.DOTALL):
      flag, value, known = choice.groups()
      message = (f'{flag}={value}: choose {known.replace(chr(39), "")}'
                 + _nearest(value, re.findall(r'\w+', known)))
    raise UserError(f'{message}; see --help')


def _nearest(word: str, known: Iterable[str]) -> str:
  """Asks whether another word was meant; '' if none is near."""
  near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
  return f'; did you mean {near[0]}?' if near else ''


def parse(argv: list[str]) -> tuple[argparse.Namespace, ConfigDict]:
  """Reads the flags and the config, whose fields are checked.

  Modes that open a run directory take the config in it instead, but for
  args.debug: None, or what --config.debug says. Raises UserError if a flag or a
  field is unknown or does not fit; --help exits.
  """
  parser = _flags()
  if '_ARGCOMPLETE' in os.environ:  # a shell asks what could come next
    _complete(parser)
  args, rest = parser.parse_known_args(argv)
  if args.words and args.mode not in ('predict', 'report'):
    raise UserError(f'unexpected {args.words[0]!r}: write fields as '
                    '--config.FIELD=VALUE')
  for name in 'workdir', 'html', 'input':  # '' would pass for not given
    if getattr(args, name) == '':
      raise UserError(f'--{name} is empty: give a value, or leave it out')
  _check_mode(args, parser)
  config = load_config(args.config)
  for word in rest:
    field, equals, value = word.removeprefix('--config.').partition('=')
    if not word.startswith('--config.') or not equals:
      flag = word.partition('=')[0]
      known = [option for action in parser._actions
               for option in action.option_strings if len(option) > 2]
      raise UserError(f'unknown flag {word}{_nearest(flag, known)}; see --help')
    override(config, field, value)
  check_fields(config)
  other = [word for word in rest if not word.startswith('--config.debug=')]
  if other and args.mode not in ('train', 'prepare', 'compile', *PARENTS):
    raise UserError(f'{other[0]}: --mode={args.mode} takes the config of the '
                    'run directory, but for --config.debug')
  args.debug = config.debug if len(rest) > len(other) else None
  name = pathlib.Path(args.config).stem
  args.workdir = files.absolute(args.workdir or (
      f'runs/{name}_{args.mode}' if args.mode in PARENTS else f'runs/{name}'))
  if args.mode in PARENTS and '://' in args.workdir:
    raise UserError(f'--mode={args.mode} keeps its runs on a disk: give '
                    f'another --workdir than {args.workdir}')
  _check_utf8([*argv, args.workdir, *(os.environ.get(name, '') for name in (
      'HOME', 'XDG_CACHE_HOME', 'TFDS_DATA_DIR'))])
  return args, config


_EXAMPLES = """\
Learns what texts are, such as film reviews: positive or negative.

  %(prog)s                                   IMDB; again: resume
  %(prog)s --config=configs/quickstart.py    no network
  %(prog)s --config.model.width=64 --workdir=runs/wide
  %(prog)s --mode=eval --split=validation    of runs/default
  %(prog)s --mode=predict "Not bad at all."
  %(prog)s --mode=sweep --seeds=5 --set model.width=32,64
"""


def _flags() -> _Parser:
  parser = _Parser(
      prog='python -m flax_imdb.main', allow_abbrev=False,
      usage='%(prog)s [--mode=MODE] [--config=FILE] [--workdir=DIR]\n'
      '       [--config.FIELD=VALUE ...] [flags of the mode] [words ...]',
      formatter_class=argparse.RawDescriptionHelpFormatter,
      description=_EXAMPLES, epilog='\n'.join([
          'configs/default.py explains all fields. Exit status:',
          *(f'{n:4}  {what}' for n, what in STATUSES.items())]))
  add = parser.add_argument
  add('--mode', default='train', choices=[
      'train', 'eval', 'predict', 'serve', 'report', 'export', 'compile',
      'prepare', 'sweep', 'tune'], metavar='MODE',
      help='train, eval, predict, serve, report, export, compile, prepare, '
      'sweep (compare values), tune (find better)')
  add('--config', default='configs/default.py', metavar='FILE')
  add('--workdir', metavar='DIR', help='run directory; default: runs/ and the '
      'name of the config file, of sweep and tune with that behind')
  add('--step', metavar='N', help='eval, predict, serve, export: best, latest '
      'or a number; default: what the run evaluated')
  add('--split', default='test', choices=['train', 'validation', 'test'],
      metavar='SPLIT', help='eval: train, validation or test, the default')
  add('--input', metavar='FILE',
      help='predict: one review a line; default: standard input')
  add('--json', action='store_true', help='predict: one JSON object a line')
  add('--explain', action='store_true',
      help='predict: which words decided; coloured on a terminal')
  add('--html', metavar='FILE',
      help='predict --explain: also a page of the words')
  add('--host', default='127.0.0.1', metavar='HOST',
      help='serve: address to listen at; default: this machine')
  add('--port', type=int, default=8000, metavar='N',
      help='serve: default: 8000')
  add('--texts_per_minute', type=int, default=0, metavar='N',
      help='serve: most for one address; default: any number')
  add('--format', default='stablehlo', choices=['stablehlo', 'keras'],
      metavar='FORMAT', help='export: stablehlo, for jax alone, or keras, '
      'model.get_weights() as .npz')
  add('--topology', metavar='NAME', help='compile: for devices that need not '
      'be there, such as v5e:2x2 or cuda:h100x8')
  add('--set', action='append', default=[], metavar='FIELD=A,B',
      help='sweep: values of a field; of several, all combinations')
  add('--seeds', type=int, default=5, metavar='N',
      help='sweep: runs a combination, by seed; default: 5')
  add('--jobs', type=int, default=1, metavar='N', help='sweep: runs at a time')
  add('--minutes', type=float, metavar='N',
      help='tune: how long in all, over all starts')
  add('--coordinator_address', metavar='HOST:PORT',
      help='several processes: where process 0 listens; not needed on SLURM '
      'and Cloud TPU')
  add('--num_processes', type=int, metavar='N', help='how many there are')
  add('--process_id', type=int, metavar='I', help='which this is, from 0')
  add('--quiet', action='store_true',
      help='print only why the exit status is not 0')
  add('words', nargs='*', help='predict: a review; report: more runs')
  return parser


def _complete(parser: _Parser) -> None:
  """Answers a shell, with the fields of the config as well, and exits."""
  import argcomplete

  for name, choices in completions().items():
    parser.add_argument(f'--config.{name}', choices=choices or None)
  argcomplete.autocomplete(parser)


def _check_mode(args: argparse.Namespace, parser: _Parser) -> None:
  """Raises a UserError for a flag that the mode does not take."""
  for flag, modes in _MODES.items():
    if (getattr(args, flag) != parser.get_default(flag)
        and args.mode not in modes):
      raise UserError(f'--{flag} is for --mode={" or ".join(modes)}, not for '
                      f'--mode={args.mode}')
  if args.html is not None and not args.explain:
    raise UserError(f'--html={args.html} is a page of words that decided: give '
                    '--explain as well')
  if args.html and args.input and os.path.realpath(
      args.html) == os.path.realpath(args.input):
    raise UserError(f'--html={args.html} would take the place of what --input '
                    'is to read: give another file')
  if (args.mode == 'compile') != (args.topology is not None):
    raise UserError('--mode=compile and --topology=NAME, such as v5e:2x2, go '
                    'together: give both or neither')
  if (args.mode == 'tune') != (args.minutes is not None):
    raise UserError('--mode=tune needs --minutes=N, such as 30')
  if args.minutes is not None and not 0 < args.minutes < float('inf'):
    raise UserError(f'--minutes={args.minutes}: must be finite, and over 0')
  if not 0 <= args.port < 1 << 16:
    raise UserError(f'--port={args.port}: must be 1 to 65535, or 0 for any '
                    'that is free')
  for flag in ('seeds', 'jobs'):
    if getattr(args, flag) < 1:
      raise UserError(f'--{flag}={getattr(args, flag)}: must be at least 1')
  discovery.check_flags(
      args.coordinator_address, args.num_processes, args.process_id)
  if args.num_processes is not None and args.mode not in ('train', 'eval'):
    raise UserError(f'--mode={args.mode} runs in one process: leave out '
                    '--num_processes')


def _check_utf8(words: list[str]) -> None:
  """Raises a UserError for what TensorStore and array_record don't take."""
  for word in words:
    try:
      word.encode()
    except UnicodeEncodeError as e:
      raise UserError(f'{word!r} is not UTF-8: rename or convert it, for '
                      'instance with convmv or iconv') from e
