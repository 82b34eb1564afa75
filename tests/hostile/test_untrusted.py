"""A stranger's file executes nothing, and no claim of its is allocated.

What is read: config.json, tokenizer.json, calibration.json, checkpoints, jsonl,
the weights of config.init_from and the ids cache. A hostile one is refused in
one line that names it, or set aside where there is another to take.
"""

import ast
import contextlib
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc
import types
import zipfile

import h5py
import numpy as np
import pytest
from support.command import ROOT, TINY, needs_proc
import tensorstore

from flax_imdb import main
from flax_imdb.checkpoint import records, run, seal
from flax_imdb.config import load_config, packaged, read_config
from flax_imdb.data import sources
from flax_imdb.data.reviews import load_splits
from flax_imdb.data.tokenizer import (
  fit_tokenizer,
  load_tokenizer,
  save_tokenizer,
)
from flax_imdb.errors import UserError
from flax_imdb.inference import model_card
from flax_imdb.model import keras_weights
from flax_imdb.storage import npz
from flax_imdb.train import loggers
from flax_imdb.train.writers import Writers

SOURCES = sorted((ROOT / 'flax_imdb').rglob('*.py'))
# Modules whose files are programs, or that start one.
EXECUTE = {'pickle', 'cPickle', 'cloudpickle', 'dill', 'joblib', 'shelve',
           'marshal', 'yaml', 'torch', 'subprocess', 'runpy', 'code'}
CALLS = {'eval', 'exec', 'compile', '__import__', 'system', 'popen', 'execv'}
MODEL = 'checkpoints/14/model'


class Bomb:
  """Leaves a file behind if it is ever unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (pathlib.Path.touch, (self.path,))


@contextlib.contextmanager
def within(mebibytes):
  """Asserts that Python and NumPy allocate no more in the context."""
  tracemalloc.start()
  try:
    yield
    assert tracemalloc.get_traced_memory()[1] < mebibytes << 20
  finally:
    tracemalloc.stop()


def refused(read, *args, names=''):
  """Asserts that read(*args) is refused in one line that has `names`."""
  with pytest.raises(UserError) as error:
    read(*args)
  message = str(error.value)
  assert '\n' not in message and len(message) < 500
  assert str(names) in message
  return message


# The program's own code.


@pytest.mark.parametrize('file', SOURCES, ids=lambda file: file.stem)
def test_no_module_can_execute_a_file(file):
  # Sweeps start the program itself, and count GPUs by nvidia-smi.
  starts = {'subprocess'} if file.stem in ('children', 'environment') else set()
  for node in ast.walk(ast.parse(file.read_text('utf-8'))):
    if isinstance(node, ast.Import | ast.ImportFrom):
      names = {getattr(node, 'module', '') or ''} | {
          alias.name for alias in node.names}
      assert not {name.split('.')[0] for name in names} & (
          EXECUTE - starts), node.lineno
    if isinstance(node, ast.Call):
      name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
      assert name not in CALLS - {'compile'} or name == 'exec_module'
      # re.compile and the compile of jax's lowered programs are methods.
      assert not (name == 'compile' and isinstance(node.func, ast.Name))
      pickles = [k for k in node.keywords if k.arg == 'allow_pickle']
      assert all(k.value.value is False for k in pickles), node.lineno
      if ast.unparse(node.func).endswith(('np.load', 'numpy.load')):
        assert pickles, f'np.load in line {node.lineno}: use npz.read_arrays'


def test_only_config_files_of_the_user_are_run():
  runs = [file.stem for file in SOURCES if 'exec_module' in file.read_text()]
  assert runs == ['config']


def test_eval_of_a_run_directory_unpickles_and_starts_nothing(trained):
  program = '''
import sys
seen = []
def hook(event, args):
  if event in ('pickle.find_class', 'subprocess.Popen', 'os.system', 'os.exec',
               'os.posix_spawn'):
    seen.append((event, repr(args)[:200]))
sys.addaudithook(hook)
from flax_imdb import main
assert main.main(sys.argv[1:]) == 0
sys.exit(f'seen: {seen}' if seen else 0)
'''
  process = subprocess.run(
      [sys.executable, '-c', program, '--mode=eval', f'--workdir={trained[0]}'],
      cwd=ROOT, capture_output=True, check=False, timeout=300)
  assert process.returncode == 0, process.stderr.decode()
  assert b'test: loss' in process.stdout


# .npz files: the weights of config.init_from, and the ids cache.


def npy(shape, data=b'', descr='<f4', version=(1, 0)):
  """A .npy member that claims a shape and holds `data`."""
  f = io.BytesIO()
  write = getattr(np.lib.format, 'write_array_header_{}_{}'.format(*version))
  write(f, {'descr': descr, 'fortran_order': False, 'shape': shape})
  return f.getvalue() + data


def zipped(**members):
  f = io.BytesIO()
  with zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED) as archive:
    for name, data in members.items():
      archive.writestr(name, data)
  return f.getvalue()


def objects(path):
  f = io.BytesIO()
  np.savez(f, np.array([Bomb(path)], object))
  return f.getvalue()


def nested():
  """A header that is deeper than Python's parser goes."""
  header = b'(' * 9000
  return b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little') + header


