"""Config files: find, load, override, save, compare."""

import difflib
import importlib.util
import json
import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

from flax_imdb.errors import UserError
from flax_imdb.fields import ADDED, BOOLS, TYPES, check_fields, flat
from flax_imdb.storage import files

_ROOT = pathlib.Path(__file__).parent
# A wheel carries `configs` inside the package, a checkout keeps it beside. What
# lies beside an installed package, without our pyproject.toml, is another's.
_OURS = (_ROOT if (_ROOT / 'configs').is_dir()
         or not (_ROOT.parent / 'pyproject.toml').is_file() else _ROOT.parent)
_MOST_BYTES = 1 << 16  # of config.json; ours have 1,600


def _find(path: str, *parents: pathlib.Path) -> pathlib.Path:
  for parent in parents:
    if os.path.isfile(parent / path):  # also where the name is too long
      return parent / path
  known = sorted(f'configs/{f.name}' for f in _OURS.glob('configs/*.py'))
  raise UserError(f'config file {path} not found; there are {", ".join(known)}')


def load_config(path: str) -> ConfigDict:
  """Runs `get_config()` of a config file.

  `path` is relative to the working directory or, like 'configs/debug.py', to
  the checkout or the installed package. Raises UserError if there is no such
  file, and says which there are, or if it fails.
  """
  file = _find(path, pathlib.Path(), _OURS)
  spec = importlib.util.spec_from_file_location(f'config_{file.stem}', file)
  if not (spec and spec.loader):
    raise UserError(f'config file {file} is no Python file: give a .py one')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config()
  except (Exception, SystemExit) as e:  # whatever a config file can raise
    raise UserError(f'config file {file}: {type(e).__name__}: {e}') from e
  if not isinstance(config, ConfigDict):
    raise UserError(f'config file {file}: get_config() returns no ConfigDict')
  return config


def packaged(name: str) -> ConfigDict:
  """The package's own configs/`name`.py, wherever the program started."""
  return load_config(str(_find(f'configs/{name}.py', _OURS)))


own = packaged  # what config files of users, made for version 0.1, call it


def override(config: ConfigDict, field: str, text: str) -> None:
  """Sets a field, such as 'model.width', to a text read as the field's type.

  Raises UserError if there is no such field, or the text is not of its type.
  """
  values = flat(config)
  if field not in values:
    near = difflib.get_close_matches(field, values, n=8, cutoff=0)
    raise UserError(f'config.{field} is not a field; there are '
                    f'{", ".join(near)} and more in configs/default.py')
  kind = type(values[field])
  try:
    value: Any = BOOLS[text.lower()] if kind is bool else kind(text)
  except (ValueError, KeyError):
    raise UserError(f'config.{field}={text}: give {TYPES[kind]}, such as '
                    f'{values[field]}') from None
  config.update_from_flattened_dict({field: value})


def differences(config: ConfigDict, other: ConfigDict) -> dict[str, tuple]:
  """The fields in which two configs differ: {field: (value, other value)}."""
  a, b = flat(config), flat(other)
  return {k: (a.get(k), b.get(k)) for k in sorted({*a, *b})
          if a.get(k) != b.get(k)}


def nearest(config: ConfigDict) -> tuple[str, dict[str, Any]]:
  """The packaged config file from which the fewest fields differ, and these.

  The file is as `load_config` takes it, and the fields are those to set.
  """
  found = {f'configs/{file.name}': differences(load_config(str(file)), config)
           for file in sorted(_OURS.glob('configs/*.py'))}
  # Of equal ones default.py, which it takes no flag to name.
  name = min(found, key=lambda x: (len(found[x]), x != 'configs/default.py'))
  return name, {field: new for field, (_, new) in found[name].items()}


def write_config(config: ConfigDict, path: str | os.PathLike[str]) -> None:
  """Writes a config as JSON; errors as `files.write`."""
  files.write(path, json.dumps(config.to_dict(), indent=2) + '\n')


def read_config(path: str | os.PathLike[str]) -> ConfigDict:
  """Reads what `write_config` wrote; UserError if it is missing or damaged.

  Fields that its version did not have are those of `ADDED`.
  """
  text = files.read_bytes(path, _MOST_BYTES)
  try:
    config = ConfigDict(json.loads(text, object_pairs_hook=_once))
    for name in set(ADDED) - set(flat(config)):
      config.update_from_flattened_dict({name: ADDED[name]})
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
    raise UserError(f'{path} is not a config ({e}): was the run directory '
                    'copied whole?') from e
  try:
    check_fields(config)
  except UserError as e:
    raise UserError(f'{path}: {e}') from e
  return config


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  if len(fields := dict(pairs)) < len(pairs):  # json would take the last
    raise ValueError('a field stands there twice')
  return fields
