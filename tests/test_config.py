"""Config files are found, loaded, changed, saved and compared."""

import pathlib
import re

import pytest

from flax_imdb import config
from flax_imdb.config import (
  _find,
  differences,
  load_config,
  override,
  read_config,
  write_config,
)
from flax_imdb.errors import UserError
from flax_imdb.fields import check_fields

ROOT = pathlib.Path(config.__file__).parents[1]
FILES = sorted(f'configs/{f.name}' for f in ROOT.glob('configs/*.py'))
START = """from flax_imdb.config import packaged
def get_config():
  config = packaged('default')
"""


@pytest.fixture
def default():
  return load_config('configs/default.py')


def _file(tmp_path, lines):
  path = tmp_path / 'mine.py'
  path.write_text(f'{START}  {lines}\n  return config\n')
  return str(path)


def _loaded(file):
  """A config that may be trained: of files one must say which."""
  config = load_config(file)
  if config.data.name == 'files':
    config.data.train_file = 'reviews.csv'
  return config


@pytest.mark.parametrize('file', FILES)
def test_each_config_loads_and_is_valid(file):
  check_fields(_loaded(file))


@pytest.mark.parametrize('file', FILES)
def test_each_docstring_holds_the_command_of_its_file(file):
  docstring = (ROOT / file).read_text('utf-8').split('"""')[1]
  commands = re.findall(r'python -m flax_imdb\.main.*', docstring)
  assert commands
  for command in commands:
    given = re.findall(r'--config=(\S+)', command)
    assert given == [file] or (file, given) == ('configs/default.py', [])


@pytest.mark.parametrize('file', FILES)
def test_each_field_of_a_config_has_a_comment(file):
  lines = re.findall(r'^ *config\.[\w.]+ = .*$', (ROOT / file).read_text(),
                     re.MULTILINE)
  fields = [line for line in lines if not line.endswith('= ConfigDict()')]
  assert fields
  for line in fields:
    assert re.search(r'  # \S', line), line


def test_configs_are_found_from_another_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for file in FILES:
    assert _find(file, pathlib.Path(), config._OURS).samefile(ROOT / file)
  assert load_config('configs/quickstart.py').data.name == 'grammar_reviews'


def test_another_projects_default_is_not_taken_for_ours(tmp_path, monkeypatch):
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'default.py').write_text(
      'from ml_collections import ConfigDict\n'
      'def get_config():\n  return ConfigDict({"other": 1})\n')
  mine = pathlib.Path(_file(tmp_path, 'config.seed = 3'))
  config = load_config(str(mine))
  monkeypatch.chdir(tmp_path)
  check_fields(config)
  with pytest.raises(UserError, match='config.* is (missing|not a field)'):
    check_fields(load_config('configs/default.py'))


def test_an_unknown_file_lists_the_known_ones(tmp_path):
  for path in ('configs/nope.py', str(tmp_path / 'x.py'), 'configs', ''):
    with pytest.raises(UserError, match='not found') as e:
      load_config(path)
    assert ', '.join(FILES) in str(e.value)


@pytest.mark.parametrize(('field', 'text', 'value'), [
    ('seed', '7', 7), ('learning_rate', '1e-4', 1e-4), ('clip_norm', '2', 2.0),
    ('optimizer', 'sgd', 'sgd'), ('debug', 'true', True),
    ('model.remat', 'False', False), ('model.bidirectional', '0', False),
    ('data.train_split', 'train[:10]', 'train[:10]'),
    ('early_stopping.patience', '3', 3)])
def test_override_reads_the_fields_type(default, field, text, value):
  before = load_config('configs/default.py')
  override(default, field, text)
  (changed,) = differences(before, default).items()
  assert changed[0] == field and changed[1][1] == value
  assert type(changed[1][1]) is type(value)
  check_fields(default)