NPZ = {
    'claims 4 TB': zipped(a=npy((1 << 40,), bytes(400))),
    'claims 8 GB': zipped(a=npy((1 << 31,), bytes(400))),
    'claims less': zipped(a=npy((2,), bytes(400))),
    'claims a negative size': zipped(a=npy((-1, -100), bytes(400))),
    'a wide type': zipped(a=npy((1,), bytes(400), '<U1000000000')),
    'texts': zipped(a=npy((100,), bytes(400), '<U1')),
    'records': zipped(a=npy((100,), bytes(400), [('x', '<f4')])),
    'dates': zipped(a=npy((50,), bytes(400), '<M8[s]')),
    'version 2': zipped(a=npy((100,), bytes(400), version=(2, 0))),
    'a header too deep': zipped(a=nested()),
    'no array': zipped(a=b'import os'),
    'many arrays': zipped(**{f'a{i}': npy((0,)) for i in range(1000)}),
}


@pytest.mark.parametrize('name', NPZ)
def test_a_hostile_npz_is_refused_before_it_is_allocated(name, tmp_path):
  path = tmp_path / 'w.npz'
  path.write_bytes(NPZ[name])
  with within(16):
    with pytest.raises(npz.ERRORS):
      npz.read_arrays(path, 1 << 31)
    refused(keras_weights.read_weights, path, names=path)


def test_a_packed_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
  monkeypatch.setattr(keras_weights, '_MOST_BYTES', 1 << 26)
  zeros = bytes(1 << 27)  # of which a file of 128 kB is made
  (tmp_path / 'w.npz').write_bytes(zipped(a=npy((1 << 25,), zeros)))
  (tmp_path / 'w.keras').write_bytes(zipped(**{'model.weights.h5': zeros}))
  with within(16):
    for name in ('w.npz', 'w.keras'):
      assert (tmp_path / name).stat().st_size < 1 << 18
      refused(keras_weights.read_weights, tmp_path / name, names='bytes')


def test_objects_are_never_unpickled(tmp_path):
  (tmp_path / 'w.npz').write_bytes(objects(tmp_path / 'boom'))
  refused(keras_weights.read_weights, tmp_path / 'w.npz', names='not numbers')
  (tmp_path / 'w.npz').write_bytes(pickle.dumps(Bomb(tmp_path / 'boom')))
  refused(keras_weights.read_weights, tmp_path / 'w.npz', names='w.npz')
  assert not (tmp_path / 'boom').exists()


def reviews(**changed):
  """The bytes of cached ids: two reviews of 2 and 3 tokens, but for changes."""
  f = io.BytesIO()
  np.savez(f, **{
      'ids': np.array([1, 4, 1, 5, 2], np.uint16),
      'offsets': np.array([0, 2, 5]), 'labels': np.array([0, 1], np.int16),
      'validation': np.array([0]), **changed})
  return f.getvalue()


