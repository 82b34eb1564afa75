"""What can befall the files of a checkpoint."""

import shutil


def truncate(file):
  """Cuts a file in half."""
  file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def flip(file):
  """Changes one bit of a file."""
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def data(folder):
  """All files with arrays of an item; of some only a copy is ever read."""
  return sorted(folder.rglob('d/*'))


# Of an item the array data, the index of it, and its description.
_FILES = {
    'model data': lambda step: data(step / 'model'),
    'training data': lambda step: data(step / 'training'),
    'model manifest': lambda step: [step / 'model/manifest.ocdbt'],
    'training description': lambda step: [step / 'training/_METADATA'],
    'progress': lambda step: [step / 'progress/metadata'],
    'score': lambda step: [step / 'metrics/metrics'],
}
_DELETED = [
    '_CHECKPOINT_METADATA', 'model', 'model/_METADATA', 'training', 'progress',
    'metrics']


def _delete(path):
  shutil.rmtree(path) if path.is_dir() else path.unlink()


def _every_other_file(step):
  for file in sorted(f for f in step.rglob('*') if f.is_file())[::2]:
    file.unlink()


def _all_files(step):
  shutil.rmtree(step)
  step.mkdir()


# What can befall the directory of a step.
DAMAGES = {
    **{f'{name} {what}': lambda step, how=how, find=find: [
        how(file) for file in find(step)]
       for what, how in (('truncated', truncate), ('flipped', flip))
       for name, find in _FILES.items()},
    'score emptied': lambda step: _FILES['score'](step)[0].write_bytes(b''),
    **{f'without {name}': lambda step, name=name: _delete(step / name)
       for name in _DELETED},
    'without every other file': _every_other_file,
    'without all files': _all_files,
}
# orbax does without this; what it reads is whole.
HARMLESS = {'without _CHECKPOINT_METADATA'}
