"""The command line as a person meets it: help, suggestions, completion."""

import os
import subprocess
import sys

import pytest
from support.command import ROOT

from flax_imdb import cli
from flax_imdb.errors import UserError


def test_help_fits_two_screens_and_begins_with_examples(monkeypatch, capsys):
  monkeypatch.setenv('COLUMNS', '80')
  with pytest.raises(SystemExit) as e:
    cli.parse(['--help'])
  assert e.value.code == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) <= 2 * 27 and max(map(len, lines)) <= 80
  first = next(i for i, x in enumerate(lines) if 'flax_imdb.main --' in x)
  examples = [x.split('flax_imdb.main')[1].split('  ')[0].split()
              for x in lines[3:first + 6] if x.startswith('  python')]
  assert len(examples) == 6
  for words in examples:
    cli.parse([word for word in words if word[0] != '"' and word[-1] != '"'])


@pytest.mark.parametrize(('word', 'says'), [
    ('--mode=evl', 'choose train, eval, .*; did you mean eval'),
    ('--workdri=x', 'unknown flag --workdri=x; did you mean --workdir'),
    ('--split=tset', 'did you mean test'),
    ('--config.model.widht=3', 'there are model.width'),
    ('--xyzzy', 'unknown flag --xyzzy; see'), ('-q', 'unknown flag -q; see')])
def test_the_nearest_is_suggested(word, says):
  with pytest.raises(UserError, match=says):
    cli.parse([word])


def _completed(line):
  """What a shell is offered, as argcomplete's own function asks for it."""
  line = f'flax-imdb {line}'
  process = subprocess.run(
      ['bash', '-c', '"$0" -m flax_imdb.main 8>&1 9>/dev/null', sys.executable],
      cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
      env=os.environ | {
          '_ARGCOMPLETE': '1', '_ARGCOMPLETE_SUPPRESS_SPACE': '1',
          'COMP_LINE': line, 'COMP_POINT': str(len(line)), 'IFS': '\v'})
  return process.stdout.split('\v')


@pytest.mark.parametrize(('line', 'offers'), [
    ('--mode=e', ['--mode=eval', '--mode=export']),
    ('--config.model.w', ['--config.model.width',
                          '--config.model.word_dropout']),
    ('--config.model.dtype=b', ['--config.model.dtype=bfloat16']),
    ('--config.debug=', ['--config.debug=true', '--config.debug=false'])])
def test_a_shell_completes_modes_fields_and_values(line, offers):
  pytest.importorskip('argcomplete')
  assert _completed(line) == offers