CACHE = {
    'an id that is no word': reviews(ids=np.array([1, 4, 1, 5, 7], np.uint16)),
    'signed ids': reviews(ids=np.array([1, 4, 1, 5, -2], np.int16)),
    'fractions': reviews(ids=np.array([1, 4, 1, 5, 2], np.float32)),
    'a table of ids': reviews(ids=np.ones((5, 1), np.uint16)),
    'offsets that go back': reviews(offsets=np.array([0, 6, 5])),
    'offsets beyond the end': reviews(offsets=np.array([0, 2, 9])),
    'offsets before the start': reviews(offsets=np.array([-1, 2, 5])),
    'an empty review': reviews(offsets=np.array([0, 0, 5])),
    'fractional offsets': reviews(offsets=np.array([0, 2, 5.0])),
    'a label too many': reviews(labels=np.array([0, 1, 1], np.int16)),
    'another label': reviews(labels=np.array([0, 2], np.int16)),
    'wide labels': reviews(labels=np.array([0, 1])),
    'more that validate than there are': reviews(validation=np.array([3])),
    'two numbers of those that validate': reviews(validation=np.array([0, 0])),
    'no number': reviews(validation=np.array([np.nan])),
    'no labels': zipped(**{
        'ids.npy': npy((0,), descr='<u2'), 'offsets.npy': npy((0,))}),
    'a packed file': zipped(**{
        'ids.npy': npy((4000,), b'\1\0' * 4000, '<u2'),
        'offsets.npy': npy((2,), np.array([0, 4000]).tobytes(), '<i8'),
        'labels.npy': npy((1,), b'\0\0', '<i2'),
        'validation.npy': npy((1,), b'\0' * 8, '<i8')}),
}


