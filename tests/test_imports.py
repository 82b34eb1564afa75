"""One direction, no way back: which floor of the house may stand on which."""

import ast
import pathlib

import pytest

import flax_imdb

PACKAGE = pathlib.Path(flax_imdb.__file__).parent
ROOT = PACKAGE.parent
# A floor is a folder or a file beside the folders. It may import those before
# it, and none after it; inside a folder no circle may be.
FLOORS = [
    'errors', 'storage', 'environment', 'fields', 'config', 'terminal',
    'cluster', 'data', 'model', 'checkpoint', 'inference', 'train', 'analysis',
    'api', 'cli', 'main']
# What is imported before jax, and must not bring it in: jax reads the
# environment when it starts.
BEFORE_JAX = {
    'errors', 'storage', 'environment', 'fields', 'config', 'terminal', 'api',
    'cli', 'main', 'cluster/discovery', 'cluster/processes', 'cluster/watchdog',
    'data'}
MODULES = sorted(PACKAGE.rglob('*.py'))
PRODUCT = [*MODULES, *sorted((ROOT / 'configs').glob('*.py'))]
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
  """The modules of the package that a file imports, such as 'data/batches'."""
  modules = set()
  for name in _imports(file):
    first, *rest = name.split('.')
    if first == 'flax_imdb':
      places = ['/'.join(rest[:i]) for i in range(len(rest), 0, -1)]
      found = [x for x in places if (PACKAGE / f'{x}.py').exists()]
      modules |= set(found[:1] or ['__init__'])
  return modules


def _floor(module):
  return module.split('/')[0]


def _module(file):
  return str(file.relative_to(PACKAGE).with_suffix(''))


def test_every_module_stands_on_a_floor():
  floors = {_floor(_module(file)) for file in MODULES}
  assert floors == {*FLOORS, '__init__'}
  assert not list(PACKAGE.glob('*/*/*.py'))


@pytest.mark.parametrize('file', MODULES, ids=_name)
def test_a_floor_stands_only_on_those_below_it(file):
  if file == PACKAGE / '__init__.py':
    assert _top(file) <= {'importlib', 'typing'}  # it starts nothing
    return
  floor = _floor(_module(file))
  below = {'__init__', *FLOORS[:FLOORS.index(floor)]}
  assert {_floor(x) for x in _ours(file)} - {floor} <= below


@pytest.mark.parametrize('floor', FLOORS)
def test_no_circle_is_inside_a_floor(floor):
  inside = {_module(file): {x for x in _ours(file) if _floor(x) == floor}
            for file in MODULES if _floor(_module(file)) == floor}
  while leaves := {name for name, imported in inside.items() if not imported}:
    inside = {name: imported - leaves for name, imported in inside.items()
              if name not in leaves}
  assert not inside, f'these import each other: {sorted(inside)}'


@pytest.mark.parametrize('file', PRODUCT, ids=_name)
def test_configs_import_only_config_and_nothing_imports_main(file):
  assert 'main' not in _ours(file)
  if file.parent.name == 'configs':
    assert _ours(file) <= {'config'}


def _top(file):
  """Modules imported where importing the module imports them."""
  body = ast.parse(file.read_text('utf-8')).body
  nodes = [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
  return {getattr(n, 'module', None) or n.names[0].name for n in nodes}


@pytest.mark.parametrize('file', [
    file for file in MODULES
    if {_module(file), _floor(_module(file))} & BEFORE_JAX], ids=_name)
def test_what_comes_before_jax_does_not_bring_it_in(file):
  assert not {x.split('.')[0] for x in _top(file)} & {
      'jax', 'flax', 'optax', 'orbax'}
  ours = {x.removeprefix('flax_imdb.').replace('.', '/') for x in _top(file)
          if x.startswith('flax_imdb.')}
  floors_with_jax = {'model', 'checkpoint', 'inference', 'train', 'analysis'}
  assert not {_floor(x) for x in ours} & floors_with_jax
  assert not ours & {'cluster/devices', 'cluster/preemption'}


@pytest.mark.parametrize('file', PRODUCT, ids=_name)
def test_no_other_framework_is_imported(file):
  tops = {name.split('.')[0] for name in _imports(file)}
  assert not tops & {'tensorflow', 'keras', 'torch', 'clu', 'pandas'}


@pytest.mark.parametrize('file', EVERYTHING, ids=_name)
def test_no_file_is_called_utils(file):
  assert not {'util', 'utils', 'common', 'misc', 'helpers'} & set(
      file.with_suffix('').relative_to(ROOT).parts)


@pytest.mark.parametrize('file', PRODUCT, ids=_name)
def test_a_file_has_a_docstring(file):
  docstring = ast.get_docstring(ast.parse(file.read_text('utf-8')))
  assert len((docstring or '').split()) >= 3
