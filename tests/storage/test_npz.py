"""Arrays that are mapped: the same as read, aligned, and compared first."""

import os
import pathlib

import numpy as np
import pytest

from flax_imdb.storage import npz

ARRAYS = {
    'ids': np.arange(100_003, dtype=np.uint16),
    'offsets': np.arange(7, dtype=np.int64) ** 3,
    'none': np.zeros(0, np.float32)}


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
  npz.write_parts(tmp_path / 'arrays.npz', {
      name: (x.shape, x.dtype, np.array_split(x, 3))
      for name, x in ARRAYS.items()})
  return tmp_path / 'arrays.npz'


def test_what_is_written_in_parts_is_read_and_mapped(path):
  with np.load(path) as loaded:
    for found in (npz.read_arrays(path, 1 << 20), npz.map_arrays(path), loaded):
      assert list(found) == list(ARRAYS)
      for name, want in ARRAYS.items():
        assert found[name].dtype == want.dtype
        np.testing.assert_array_equal(found[name], want)
  for mapped in npz.map_arrays(path).values():
    assert mapped.flags.aligned
    assert not mapped.size or not mapped.flags.writeable


def test_what_numpy_wrote_is_mapped(tmp_path):
  np.savez(tmp_path / 'a.npz', **ARRAYS, square=np.eye(3))
  found = npz.map_arrays(tmp_path / 'a.npz')
  np.testing.assert_array_equal(found['square'], np.eye(3))
  np.testing.assert_array_equal(found['ids'], ARRAYS['ids'])
  noise = np.random.default_rng(0).integers(0, 255, 99, np.uint8)
  np.savez_compressed(tmp_path / 'b.npz', noise=noise)
  with pytest.raises(ValueError, match='is packed'):
    npz.map_arrays(tmp_path / 'b.npz')


@pytest.mark.skipif(not os.path.exists('/proc/self/smaps'),
                    reason='needs /proc, as on Linux')
def test_a_mapped_array_can_be_released_and_read_again(path):
  def resident():
    maps = pathlib.Path('/proc/self/smaps').read_text().split(str(path))[1:]
    return sum(int(part.split('Rss:')[1].split()[0]) for part in maps)
  ids = npz.map_arrays(path)['ids'][:-1].reshape(2, -1)  # a view
  assert ids.max() == ARRAYS['ids'][:-1].max()
  assert resident() >= 100
  npz.release(ids)
  assert resident() == 0
  np.testing.assert_array_equal(ids.ravel(), ARRAYS['ids'][:-1])
  npz.release(np.zeros(3))  # of no file


@pytest.mark.parametrize('place', range(200, 200_000, 9_973))
def test_a_bit_that_changed_is_found(path, place):
  content = bytearray(path.read_bytes())
  content[place] ^= 4
  path.write_bytes(content)
  with pytest.raises(npz.ERRORS):
    npz.map_arrays(path)


def test_what_claims_more_than_there_is_is_not_mapped(path):
  content = path.read_bytes()
  for damaged in content[:-30], content.replace(b'(7,)', b'(9,)'), b'':
    path.write_bytes(damaged)
    with pytest.raises(npz.ERRORS):
      npz.map_arrays(path)