@pytest.mark.parametrize('name', [None, *CACHE])
def test_hostile_cached_ids_are_announced_and_made_again(
    name, tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setattr(sources, 'prepare', lambda *args: 'fingerprint')
  monkeypatch.setattr(sources, 'count_texts', lambda *args: 2)
  monkeypatch.setattr(sources, 'read_texts', lambda *args: (
      ['good', 'bad film'], np.array([0, 1], np.int16)))
  config = load_config('configs/debug.py')
  tokenizer = fit_tokenizer(['good bad film'], 100)
  said = []
  first = load_splits(config, tokenizer, said.append, ['test'])['test']
  path, = (tmp_path / 'flax_imdb' / 'ids').glob('*.npz')
  path.unlink()  # what is mapped of it stays
  path.write_bytes(CACHE[name] if name else reviews())
  again = load_splits(config, tokenizer, said.append, ['test'])['test']
  if name:
    assert len(said) == 3 and f'{path} is damaged' in said[1]
    np.testing.assert_array_equal(again.ids, first.ids)
  else:  # what is as it should be is taken
    assert len(said) == 1 and again.ids.tolist() == [1, 4, 1, 5, 2]


# HDF5 files: Keras' own.

PLACES = ('embedding/vars/0', 'lstm/cell/vars/0', 'lstm/cell/vars/1',
          'lstm/cell/vars/2', 'dense/vars/0', 'dense/vars/1', 'dense_1/vars/0',
          'dense_1/vars/1')
SHAPES = ((40, 4), (4, 20), (5, 20), (20,), (5, 3), (3,), (3, 1), (1,))
FIRST = 'layers/embedding/vars/0'


def _virtual(h5, folder):
  layout = h5py.VirtualLayout((40, 4), 'f4')
  layout[:] = h5py.VirtualSource(folder / 'other.h5', 'x', (40, 4))
  h5.create_virtual_dataset(FIRST, layout)


def _empty_huge(h5, folder):
  space = h5py.h5s.create_simple((1 << 40, 4))
  h5py.h5d.create(h5['layers/embedding/vars'].id, b'0',
                  h5py.h5t.IEEE_F32LE, space)


def _put(value):
  def put(h5, folder):
    h5[FIRST] = value
  return put


def _layers(value):
  def put(h5, folder):
    del h5['layers']
    h5['layers'] = value(folder) if callable(value) else value
  return put


H5 = {
    'claims 16 TB': _empty_huge,
    'one in chunks of 3 GB': lambda h5, folder: h5.create_dataset(
        FIRST, (40, 4), 'f4', chunks=(1 << 27, 4), maxshape=(None, 4),
        compression='gzip'),
    'one in another file': lambda h5, folder: h5.create_dataset(
        FIRST, (40, 4), 'f4', external=[(str(folder / 'raw'), 0, 640)]),
    'a virtual one': _virtual,
    'a link to another file': _put(h5py.ExternalLink('other.h5', 'x')),
    'a link to no place': _put(h5py.SoftLink('/nowhere')),
    'texts': _put(['a' * 1000]),
    'references': lambda h5, folder: h5.create_dataset(
        FIRST, (40, 4), h5py.ref_dtype),
    'nothing': _put(h5py.Empty('f4')),
    'a variable for all': lambda h5, folder: (
        h5['layers/embedding'].__delitem__('vars'),
        h5['layers/embedding'].create_dataset('vars', data=[1.0])),
    'a group for an array': lambda h5, folder: h5.create_group(FIRST),
    'an array for a group': lambda h5, folder: h5.create_dataset(
        'layers/lstm_1', data=[1.0]),
    'an array for all groups': _layers(np.zeros(3)),
    'all groups elsewhere': _layers(
        lambda folder: h5py.ExternalLink(str(folder / 'other.h5'), '/')),
    'a layer elsewhere': lambda h5, folder: h5['layers'].__setitem__(
        'dropout', h5py.ExternalLink(str(folder / 'other.h5'), '/')),
    'a layer in a circle': lambda h5, folder: h5['layers'].__setitem__(
        'dropout', h5py.SoftLink('/layers/dropout')),
}


@pytest.mark.parametrize('name', [None, *H5])
def test_a_hostile_h5_file_is_refused_before_it_is_allocated(name, tmp_path):
  with h5py.File(tmp_path / 'other.h5', 'w') as h5:
    h5['x'] = np.zeros((40, 4), 'f4')
  (tmp_path / 'raw').write_bytes(bytes(640))
  path = tmp_path / 'w.weights.h5'
  with h5py.File(path, 'w') as h5:
    for place, shape in zip(PLACES, SHAPES, strict=True):
      h5[f'layers/{place}'] = np.zeros(shape, 'f4')
    if name:
      del h5[FIRST]
      H5[name](h5, tmp_path)
  if not name:
    keras_weights.read_weights(path)
    return
  with within(16):
    refused(keras_weights.read_weights, path)


# config.json


def _with(**fields):
  """config.json of the default config, but for these fields."""
  config = load_config('configs/default.py')
  text = json.dumps(config.to_dict())
  for name, value in fields.items():
    text, n = re.subn(rf'"{name}": [^,{{}}]+', f'"{name}": {value}', text)
    assert n == 1, name
  return text


CONFIGS = {
    'huge width': (_with(width=10**9), 'model.width=1000000000: must be at mo'),
    'huge embedding': (_with(embedding_dim=10**9), 'embedding_dim='),
    'many layers': (_with(layers=10**6), 'layers=1000000: must be at most 100'),
    'endless': (_with(num_epochs=10**30), 'num_epochs=1000000000000000000'),
    'huge dense layer': (_with(hidden_dim=10**9), 'hidden_dim='),
    'huge vocabulary': (_with(vocab_size=10**9), 'vocab_size='),
    'huge batch': (_with(global_batch_size=10**9), 'global_batch_size='),
    'long reviews': (_with(max_length=10**9), 'max_length='),
    'many pairs': (_with(bigrams=1 << 24, embedding_dim=64), 'parameters, mo'),
    'wide buckets': (_with(bucket_width=10**9), 'bucket_width='),
    'many parameters': (
        _with(vocab_size=1 << 20, embedding_dim=512), 'asks for 639,'),
    'many parameters in layers': (
        _with(width=3000, layers=2), 'parameters, more than 268,435,456'),
    'much in a batch': (
        _with(global_batch_size=1 << 15, max_length=1 << 10), 'a batch of'),
    'a number of 5,000 digits': (_with(seed='9' * 5000), 'not a config'),
    'a number of 4,000 digits': (_with(num_epochs='9' * 4000), 'num_epochs=9'),
    'NaN': (_with(learning_rate='NaN'), 'learning_rate=nan'),
    'infinity': (_with(clip_norm='Infinity'), 'clip_norm=inf'),
    'a text for a number': (_with(width='"32"'), "width='32': give a whole"),
    'a long text for a number': (
        _with(width='"' + '3' * 9000 + '"'), "width='333333"),
    'a number for a text': (_with(optimizer='3'), 'give a text'),
    'a list': (_with(optimizer=str([1] * 9).replace(',', ' ')), 'not a config'),
    'true for 1': (_with(seed='true'), 'seed=True: give a whole number'),
    'null': (_with(init_from='null'), 'init_from=None: give a text'),
    'a field twice': (_with(debug='false, "debug": true'), 'there twice'),
    'deep lists': ('[' * 30_000 + ']' * 30_000, 'not a config'),
    'deep objects': ('{"a":' * 900 + '1' + '}' * 900, 'json'),
    'deeper objects': ('{"a":' * 10_000 + '1' + '}' * 10_000, 'not a config'),
    'a module': (_with(cell='"os"'), 'choose lstm, simple_rnn'),
    'a class': ('{"__class__": "os.system"}', 'not a config'),
    'Python': ('__import__("os").system("touch boom")', 'not a config'),
    'a tag': ('!!python/object/apply:os.system ["touch boom"]', 'not a config'),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_a_hostile_config_json_is_refused(name, tmp_path):
  text, message = CONFIGS[name]
  path = tmp_path / 'config.json'
  path.write_text(text)
  with within(16):
    assert re.search(
        message, refused(run.restore, str(tmp_path), None, names=path))


READERS = {
    'config.json': read_config,
    'tokenizer.json': lambda path: load_tokenizer(path, 100),
    'calibration.json': lambda path: records.read_temperature(path, 7),
    'labels.json': lambda path: records.read_labels(path.parent),
    'data.json': lambda path: records.read_data(path.parent),
    'metrics.jsonl': lambda path: Writers(path.parent, 7),
    'loggers.json': lambda path: loggers._read_ids(str(path.parent)),
    'summary.json': lambda path: model_card.write_export(
        str(path.parent), types.SimpleNamespace(
            config=packaged('default'), labels=sources.LABELS, step=7,
            tokenizer=fit_tokenizer(['a word'], 10))),
}


@pytest.mark.parametrize('name', READERS)
def test_files_without_end_are_not_read(name, tmp_path):
  path = tmp_path / name
  with open(path, 'wb') as f:
    f.truncate(2 << 30)  # takes no room on the disk
  with within(100):  # 60 of them for the code of tensorboardX
    refused(READERS[name], path, names=f'{path} (its 2,147,483,648 bytes')
    path.unlink()
    path.symlink_to('/dev/zero')
    refused(READERS[name], path, names=f'{path} (it is no file)')
    path.unlink()
    os.mkfifo(path)  # opening it would wait for ever
    refused(READERS[name], path, names=f'{path} (it is no file)')


# tokenizer.json


def _rules(**changed):
  def change(file):
    file.update(changed)
  return change


def _vocab(change):
  return lambda file: change(file['model']['vocab'])


SLOW = {'type': 'Replace', 'pattern': {'Regex': '(a|a?)+$'}, 'content': ' '}
TOKENIZERS = {
    'a slow pattern': _rules(normalizer=SLOW),
    'a slow pattern more': lambda file: file['normalizer'][
        'normalizers'].append(SLOW),
    'a splitting pattern': _rules(pre_tokenizer={
        'type': 'Split', 'pattern': {'Regex': '(a|a?)+$'},
        'behavior': 'Removed', 'invert': False}),
    'rules of two versions': _rules(pre_tokenizer={'type': 'WhitespaceSplit'}),
    'BPE': lambda file: file.update(model={
        'type': 'BPE', 'vocab': file['model']['vocab'], 'merges': []}),
    'no model': _rules(model=None),
    'padding to a million': _rules(padding={
        'strategy': {'Fixed': 1_000_000}, 'direction': 'Right', 'pad_id': 0,
        'pad_to_multiple_of': None, 'pad_type_id': 0, 'pad_token': '[PAD]'}),
    'truncation': _rules(truncation={
        'max_length': 1, 'stride': 0, 'strategy': 'LongestFirst',
        'direction': 'Right'}),
    'no start': _rules(post_processor=None),
    'another start': lambda file: file['post_processor']['special_tokens'][
        '[START]'].update(ids=[10**6]),
    'special ones moved': lambda file: file['added_tokens'][0].update(id=9),
    'a special word more': lambda file: file['added_tokens'].append(
        {**file['added_tokens'][0], 'id': 4, 'content': 'good'}),
    'another unknown word': lambda file: file['model'].update(
        unk_token='good'),
    'an id too large': _vocab(lambda vocab: vocab.update(good=10**6)),
    'an id of 2**32': _vocab(lambda vocab: vocab.update(good=1 << 32)),
    'a negative id': _vocab(lambda vocab: vocab.update(good=-1)),
    'an id twice': _vocab(lambda vocab: vocab.update(film=5)),
    'a fraction': _vocab(lambda vocab: vocab.update(good=4.5)),
    'a text for an id': _vocab(lambda vocab: vocab.update(good='4')),
    'specials exchanged': _vocab(
        lambda vocab: vocab.update({'[UNK]': 0, '[PAD]': 2})),
    'more words than ids': _vocab(
        lambda vocab: vocab.update({f'w{i}': i for i in range(6, 101)})),
    'a list of words': lambda file: file['model'].update(vocab=['good']),
    'half a character': _vocab(
        lambda vocab: vocab.update({'\ud800': len(vocab)})),
}


@pytest.mark.parametrize('name', [None, *TOKENIZERS])
def test_a_hostile_tokenizer_is_refused(name, tmp_path):
  path = tmp_path / 'tokenizer.json'
  file = json.loads(fit_tokenizer(['good film'], 100).to_str())
  if name:
    TOKENIZERS[name](file)
  path.write_text(json.dumps(file))
  if name:
    refused(load_tokenizer, path, 100, names=path)
  else:
    load_tokenizer(path, 100)


def test_of_two_rules_for_one_thing_none_is_hidden(tmp_path):
  text = fit_tokenizer(['good film'], 100).to_str()
  own = re.search(r'"normalizer":.*?(?=,"pre_tokenizer")', text)[0]
  (tmp_path / 'tokenizer.json').write_text(text.replace(
      own, f'"normalizer":{json.dumps(SLOW)},{own}'))
  loaded = load_tokenizer(tmp_path / 'tokenizer.json', 100)
  assert loaded.to_str() == text  # as Python read it, whatever others take


def test_a_tokenizer_too_large_to_be_read_is_not_written(tmp_path, monkeypatch):
  monkeypatch.setattr('flax_imdb.data.tokenizer._MOST_BYTES', 1000)
  tokenizer = fit_tokenizer(['good film'], 100)
  refused(save_tokenizer, tokenizer, tmp_path / 'tokenizer.json',
          names='config.data.vocab_size')
  assert not list(tmp_path.iterdir())


# calibration.json


def _calibration(temperature, step='7'):
  return f'{{"step": {step}, "temperature": {temperature}}}'.encode()


CALIBRATIONS = [
    _calibration('NaN'), _calibration('Infinity'), _calibration('-1.0'),
    _calibration('0.0'), _calibration('1e-300'), _calibration('1e300'),
    _calibration('10.000001'), _calibration('9' * 900),
    _calibration('1'), _calibration('true'),
    _calibration('null'), _calibration('"1.0"'), _calibration('[1.0]'),
    _calibration('1.0', 'true'), _calibration('1.0', '7.0'),
    _calibration('1.0', '"7"'), _calibration('1.0', 'null'),
    _calibration('1.0, "x": 1'), b'{"temperature": 1.0}', b'{"step": 7}', b'{}',
    b'[7, 1.0]', b'7', b'null', b'"step"', b'', b'\xff', b'[' * 1000,
    b'__import__("os")']


@pytest.mark.parametrize('content', CALIBRATIONS)
@pytest.mark.parametrize('step', [7, 14])  # also where it would not be taken
def test_a_hostile_calibration_is_refused(content, step, tmp_path):
  path = tmp_path / 'calibration.json'
  path.write_bytes(content)
  with within(16):
    refused(records.read_temperature, path, step,
            names=f'{path} is not a calibration (')


@pytest.mark.parametrize('temperature', ['0.1', '1.0', '10.0'])
def test_a_calibration_in_bounds_is_taken(temperature, tmp_path):
  path = tmp_path / 'calibration.json'
  path.write_bytes(_calibration(temperature))
  assert records.read_temperature(path, 7) == float(temperature)


# jsonl


@pytest.mark.parametrize('damaged', [
    b'{"step": "7"}', b'[7]', b'7', b'null', b'{}', b'{"step": null}', b'\xff',
    b'{"step": 7', b'{"step": ' + b'9' * 5000 + b'}', b'[' * 100_000,
    b'{"a":' * 100_000])
def test_a_hostile_line_of_metrics_is_refused(damaged, tmp_path):
  path = tmp_path / 'metrics.jsonl'
  content = b'{"step": 7}\n' + damaged + b'\n'
  path.write_bytes(content)
  refused(Writers, tmp_path, 14, names=path)
  assert path.read_bytes() == content


# Checkpoints


def _store(step, item='model'):
  """The key-value store that holds the arrays of an item."""
  return tensorstore.KvStore.open({'driver': 'ocdbt', 'base': {
      'driver': 'file', 'path': f'{step / item}/'}}).result()


def _claim(**changed):
  """Changes what the embedding says of itself."""
  def change(step):
    store, key = _store(step), 'params.embed.embedding/.zarray'
    described = json.loads(store.read(key).result().value)
    store.write(key, json.dumps(described | changed).encode()).result()
  return change


def _bomb(step):
  """Lets the embedding be 1 GiB of zeros, packed in some kB."""
  shape = [1 << 25, 8]
  array = tensorstore.open({
      'driver': 'zarr', 'kvstore': {'driver': 'memory', 'path': 'x/'},
      'metadata': {'shape': shape, 'chunks': shape, 'dtype': '<f4',
                   'compressor': {'id': 'zstd', 'level': 1}},
      'create': True}, fill_value=None).result()
  array.write(np.zeros(shape, np.float32)).result()
  packed = array.kvstore.read('0.0').result().value
  assert len(packed) < 1 << 17
  _store(step).write('params.embed.embedding/0.0', packed).result()
  _claim(shape=shape, chunks=shape)(step)


def _progress(**changed):
  """Changes the progress, and its checksum with it."""
  def change(step):
    file = step / 'progress' / 'metadata'
    file.write_text(json.dumps(seal.sealed(
        json.loads(file.read_text()) | changed)))
  return change


def _file(name, content):
  def change(step):
    (step / name).write_bytes(content)
  return change


def _special(name, make):
  def change(step):
    (step / name).unlink()
    make(step / name)
  return change


def _endless(path):
  with open(path, 'wb') as f:
    f.truncate(2 << 30)


# In each the shape or structure is another than the config's: that is refused,
# and not set aside, for the config may be what is wrong.
OTHER = {
    '160 TB': (_claim(shape=[1 << 42, 8], chunks=[1 << 42, 8]),
               r'embedding of shape \[4398046511104, 8\], the config asks'),
    'packed 1 GiB': (_bomb, 'embedding of shape'),
}
# These are damaged: the checkpoint before is taken.
STEPS = {
    'chunks of 8 TB': _claim(chunks=[1 << 38, 8]),
    'another type': _claim(dtype='<f8'),
    'another compressor': _claim(compressor={'id': 'pickle'}),
    'progress of 2 GB': _special('progress/metadata', _endless),
    'metadata of 2 GB': _special('model/_METADATA', _endless),
    'progress without end': _special(
        'progress/metadata', lambda path: path.symlink_to('/dev/zero')),
    'progress from a pipe': _special('progress/metadata', os.mkfifo),
    'progress deep': _file('progress/metadata', b'[' * 100_000),
    'progress a list': _file('progress/metadata', b'[]'),
    'progress Python': _file('progress/metadata', b'__import__("os")'),
    'progress empty': _file('progress/metadata', b'{"crc32": 2875918263}'),
    'unknown progress': _progress(eval='os'),
    'waited a text': _progress(waited='1'),
    'waited true': _progress(waited=True),
    'waited endless': _progress(waited=10**400),
    'stopped a number': _progress(stopped=1),
    'reference a list': _progress(reference=[0.5]),
    'reference NaN': _progress(reference=float('nan')),
    'seconds infinite': _progress(seconds=float('inf')),
    'seconds of 400 digits': _progress(seconds=10**400),
    'score another': _progress(score=1e9),
    'score NaN': _file('metrics/metrics', b'{"score": NaN, "step": 14}'),
    'score of 400 digits': _file(
        'metrics/metrics', b'{"score": 1e999, "step": 14}'),
    'score a text': _file('metrics/metrics', b'{"score": "9", "step": 14}'),
    'score of step 7': _file('metrics/metrics', b'{"score": 9, "step": 7}'),
    'score without a step': _file('metrics/metrics', b'{"score": 9}'),
    'score and more': _file(
        'metrics/metrics', b'{"score": 9, "step": 14, "x": 1}'),
    'score a list': _file('metrics/metrics', b'[]'),
    'score deep': _file('metrics/metrics', b'[' * 100_000),
    'score of 2 GB': _special('metrics/metrics', _endless),
    'score from a pipe': _special('metrics/metrics', os.mkfifo),
}


@pytest.fixture
def copied(trained, tmp_path):
  """(run directory to change, its newest step)."""
  shutil.copytree(trained[0], tmp_path / 'run')
  return tmp_path / 'run', tmp_path / 'run' / 'checkpoints' / '14'


def _one_line(capsys):
  error = capsys.readouterr().err
  assert re.fullmatch(r'error: [^\n]{,600}\n', error), error
  return error


@pytest.mark.parametrize('name', OTHER)
def test_arrays_are_compared_with_the_config_before_they_are_made(
    name, copied, capsys):
  workdir, step = copied
  change, message = OTHER[name]
  change(step)
  for mode in (['--mode=predict', '--step=14', 'good'], TINY):
    with within(64):
      assert main.main([*mode, f'--workdir={workdir}']) == 2
    error = _one_line(capsys)
    assert 'checkpoint 14 has params/embed/' in error
    assert re.search(message, error), error


@needs_proc
def test_memory_stays_what_it_is_when_a_checkpoint_claims_a_gibibyte(copied):
  workdir, step = copied
  _bomb(step)
  # Not ru_maxrss, which begins at what this process has used.
  program = ('import sys; from flax_imdb import main; '
             'status = main.main(sys.argv[1:]); '
             'print(open("/proc/self/status").read()); sys.exit(status)')
  process = subprocess.run(
      [sys.executable, '-c', program, '--mode=predict', '--step=14', 'good',
       f'--workdir={workdir}'], cwd=ROOT, capture_output=True, check=False,
      timeout=300)
  assert process.returncode == 2, process.stderr
  most = int(re.search(rb'VmHWM:\s*(\d+) kB', process.stdout)[1])
  assert most < 500 << 10  # 215 MiB for a run that is whole


# Of each kind of damage one: to arrays, descriptions, progress and score.
_SOON = ('chunks of 8 TB', 'another type', 'progress from a pipe',
         'unknown progress', 'reference NaN', 'score another', 'score a text')


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in _SOON))
    for name in STEPS])
