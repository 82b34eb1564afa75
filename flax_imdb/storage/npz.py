"""NumPy's .npz files, which may be a stranger's: sizes first, then arrays.

NumPy makes an array as large as its header says. Nothing is ever unpickled.
"""

from collections.abc import Callable, Iterable, Mapping
import io
import math
import mmap
import os
import pathlib
import struct
import tokenize
from typing import IO, Any
import zipfile
import zlib

import numpy as np

from flax_imdb.storage import cache, files

# What a damaged or hostile file makes `read_arrays` raise.
ERRORS = (ValueError, OSError, EOFError, KeyError, RuntimeError, SyntaxError,
          MemoryError, struct.error, tokenize.TokenError, zipfile.BadZipFile,
          zlib.error)
_MOST_ARRAYS = 64  # Keras' weights are 8, the ids of a split 4
_PART_BYTES = 1 << 20
_MAGIC = np.lib.format.magic(1, 0)
# Of a member in the file itself, of which the last two are the lengths of its
# name and of what else comes before the content; PKZIP's APPNOTE, 4.3.7.
_LOCAL = struct.Struct('<4s5H3L2H')


def read_arrays(source: str | os.PathLike[str] | IO[bytes],
                most: int) -> dict[str, np.ndarray]:
  """Reads the arrays of numbers that np.savez or np.savez_compressed wrote.

  `source` is its path or an open file. By name, in the file's order. Raises one
  of `ERRORS` if the file is damaged or holds anything else, or more than `most`
  bytes, which are not allocated.
  """
  arrays = {}
  with zipfile.ZipFile(source) as archive:
    for member in _members(archive, most):
      _header(archive, member)
      # Zip keeps a checksum of each array; a damaged one raises here.
      with archive.open(member) as f:
        arrays[member.filename.removesuffix('.npy')] = (
            np.lib.format.read_array(f, allow_pickle=False))
  return arrays


def map_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """As `read_arrays`, of a file on disk, whose arrays are mapped, not read.

  They are to be read only, and take no memory but what the system keeps of the
  file. The checksums are compared all the same: a gigabyte takes a second.
  """
  size, arrays = os.stat(path).st_size, {}
  with open(path, 'rb') as f, zipfile.ZipFile(f) as archive:
    for member in _members(archive, size):
      shape, dtype, start = _header(archive, member)
      if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f'{member.filename} is packed')
      with archive.open(member) as content:
        while content.read(_PART_BYTES):
          pass
      f.seek(member.header_offset)
      start += member.header_offset + _LOCAL.size + sum(
          _LOCAL.unpack(f.read(_LOCAL.size))[-2:])
      count = math.prod(shape)
      arrays[member.filename.removesuffix('.npy')] = np.frombuffer(
          mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if count else b'',
          dtype, count, start if count else 0).reshape(shape)
  return arrays


def cached(path: pathlib.Path, checked: Callable[[dict[str, np.ndarray]], Any],
           announce: Callable[[str], None]) -> Any:
  """What `checked` makes of the arrays in a file; None if they must be made.

  That is where there is no file, or one that is damaged, which `announce` is
  told: `checked` raises one of `ERRORS` for what is not as it was written.
  """
  if not files.exists(path, cache.FIX):
    return None
  try:
    return checked(map_arrays(path))
  except ERRORS as e:
    announce(f'{path} is damaged ({e}); making it again')
    return None


def release(array: np.ndarray) -> None:
  """Gives back the memory of an array of `map_arrays`, which stays as it is.

  What was read of it counts as the process' own memory until then, or until
  the system needs it. Of any other array, and where a system can't, nothing.
  """
  base: Any = array
  while isinstance(base, np.ndarray | memoryview):
    base = base.base if isinstance(base, np.ndarray) else base.obj
  if isinstance(base, mmap.mmap) and hasattr(mmap, 'MADV_DONTNEED'):
    base.madvise(mmap.MADV_DONTNEED)


def _members(archive: zipfile.ZipFile, most: int) -> list[zipfile.ZipInfo]:
  members = archive.infolist()
  if len(members) > _MOST_ARRAYS:
    raise ValueError(f'{len(members):,} arrays, more than {_MOST_ARRAYS}')
  if sum(member.file_size for member in members) > most:
    raise ValueError(f'its arrays take more than {most:,} bytes')
  return members


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[
    tuple[int, ...], np.dtype, int]:
  """Shape and dtype of an array of numbers, and where in it they begin."""
  with archive.open(member) as f:
    if np.lib.format.read_magic(f) != (1, 0):
      raise ValueError(f'{member.filename} is no plain array')
    shape, _, dtype = np.lib.format.read_array_header_1_0(f)
    if dtype.kind not in 'fiu':
      raise ValueError(f'{member.filename} holds {dtype}, not numbers')
    if f.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
      raise ValueError(f'{member.filename} is not as large as it says')
    return shape, dtype, f.tell()


def write_arrays(path: str | os.PathLike[str], *arrays: np.ndarray,
                 **named: Any) -> None:
  """Writes what `read_arrays` reads, as np.savez; errors as `files.write`."""
  content = io.BytesIO()
  np.savez(content, *arrays, **named)
  files.write(path, content.getvalue())


def write_parts(path: pathlib.Path, arrays: Mapping[
    str, tuple[tuple[int, ...], np.dtype, Iterable[np.ndarray]]]) -> None:
  """Writes what `map_arrays` maps, of arrays that may be larger than memory.

  By name: the shape of an array, its dtype, and its parts, which are its rows
  in their order. Errors as of `files.replacing`.
  """
  with (files.replacing(path) as file,
        zipfile.ZipFile(file, 'w') as archive):
    for name, (shape, dtype, parts) in arrays.items():
      with archive.open(f'{name}.npy', 'w', force_zip64=True) as f:
        # Numbers begin at a multiple of their size: a mapped array is aligned.
        about = repr({'descr': np.lib.format.dtype_to_descr(dtype),
                      'fortran_order': False, 'shape': shape}).encode()
        padding = -(file.tell() + len(_MAGIC) + 2 + len(about) + 1) % 64
        f.write(_MAGIC + struct.pack('<H', len(about) + padding + 1) + about
                + b' ' * padding + b'\n')
        for part in parts:
          f.write(np.ascontiguousarray(part, dtype).data)
