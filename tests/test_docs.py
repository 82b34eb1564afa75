"""The commands that README and docs/ show, run in the order of the pages."""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from support.command import ROOT, STRICT
from support.models import drawn_params

from flax_imdb.config import load_config
from flax_imdb.model import classifier, keras_weights

README = (ROOT / 'README.md').read_text()
DOCS = {path.name: path.read_text('utf-8')
        for path in sorted((ROOT / 'docs').glob('*.md'))}
# A run that is used comes before what uses it.
PAGES = [README, *(DOCS[f'{name}.md'] for name in ('usage', 'notebook')), *(
    page for name, page in DOCS.items()
    if name not in ('usage.md', 'notebook.md'))]
BLOCKS = [block for page in PAGES for block in re.findall(
    r'```bash\n(.*?)```', page, flags=re.DOTALL)]
COMMANDS = list(dict.fromkeys(
    line for block in BLOCKS for line in block.splitlines()
    if line and not line.startswith('#')))
HAS_IMDB = pathlib.Path(
    os.environ.get('TFDS_DATA_DIR', 'none'), 'imdb_reviews').is_dir()
needs_imdb = pytest.mark.skipif(
    not HAS_IMDB, reason='needs TFDS_DATA_DIR with imdb_reviews')


def _program(command):
  """Commands of the program without the environment and what pip installs."""
  return re.sub(r'^pip install \S+( \S+)? && ', '', command)


# Trains for many minutes; smaller ones of the kind run in tests/analysis and
# tests/train/test_selftrain.py.
LONG = re.compile(r'--mode=(sweep|tune)|configs/(best|semi)\.py|/tuned\.py')


def _needs_imdb(command):
  """True where a command works on IMDB or on a run that was trained on it."""
  return not re.search('quickstart|configs/texts', command)


def test_the_two_commands_for_a_fresh_machine_are_there():
  # `.ci/run` runs the second one, which runs the first one's program below.
  assert COMMANDS[0] == ('pip install -e . && python -m flax_imdb.main '
                         '--config=configs/quickstart.py')
  assert COMMANDS[1] == "pip install -e '.[test]' && pytest"
  assert COMMANDS[1] in (ROOT / '.ci' / 'run').read_text()


def test_every_command_is_one_that_is_run_here_or_known():
  known = ('python -m flax_imdb.main ', 'pytest', 'pip install',
           'tensorboard ', 'python benchmarks/', 'echo ', 'launch/gpu.sh',
           'python launch/local.py ')
  for command in COMMANDS:
    assert (_program(command) + ' ').startswith(known), command


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """A directory that is not the checkout, where the commands leave runs/."""
  home = tmp_path_factory.mktemp('readme')
  model = classifier.build_model(load_config('configs/notebook.py'))
  keras_weights.write_weights(home / 'weights.npz',
                              drawn_params(model))
  rows = [f'"Der {i}. Film ist {word}","{label}"\n' for i in range(200)
          for word, label in (('groß', 'gut'), ('öde', 'schlecht'))]
  (home / 'reviews.csv').write_text('Text,Label\n' + ''.join(rows), 'utf-8')
  return home


@pytest.fixture(scope='module')
def printed():
  """What each command printed."""
  return {}


@pytest.mark.slow
@pytest.mark.parametrize(
    'command', [c for c in COMMANDS
                if ('flax_imdb.main' in c or 'examples/' in c)
                and not LONG.search(c)])
def test_command(command, home, printed):
  command = _program(command)
  if _needs_imdb(command) and not HAS_IMDB:
    pytest.skip('needs TFDS_DATA_DIR with imdb_reviews')
  if '--mode=compile' in command and not importlib.util.find_spec('libtpu'):
    pytest.skip('libtpu is not installed (pip install .[aot])')
  python = shlex.quote(sys.executable)
  environ = os.environ | {'PYTHONPATH': str(ROOT)}
  process = subprocess.run(
      command.replace('python -m', f'{python} {shlex.join(STRICT)} -m').replace(
          'python examples/', f'{python} {shlex.quote(str(ROOT))}/examples/'),
      shell=True, cwd=home, env=environ, capture_output=True, check=False,
      timeout=600)
  assert process.returncode == 0, process.stderr.decode()
  printed[command] = process.stdout.decode()
  assert printed[command]


@pytest.mark.slow
@needs_imdb
def test_the_default_run_keeps_its_promise_and_eval_agrees(home, printed):
  summary = json.loads((home / 'runs/default/summary.json').read_text())
  assert summary['test']['n'] == 25_000
  assert summary['test']['accuracy'] >= 0.92
  last = printed['python -m flax_imdb.main --mode=eval'].splitlines()[-1]
  assert last in printed['python -m flax_imdb.main'].splitlines()
  assert f'accuracy {summary["test"]["accuracy"]:.4f}' in last


@pytest.mark.slow
def test_quickstart_reads_what_word_counts_cannot(home):
  summary = json.loads((home / 'runs/quickstart/summary.json').read_text())
  assert summary['test']['n'] == 1_000
  assert summary['test']['accuracy'] >= 0.93  # bag of words: 0.67


def test_the_site_is_built_and_asks_for_nothing_from_elsewhere(tmp_path):
  process = subprocess.run(
      [sys.executable, '-m', 'mkdocs', 'build', '--strict',
       f'--site-dir={tmp_path}'], cwd=ROOT, capture_output=True, text=True,
      check=False, timeout=300)
  assert process.returncode == 0, process.stderr  # a dead link, for instance
  pages = {path.name: path.read_text('utf-8')
           for path in tmp_path.glob('*.html')}
  assert {'index.html', 'RESULTS.html', 'usage.html'} <= pages.keys()
  for name, page in pages.items():
    for tag in re.findall(r'<(?:script|link|img|iframe)\b[^>]*>', page):
      assert not re.search(r'(src|href)="?(https?:)?//', tag), (name, tag)
  shown = re.findall(r'<img [^>]*src="?(\w+\.png)', pages['tour.html'])
  assert len(shown) == 6 and all((tmp_path / name).exists() for name in shown)
  assert '<mark ' in pages['tour.html'] and 'epoch 1/' in pages['tour.html']
  fields = load_config('configs/default.py')
  for name, value in fields.items():
    names = ([f'{name}.{x}' for x in value] if hasattr(value, 'items')
             else [name])
    for x in names:
      assert len(re.findall(rf'<td><code>{x}</code></td>',
                            pages['fields.html'])) == 1, x


def test_a_visitor_has_read_readme_in_three_minutes():
  assert len(README.splitlines()) <= 150


def test_the_tree_has_a_line_for_each_folder_and_file():
  tree = re.search(r'```\nflax_imdb/\n(.*?)```', README, flags=re.DOTALL)[1]
  package, others = tree[:tree.index('\nconfigs/')], tree
  for path in (ROOT / 'flax_imdb').iterdir():
    if path.name not in ('__init__.py', '__pycache__', 'configs'):
      name = re.escape(path.name + '/' * path.is_dir())
      assert len(re.findall(rf'^  {name} ', package, re.MULTILINE)) == 1, name
  names = re.findall(r'^  (\S+)  |^  ([\w.]+) ', package, re.MULTILINE)
  for name in (a or b for a, b in names):
    assert (ROOT / 'flax_imdb' / name).exists(), name
  folders = re.findall(r'^(\w+)/ ', others, re.MULTILINE)
  assert len(folders) == 6
  for name in folders:
    assert (ROOT / name).is_dir(), name