def test_a_hostile_checkpoint_is_refused_and_training_sets_it_aside(
    name, copied, capsys):
  workdir, step = copied
  STEPS[name](step)
  assert main.main(
      ['--mode=predict', '--step=14', 'good', f'--workdir={workdir}']) == 2
  assert 'checkpoint 14 ' in _one_line(capsys)
  assert main.main([*TINY, f'--workdir={workdir}']) == 0
  output = capsys.readouterr().out
  assert f'set aside as {workdir}/damaged/14-' in output
  assert 'resuming from step 7 of 14' in output


def test_a_checkpoint_under_another_step_s_name_is_set_aside(copied, capsys):
  workdir, step = copied
  later = shutil.copytree(step, step.with_name('21'))
  score = later / 'metrics' / 'metrics'
  score.write_text(json.dumps(json.loads(score.read_text()) | {'step': 21}))
  assert main.main([*TINY, f'--workdir={workdir}']) == 0
  output = capsys.readouterr().out
  assert f'set aside as {workdir}/damaged/21-' in output
  assert 'already at step 14 of 14' in output


@pytest.mark.parametrize('name', [
    'x', '-7', '²', '99999999999999999999999', '07', '14.orbax-checkpoint-tmp'])
def test_directories_beside_the_steps_do_no_harm(name, copied, capsys):
  workdir, step = copied
  (step.parent / name / 'metrics').mkdir(parents=True)
  (step.parent / name / 'metrics' / 'metrics').write_text('{')
  status = main.main(['--mode=predict', 'good', f'--workdir={workdir}'])
  if status:
    _one_line(capsys)
  assert status in (0, 2)
