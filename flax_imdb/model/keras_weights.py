"""Keras' weights to parameters and back; nothing is ever unpickled.

For the notebook's architecture: Embedding, one LSTM or SimpleRNN, Dense, Dense,
the last of which has an output of two classes, and one each of more.
Both store the same arrays, gates in the order i f g o, under other names.
"""

from collections.abc import Sequence
import io
import os
import pathlib
import re
from typing import Any
import zipfile

from flax.traverse_util import flatten_dict, unflatten_dict
import numpy as np

from flax_imdb.errors import UserError
from flax_imdb.model.classifier import MOST_PARAMETERS
from flax_imdb.storage import npz

# In the order of Keras' model.get_weights(): our path, Keras' place in a file,
# the shape as letters: V ids, E features, H units, G gates' width, D hidden, O
# outputs.
_CELL = 'forward_0/steps/cell'
_ARRAYS = (
    ('embed/embedding', 'layers/embedding/vars/0', 'VE'),
    (f'{_CELL}/kernel', 'layers/{cell}/cell/vars/0', 'EG'),
    (f'{_CELL}/recurrent_kernel', 'layers/{cell}/cell/vars/1', 'HG'),
    (f'{_CELL}/bias', 'layers/{cell}/cell/vars/2', 'G'),
    ('hidden/kernel', 'layers/dense/vars/0', 'HD'),
    ('hidden/bias', 'layers/dense/vars/1', 'D'),
    ('logit/kernel', 'layers/dense_1/vars/0', 'DO'),
    ('logit/bias', 'layers/dense_1/vars/1', 'O'))
# The largest model in float64: a stranger's file must not fill the memory.
_MOST_BYTES = 8 * MOST_PARAMETERS


def from_keras(weights: Sequence[np.ndarray]) -> dict[str, Any]:
  """Turns model.get_weights() into parameters, float32.

  `weights` have the shapes in `_ARRAYS`, where G is 4H for an LSTM and H for a
  SimpleRNN. Raises UserError, which names what does not fit.
  """
  if len(weights) != len(_ARRAYS):
    raise UserError(
        f'Keras weights: {len(weights)} arrays instead of {len(_ARRAYS)} '
        '(Embedding, one LSTM or SimpleRNN, Dense, Dense)')
  sizes: dict[str, int] = {}
  for weight, (name, _, letters) in zip(weights, _ARRAYS, strict=True):
    shape = np.shape(weight)
    expected = [sizes.get(letter, '?') for letter in letters]
    if len(shape) != len(letters) or any(
        sizes.setdefault(letter, size) != size
        for letter, size in zip(letters, shape, strict=True)):
      raise UserError(f'Keras weights: {name} has shape {list(shape)} instead '
                      f'of {expected}'.replace("'", ''))
    if np.asarray(weight).dtype.kind != 'f':
      raise UserError(f'Keras weights: {name} holds no floating-point numbers')
  if sizes['G'] not in (sizes['H'], 4 * sizes['H']):
    raise UserError(
        f'Keras weights: {_ARRAYS[2][0]} has shape {[sizes["H"], sizes["G"]]}, '
        'neither an LSTM (4 times as wide) nor a SimpleRNN (as wide)')
  return unflatten_dict(
      {tuple(name.split('/')): np.asarray(weight, np.float32)
       for weight, (name, _, _) in zip(weights, _ARRAYS, strict=True)})


def to_keras(params: dict[str, Any]) -> list[np.ndarray]:
  """Turns parameters into what model.set_weights() takes; float32 arrays.

  Raises UserError, which names an array, if this is not the notebook's model.
  """
  flat = flatten_dict(params, sep='/')
  names = [name for name, _, _ in _ARRAYS]
  if other := sorted(set(flat) ^ set(names)):
    raise UserError(f'Keras has no place for this model: {other[0]} is ' + (
        'not in the notebook' if other[0] in flat else 'missing'))
  weights = [np.asarray(flat[name], np.float32) for name in names]
  from_keras(weights)  # pooled features may not be the H that Keras' Dense has
  return weights


