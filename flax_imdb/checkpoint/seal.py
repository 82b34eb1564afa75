"""Whether a checkpoint, perhaps a stranger's, is what it should be."""

import json
import os
import pathlib
from typing import Any
import zlib

import jax
import numpy as np

from flax_imdb.errors import UserError
from flax_imdb.storage import files

# Of all files of a step but its arrays; 100 layers have 600,000, ours 10,000.
_MOST_BYTES = 1 << 22


def checksum(tree: Any) -> int:
  """CRC-32 of all arrays; orbax notices only some changes of theirs."""
  crc = 0
  for x in jax.tree.leaves(tree):
    crc = zlib.crc32(np.ascontiguousarray(x).tobytes(), crc)
  return crc


def sealed(values: dict[str, Any]) -> dict[str, Any]:
  """Adds a checksum of the others."""
  values = {k: v for k, v in values.items() if k != 'crc32'}
  text = json.dumps(values, sort_keys=True)
  return values | {'crc32': zlib.crc32(text.encode())}


def check_shapes(source: str, expected: Any, found: Any) -> None:
  """Raises UserError if two trees, of arrays or shapes, differ; says where."""
  a, b = ({name: list(x.shape) for name, x in _by_name(tree).items()}
          for tree in (expected, found))
  for name in sorted(a | b):
    if a.get(name) != b.get(name):
      raise UserError(
          f'{source} has {name} of shape {b.get(name)}, the config asks for '
          f'{a.get(name)}: use the config it was made with')


def _by_name(tree: Any) -> dict[str, Any]:
  """The leaves, {'params/hidden/bias': ..., ...}."""
  return {jax.tree_util.keystr(path, simple=True, separator='/'): x
          for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def check_stored(source: str, expected: Any, stored: Any) -> None:
  """Compares shapes with orbax' metadata of a tree, before that is read.

  Raises UserError if `source` has other arrays or shapes, ValueError if they
  are of another type, or in parts that are larger than they are.
  """
  wanted, found = _by_name(expected), _by_name(stored)
  if set(wanted) != set(found):
    raise UserError(f'{source} holds other arrays than this version saves: use '
                    'the version that made it, or another --workdir')
  check_shapes(source, expected, stored)
  for name, x in found.items():
    if x.dtype != wanted[name].dtype or any(
        part > max(size, 1) for part, size in zip(
            x.storage.chunk_shape, x.shape, strict=True)):
      raise ValueError(
          f'{name} is {x.dtype} in parts of {x.storage.chunk_shape}')


def check_files(folder: os.PathLike[str]) -> None:
  """Raises ValueError unless a checkpoint's descriptions are small files."""
  total = sum(size for path, size in files.sizes(folder)
              if path.parent.name != 'd')  # where the arrays are
  if total > _MOST_BYTES:
    raise ValueError(f'its descriptions take {total:,} bytes, more than '
                     f'{_MOST_BYTES:,}')


def check_score(path: pathlib.Path, step: int) -> None:
  """Raises ValueError if orbax would rank a step by anything but its score."""
  try:
    found = json.loads(files.read_bytes(path, _MOST_BYTES))
    if (set(found), found['step']) != ({'score', 'step'}, step) or not (
        float('-inf') < found['score'] < float('inf')):
      raise ValueError(f'{path} holds no score')
  except (UserError, KeyError, TypeError, RecursionError) as e:
    raise ValueError(f'{path} holds no score') from e
