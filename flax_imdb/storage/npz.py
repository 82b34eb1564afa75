"""NumPy's .npz files, which may be a stranger's: sizes first, then arrays.

NumPy makes an array as large as its header says. Nothing is ever unpickled.
"""

import io
import math
import os
import struct
import tokenize
from typing import IO, Any
import zipfile
import zlib

import numpy as np

from flax_imdb.storage import files

# What a damaged or hostile file makes `read_arrays` raise.
ERRORS = (ValueError, OSError, EOFError, KeyError, RuntimeError, SyntaxError,
          MemoryError, struct.error, tokenize.TokenError, zipfile.BadZipFile,
          zlib.error)
_MOST_ARRAYS = 64  # Keras' weights are 8, the ids of a split 3


def read_arrays(source: str | os.PathLike[str] | IO[bytes],
                most: int) -> dict[str, np.ndarray]:
  """Reads the arrays of numbers that np.savez or np.savez_compressed wrote.

  `source` is its path or an open file. By name, in the file's order. Raises one
  of `ERRORS` if the file is damaged or holds anything else, or more than `most`
  bytes, which are not allocated.
  """
  arrays = {}
  with zipfile.ZipFile(source) as archive:
    members = archive.infolist()
    if len(members) > _MOST_ARRAYS:
      raise ValueError(f'{len(members):,} arrays, more than {_MOST_ARRAYS}')
    if sum(member.file_size for member in members) > most:
      raise ValueError(f'its arrays take more than {most:,} bytes')
    for member in members:
      with archive.open(member) as f:
        if np.lib.format.read_magic(f) != (1, 0):
          raise ValueError(f'{member.filename} is no plain array')
        shape, _, dtype = np.lib.format.read_array_header_1_0(f)
        if dtype.kind not in 'fiu':
          raise ValueError(f'{member.filename} holds {dtype}, not numbers')
        if f.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
          raise ValueError(f'{member.filename} is not as large as it says')
      # Zip keeps a checksum of each array; a damaged one raises here.
      with archive.open(member) as f:
        arrays[member.filename.removesuffix('.npy')] = (
            np.lib.format.read_array(f, allow_pickle=False))
  return arrays


def write_arrays(path: str | os.PathLike[str], *arrays: np.ndarray,
                 **named: Any) -> None:
  """Writes what `read_arrays` reads, as np.savez; errors as `files.write`."""
  content = io.BytesIO()
  np.savez(content, *arrays, **named)
  files.write(path, content.getvalue())