def read_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads parameters from a Keras file.

  It is the .npz of np.savez(path, *model.get_weights()), .keras of model.save
  or .weights.h5 of model.save_weights; the latter two need h5py. Raises
  UserError if it is missing, damaged, of another kind or architecture.
  """
  path = pathlib.Path(path)
  try:
    if path.suffix == '.npz':
      weights = _read_npz(path)
    elif path.suffix == '.keras':
      with zipfile.ZipFile(path) as archive:
        _check_size(archive.getinfo('model.weights.h5').file_size)
        weights = _read_h5(io.BytesIO(archive.read('model.weights.h5')))
    elif path.name.endswith('.h5'):
      weights = _read_h5(path)
    else:
      raise UserError(f'{path} is no Keras weights: give .npz, .keras or '
                      '.weights.h5, or a run directory')
  except npz.ERRORS as e:
    raise UserError(f'{path} cannot be read as Keras weights ({e}): save it '
                    'again with np.savez(path, *model.get_weights())') from e
  return from_keras(weights)


def write_weights(path: str | os.PathLike[str], params: dict[str, Any]) -> None:
  """Writes model.get_weights() as .npz; errors as `to_keras`, `files.write`."""
  npz.write_arrays(path, *to_keras(params))


def _read_npz(path: pathlib.Path) -> list[np.ndarray]:
  arrays = npz.read_arrays(path, _MOST_BYTES)
  # arr_0, arr_1, ... whatever the order in the file
  return [arrays[name] for name in sorted(arrays, key=lambda name: [
      int(part) if part.isdecimal() else part
      for part in re.split(r'(\d+)', name)])]


def _read_h5(file: io.BytesIO | pathlib.Path) -> list[np.ndarray]:
  try:
    import h5py
  except ImportError as e:
    raise UserError("reading Keras' own files needs h5py: pip install h5py, or "
                    'save them as .npz') from e

  with h5py.File(file, 'r') as h5:
    root = _inside(h5, 'layers', h5py.Group)
    layers = sorted(root)
    cell = 'simple_rnn' if 'simple_rnn' in layers else 'lstm'
    places = [place.format(cell=cell) for _, place, _ in _ARRAYS]
    expected = sorted({place.split('/')[1] for place in places})
    if [name for name in layers if _holds_weights(
        _inside(root, name, h5py.Group))] != expected:
      raise UserError(f'the Keras model has the layers {", ".join(layers)}, '
                      f'not {", ".join(expected)}')
    found = [_inside(h5, place, h5py.Dataset) for place in places]
    _check_size(sum(dataset.nbytes for dataset in found))
    return [dataset[()] for dataset in found]


def _holds_weights(layer: Any) -> bool:
  """True for layers with variables; Dropout and the like may stand between."""
  return any(len(_inside(layer, name, type(layer))) for name in layer)


def _inside(group: Any, path: str, kind: Any) -> Any:
  """Walks down to a Group or Dataset that is in this very file."""
  import h5py

  found = group
  for name in path.split('/'):
    if not isinstance(found, h5py.Group) or name not in found:
      raise ValueError(f'there is no {path}')
    if not isinstance(found.get(name, getlink=True), h5py.HardLink):
      raise ValueError(f'{path} is a link to another place')
    found = found[name]
  if not isinstance(found, kind):
    raise ValueError(f'{path} is no {kind.__name__.lower()}')
  if kind is h5py.Dataset:
    # Neither chunks, which may be packed and of any size, nor other files.
    stored = found.id.get_create_plist()
    if (stored.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT)
        or stored.get_external_count()):
      raise ValueError(f'{path} is in parts, or in another file')
    if found.shape is None or found.dtype.kind != 'f':
      raise ValueError(f'{path} holds no floating-point numbers')
  return found


def _check_size(count: int) -> None:
  if count > _MOST_BYTES:
    raise ValueError(f'{count:,} bytes are more than {_MOST_BYTES:,}')
