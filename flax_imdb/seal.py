"""Whether arrays are those expected: checksums and shapes."""

import json
from typing import Any
import zlib

import jax
import numpy as np

from flax_imdb.errors import UserError


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
  """Compares two trees of arrays by name; with a template orbax does not.

  Raises:
    UserError: they differ; says where `source` does.
  """
  a, b = (
      {jax.tree_util.keystr(path, simple=True, separator='/'): list(x.shape)
       for path, x in jax.tree_util.tree_leaves_with_path(tree)}
      for tree in (expected, found))
  for name in sorted(a | b):
    if a.get(name) != b.get(name):
      raise UserError(
          f'{source} has {name} of shape {b.get(name)}, the config asks for '
          f'{a.get(name)}: use the config it was made with')