@pytest.mark.parametrize(('field', 'text', 'message'), [
    ('model.widht', '3', r'config\.model\.widht is not a field.*model\.width'),
    ('model', '3', r'config\.model is not a field.*model.width'),
    ('seed', '1.5', r'config\.seed=1\.5: give a whole number, such as 0'),
    ('seed', '', 'config.seed=: give a whole number'),
    ('num_epochs', '1e3', 'give a whole number, such as'),
    ('learning_rate', 'fast', 'learning_rate=fast: give a number, such as 0.0'),
    ('debug', 'maybe', 'config.debug=maybe: give true or false'),
    ('debug', '2', 'give true or false')])
def test_override_names_the_mistake(default, field, text, message):
  with pytest.raises(UserError, match=message):
    override(default, field, text)
  assert default == load_config('configs/default.py')


def test_a_config_file_may_write_1_for_1_0(tmp_path):
  config = load_config(_file(tmp_path, 'config.learning_rate = 1'))
  assert type(config.learning_rate) is float
  check_fields(config)


@pytest.mark.parametrize(('lines', 'message'), [
    ('config.num_epochs = 1.5', 'TypeError.*num_epochs'),
    ('config.modle.width = 3', 'AttributeError.*modle'),
    ('raise RuntimeError("so")', 'RuntimeError: so'),
    ('x = (', 'SyntaxError'), ('return None', 'ConfigDict')])
def test_a_faulty_config_file_is_named(tmp_path, lines, message):
  path = _file(tmp_path, lines)
  with pytest.raises(UserError, match=f'(?s){re.escape(path)}: .*{message}'):
    load_config(path)


def test_a_config_file_must_be_python_with_a_get_config(tmp_path, default):
  write_config(default, tmp_path / 'config.json')
  (tmp_path / 'empty.py').write_text('')
  with pytest.raises(UserError, match='config.json'):
    load_config(str(tmp_path / 'config.json'))
  with pytest.raises(UserError, match=r'empty\.py.*get_config'):
    load_config(str(tmp_path / 'empty.py'))


def test_differences_name_both_values(default):
  other = load_config('configs/default.py')
  assert differences(default, other) == {}
  other.model.width, other.seed = 3, 9
  del default['debug']
  assert differences(default, other) == {
      'debug': (None, False), 'model.width': (default.model.width, 3),
      'seed': (0, 9)}


@pytest.mark.parametrize('file', FILES)
def test_save_and_read_keep_values_and_types(file, tmp_path):
  config = _loaded(file)
  write_config(config, tmp_path / 'config.json')
  again = read_config(str(tmp_path / 'config.json'))
  assert differences(config, again) == {}
  assert repr(sorted(again.to_dict().items())) == repr(
      sorted(config.to_dict().items()))  # 1.0 stays 1.0


@pytest.mark.parametrize('text', [
    None, '', '{"seed": 0', '[]', '[1]', '5', '"a"', 'null', '{}', '{"a.b": 1}',
    '{"model": 3}', '\x00'])
def test_a_damaged_config_json_is_refused(tmp_path, text):
  path = tmp_path / 'config.json'
  if text is not None:
    path.write_text(text)
  with pytest.raises(UserError):
    read_config(path)


def test_a_field_that_an_older_version_had_not_is_what_it_did(
    tmp_path, default):
  written = default.copy_and_resolve_references()
  del written.data['word_index']
  write_config(written, tmp_path / 'config.json')
  assert differences(read_config(tmp_path / 'config.json'), default) == {}
  default.data.word_index, default.data.punctuation = 'words.json', False
  write_config(default, tmp_path / 'config.json')
  assert read_config(tmp_path / 'config.json').data.word_index == 'words.json'
  del written.data['vocab_size']  # which it had
  write_config(written, tmp_path / 'config.json')
  with pytest.raises(UserError, match='data.vocab_size is missing'):
    read_config(tmp_path / 'config.json')


def test_what_is_read_is_checked(tmp_path, default):
  default.optimizer = 'lion'
  write_config(default, tmp_path / 'config.json')
  with pytest.raises(UserError, match='config.optimizer=lion'):
    read_config(tmp_path / 'config.json')
