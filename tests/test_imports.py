"""One direction, no way back: what may import what, and how large it gets."""

import ast
import pathlib

import pytest

import flax_imdb

PACKAGE = pathlib.Path(flax_imdb.__file__).parent
ROOT = PACKAGE.parent
# A module may import those before it, and none after it.
ORDER = [
    'errors', 'remote', 'files', 'npz', 'environment', 'config', 'grammar',
    'tfds_builders', 'watchdog', 'processes', 'builders', 'tokenizer',
    'batches', 'dataset', 'metrics', 'preemption', 'progress', 'parallel',
    'recurrent', 'model', 'optimizer', 'step', 'seal', 'late_errors',
    'checkpoint',
    'evaluate', 'ahead_of_time', 'keras_weights', 'run', 'report', 'export',
    'train', 'texts', 'main']
# Start-up: these come before jax, and must not bring it in.
BEFORE_JAX = ORDER[:ORDER.index('preemption') + 1]
PRODUCT = sorted(
    file for folder in (PACKAGE, ROOT / 'configs') for file in
    folder.rglob('*.py') if '__pycache__' not in file.parts)
EVERYTHING = sorted({*PRODUCT, *(
    file for folder in ('tests', 'benchmarks', 'launch', 'examples')
    for file in (ROOT / folder).rglob('*.py'))})


def _name(file):
  return str(file.relative_to(ROOT))


def _imports(file):
  """Dotted names a file imports, at its top or inside a function."""
  names = set()
  for node in ast.walk(ast.parse(file.read_text('utf-8'))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'relative import in {file}'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def _ours(file):
  """The modules of the package that a file imports, such as 'config'."""
  modules = set()
  for name in _imports(file):
    first, *rest = name.split('.')
    if first == 'flax_imdb':
      found = [part for part in rest[:1] if (PACKAGE / f'{part}.py').exists()]
      modules |= set(found or ['__init__'])
  return modules


def test_every_module_has_its_place():
  stems = {file.stem for file in PACKAGE.glob('*.py')} - {'__init__'}
  assert stems == set(ORDER)
  assert not list(PACKAGE.glob('*/*.py'))  # folders would need a new ORDER


@pytest.mark.parametrize('module', ORDER)
def test_a_module_imports_only_modules_before_it(module):
  allowed = {'__init__', *ORDER[:ORDER.index(module)]}
  assert _ours(PACKAGE / f'{module}.py') <= allowed


def test_the_package_itself_imports_nothing():
  assert _imports(PACKAGE / '__init__.py') == set()


@pytest.mark.parametrize('file', PRODUCT, ids=_name)
def test_configs_import_only_config_and_nothing_imports_main(file):
  assert 'main' not in _ours(file)
  if file.parent.name == 'configs':
    assert _ours(file) <= {'config'}


def _top(file):
  """Top-level packages imported where importing the module imports them."""
  body = ast.parse(file.read_text('utf-8')).body
  nodes = [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
  names = [getattr(n, 'module', None) or n.names[0].name for n in nodes]
  return {name.split('.')[0] for name in names}


@pytest.mark.parametrize('module', BEFORE_JAX)
def test_reading_data_and_config_needs_no_jax(module):
  assert not _top(PACKAGE / f'{module}.py') & {'jax', 'flax', 'optax', 'orbax'}


@pytest.mark.parametrize('file', PRODUCT, ids=_name)
def test_no_other_framework_is_imported(file):
  tops = {name.split('.')[0] for name in _imports(file)}
  assert not tops & {'tensorflow', 'keras', 'torch', 'clu', 'pandas'}


@pytest.mark.parametrize('file', EVERYTHING, ids=_name)
def test_no_file_is_called_utils(file):
  assert not {'util', 'utils', 'common', 'misc', 'helpers'} & set(
      file.with_suffix('').relative_to(ROOT).parts)


@pytest.mark.parametrize('file', PRODUCT, ids=_name)
def test_a_file_has_a_docstring_and_at_most_300_lines(file):
  text = file.read_text('utf-8')
  assert len((ast.get_docstring(ast.parse(text)) or '').split()) >= 3
  assert len(text.splitlines()) <= 300
