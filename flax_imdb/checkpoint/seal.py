"""Whether a checkpoint, perhaps a stranger's, is what it should be.

Only what is proven is `Damage`: that the disk failed, or the program, says
nothing of the checkpoint.
"""

from collections.abc import Callable
import errno
import json
import os
import pathlib
import re
from typing import Any
import zlib

import jax
import numpy as np
from orbax.checkpoint.metadata import ArrayMetadata

from flax_imdb.errors import UserError
from flax_imdb.storage import files

# Of all files of a step but its arrays; 100 layers have 600,000, ours 10,000.
_MOST_BYTES = 1 << 22
# A file that is missing or another kind of thing, whoever looks and when.
_OF_FILES = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
# How a ValueError of TensorStore's begins. What it finds wrong in files has one
# of these words, or is an error of the system; the others are failures.
_STATUS = re.compile('[A-Z_]+(?=: )')
_OF_CONTENT = {'DATA_LOSS', 'OUT_OF_RANGE', 'NOT_FOUND', 'INVALID_ARGUMENT',
               'FAILED_PRECONDITION'}


class Damage(ValueError):
  """A checkpoint is not what was saved: a file is missing, cut or changed."""


def read(call: Callable[[], Any]) -> Any:
  """Calls what reads, of orbax or json; Damage if a file is to blame.

  All else is raised as it is, above all what the disk or the memory refused.
  """
  try:
    return call()
  except Exception as e:
    number, status = files.os_error(e), _STATUS.match(str(e))
    if number is not None:
      damaged = number in _OF_FILES
    elif isinstance(e, ValueError):  # JSON's are, too
      damaged = not status or status[0] in _OF_CONTENT
    else:  # orbax and json, which take files at their word
      damaged = isinstance(
          e, (LookupError, TypeError, AttributeError, RecursionError))
    if not damaged:
      raise
    raise Damage(str(e).strip().split('\n')[0][:200]) from e


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

  Raises UserError if `source` has other arrays or shapes, Damage if they are no
  arrays, of another type, or in parts that are larger than they are.
  """
  wanted, found = _by_name(expected), _by_name(stored)
  for name, x in found.items():
    if not isinstance(x, ArrayMetadata) or x.storage is None:
      raise Damage(f'{name} is no array')
  if set(wanted) != set(found):
    raise UserError(f'{source} holds other arrays than this version saves: use '
                    'the version that made it, or another --workdir')
  check_shapes(source, expected, stored)
  for name, x in found.items():
    if x.dtype != wanted[name].dtype or any(
        part > max(size, 1) for part, size in zip(
            x.storage.chunk_shape, x.shape, strict=True)):
      raise Damage(f'{name} is {x.dtype} in parts of {x.storage.chunk_shape}')


def check_files(folder: os.PathLike[str]) -> None:
  """Raises Damage unless a checkpoint's descriptions are small files."""
  total = read(lambda: sum(size for path, size in files.sizes(folder)
                           if path.parent.name != 'd'))  # where the arrays are
  if total > _MOST_BYTES:
    raise Damage(f'its descriptions take {total:,} bytes, more than '
                 f'{_MOST_BYTES:,}')


def check_score(path: pathlib.Path, step: int) -> None:
  """Raises Damage if orbax would rank a step by anything but its score."""
  found = read(lambda: json.loads(files.read_bounded(path, _MOST_BYTES)))
  if not isinstance(found, dict) or set(found) != {'score', 'step'}:
    raise Damage(f'{path} holds no score')
  score = found['score']
  if (found['step'] != step or type(score) not in (int, float)
      or not float('-inf') < score < float('inf')):
    raise Damage(f'{path} holds no score')
