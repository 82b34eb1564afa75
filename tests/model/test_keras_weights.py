"""Keras' weights in and out, and the same training as Keras did.

keras_golden.npz was written by `python benchmarks/keras_parity.py --golden`
with Keras 3.15.1: a small model, 40 steps of RMSprop, each cell, with and
without mask_zero; its weights before and after and the loss of each step.
"""

import io
import json
import pathlib
import pickle
import shutil
import zipfile

import h5py
import numpy as np
import pytest
from support.command import TINY, finished, run_here
from support.models import drawn_params

from flax_imdb.checkpoint.seal import check_shapes
from flax_imdb.cluster import devices
from flax_imdb.config import load_config
from flax_imdb.errors import UserError
from flax_imdb.model import classifier, keras_weights
from flax_imdb.train.optimizer import build_optimizer
from flax_imdb.train.step import init_state, make_train_step

GOLDEN = np.load(pathlib.Path(__file__).with_name('keras_golden.npz'))
CASES = ['lstm_plain', 'simple_rnn_masked', *(
    pytest.param(case, marks=pytest.mark.slow)
    for case in ('lstm_masked', 'simple_rnn_plain'))]
V, E, H, D = 40, 4, 5, 3


def _golden(case, when):
  return [GOLDEN[f'{case}_{when}_{i}'] for i in range(8)]


def _weights(cell='lstm'):
  return _golden(f'{cell}_plain', 'before')


@pytest.mark.parametrize('case', CASES)
def test_forty_steps_equal_those_of_keras(case):
  config = load_config('configs/notebook.py')
  config.global_batch_size = 8
  config.data.update(vocab_size=V, max_length=12)
  config.model.update(
      embedding_dim=E, width=H, hidden_dim=D, cell=case.rsplit('_', 1)[0],
      mask_padding=case.endswith('masked'))
  model = classifier.build_model(config)
  optimizer = build_optimizer(config, 1)
  params = keras_weights.from_keras(_golden(case, 'before'))
  state = init_state(config, model, optimizer).replace(params=params)
  state = devices.replicate(state)
  train_step = make_train_step(config, model, optimizer, steps_per_epoch=1)
  losses = []
  for ids, lengths, labels in zip(
      GOLDEN['ids'], GOLDEN['lengths'], GOLDEN['labels'], strict=True):
    state, sums = train_step(state, devices.shard({
        'ids': ids.astype(np.int32), 'lengths': lengths.astype(np.int32),
        'labels': labels.astype(np.float32), 'weights': np.ones(8, 'f4'),
        'places': np.arange(8, dtype=np.int32)}))
    sums = devices.to_host(sums)
    losses.append(sums.loss / sums.weight)
  np.testing.assert_allclose(losses, GOLDEN[f'{case}_losses'], rtol=1e-5)
  got = keras_weights.to_keras(devices.to_host(state.params))
  for a, b in zip(got, _golden(case, 'after'), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize('cell', ['lstm', 'simple_rnn'])
def test_there_and_back_changes_nothing(cell, tmp_path):
  weights = _weights(cell)
  params = keras_weights.from_keras(weights)
  keras_weights.write_weights(tmp_path / 'w.npz', params)
  for path in (None, tmp_path / 'w.npz'):
    read = keras_weights.read_weights(path) if path else params
    for a, b in zip(keras_weights.to_keras(read), weights, strict=True):
      assert a.dtype == np.float32
      np.testing.assert_array_equal(a, b)


def _h5(weights, cell='lstm', extra=()):
  """The bytes of a .weights.h5, laid out as Keras 3 does."""
  content = io.BytesIO()
  places = ['embedding/vars/0', *(f'{cell}/cell/vars/{i}' for i in range(3)),
            'dense/vars/0', 'dense/vars/1', 'dense_1/vars/0', 'dense_1/vars/1']
  with h5py.File(content, 'w') as file:
    for place, weight in zip(places, weights, strict=True):
      file[f'layers/{place}'] = weight
    for layer in extra:
      file[f'layers/{layer}/vars/0'] = np.zeros(3)
    file.create_group(f'layers/{cell}/vars')
    file.create_group('layers/dropout/vars')
  return content.getvalue()


@pytest.mark.parametrize('cell', ['lstm', 'simple_rnn'])
def test_keras_own_files_are_read(cell, tmp_path):
  content = _h5(_weights(cell), cell)
  (tmp_path / 'm.weights.h5').write_bytes(content)
  with zipfile.ZipFile(tmp_path / 'm.keras', 'w') as archive:
    archive.writestr('model.weights.h5', content)
  for name in ('m.weights.h5', 'm.keras'):
    read = keras_weights.to_keras(keras_weights.read_weights(tmp_path / name))
    for a, b in zip(read, _weights(cell), strict=True):
      np.testing.assert_array_equal(a, b)


def test_npz_with_more_than_ten_names_keeps_its_order(tmp_path):
  arrays = {f'w{i}': w for i, w in zip(range(7, 15), _weights(), strict=True)}
  np.savez(tmp_path / 'w.npz', **dict(reversed(arrays.items())))
  read = keras_weights.to_keras(keras_weights.read_weights(tmp_path / 'w.npz'))
  for a, b in zip(read, _weights(), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda w: w[:-1], '7 arrays instead of 8'),
    (lambda w: [*w[:3], w[3][:-1], *w[4:]],
     r'cell/bias has shape \[19\] instead of \[20\]'),
    (lambda w: [w[0].T, *w[1:]],
     r'cell/kernel has shape \[4, 20\] .*\[40, \?\]'),
    (lambda w: [*w[:6], w[6][:, 0], w[7]], 'logit/kernel has shape'),
    (lambda w: [w[0].astype(int), *w[1:]], 'embedding holds no floating-point'),
    (lambda w: [w[0], w[1][:, :10], w[2][:, :10], w[3][:10], *w[4:]],
     'neither an LSTM .* nor a SimpleRNN')])
def test_a_wrong_count_or_shape_is_named(change, message):
  with pytest.raises(UserError, match=message):
    keras_weights.from_keras(change(_weights()))


class _Bomb:
  """Leaves a file behind if it is ever unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (pathlib.Path.touch, (self.path,))


def _damaged(tmp_path):
  """{file name: content} of files that must be refused."""
  good = io.BytesIO()
  np.savez(good, *_weights())
  objects = io.BytesIO()
  np.savez(objects, np.array([_Bomb(tmp_path / 'boom')], object))
  huge = io.BytesIO()
  with zipfile.ZipFile(huge, 'w', zipfile.ZIP_DEFLATED) as archive:
    with archive.open('arr_0.npy', 'w', force_zip64=True) as f:
      for _ in range(65):
        f.write(bytes(1 << 20))
  return {
      'truncated.npz': good.getvalue()[:-100],
      'pickle.npz': pickle.dumps(_Bomb(tmp_path / 'boom')),
      'objects.npz': objects.getvalue(),
      'bomb.npz': huge.getvalue(),
      'empty.npz': b'',
      'truncated.weights.h5': _h5(_weights())[:2000],
      'other.weights.h5': _h5(_weights(), 'gru'),
      'more.weights.h5': _h5(_weights(), extra=['dense_2']),
      'not.keras': b'PK',
      'weights.txt': b'1 2 3',
  }


def test_damaged_and_foreign_files_are_refused_and_nothing_is_unpickled(
    tmp_path, monkeypatch):
  monkeypatch.setattr(keras_weights, '_MOST_BYTES', 1 << 26)
  for name, content in _damaged(tmp_path).items():
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as e:
      keras_weights.read_weights(tmp_path / name)
    assert '\n' not in str(e.value), name
  with pytest.raises(UserError, match='cannot be read'):
    keras_weights.read_weights(tmp_path / 'missing.npz')
  assert not (tmp_path / 'boom').exists()


def test_the_last_layer_has_an_output_for_each_of_several_classes(tmp_path):
  *others, _, _ = _weights()
  weights = [*others, np.ones((D, 4), 'f4'), np.arange(4, dtype='f4')]
  model = classifier.build_model(load_config('configs/notebook.py'), 4).clone(
      vocab_size=V, embedding_dim=E, width=H, hidden_dim=D)
  params = keras_weights.from_keras(weights)
  check_shapes('it', classifier.param_shapes(model), params)
  keras_weights.write_weights(tmp_path / 'w.npz', params)
  again = keras_weights.to_keras(keras_weights.read_weights(tmp_path / 'w.npz'))
  for a, b in zip(weights, again, strict=True):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(UserError, match=r'logit/bias has shape \[3\] instead'):
    keras_weights.from_keras([*weights[:-1], np.ones(3, 'f4')])


def test_another_architecture_has_no_place_in_keras():
  config = load_config('configs/words.py')
  params = drawn_params(classifier.build_model(config))
  with pytest.raises(UserError, match='backward_0/.* is not in the notebook'):
    keras_weights.to_keras(params)


NOTEBOOK = tuple(
    x.replace('quickstart', 'notebook') for x in TINY
    if 'bucket_width' not in x) + (
        '--config.data.name=grammar_reviews', f'--config.data.vocab_size={V}',
        f'--config.model.embedding_dim={E}', f'--config.model.width={H}',
        f'--config.model.hidden_dim={D}')


def test_a_run_begins_with_keras_weights_and_exports_them(tmp_path):
  np.savez(tmp_path / 'w.npz', *_weights())
  argv = [*NOTEBOOK, f'--config.init_from={tmp_path}/w.npz',
          f'--workdir={tmp_path}/run']
  finished(run_here(*argv, '--config.num_epochs=0'))
  export = '--mode=export', '--format=keras', f'--workdir={tmp_path}/run'
  assert 'mask_zero' not in finished(run_here(*export))
  exported = np.load(tmp_path / 'run' / 'keras.npz')
  for i, weight in enumerate(_weights()):
    np.testing.assert_array_equal(exported[f'arr_{i}'], weight)
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert summary['step'] == 0 and summary['test']['n'] == 45

  config = (tmp_path / 'run' / 'config.json').read_text()
  masked = config.replace('"mask_padding": false', '"mask_padding": true')
  assert masked != config
  (tmp_path / 'run' / 'config.json').write_text(masked)
  assert 'needs an Embedding with mask_zero=True' in finished(run_here(*export))
  (tmp_path / 'run' / 'config.json').write_text(config)

  # Another run begins where this one is, with the same words.
  (tmp_path / 'run' / 'tokenizer.json').write_text(
      (tmp_path / 'run' / 'tokenizer.json').read_text().replace(
          '"the"', '"THE"'))
  finished(run_here(
      *NOTEBOOK, f'--config.init_from={tmp_path}/run', '--config.num_epochs=0',
      f'--workdir={tmp_path}/second'))
  assert '"THE"' in (tmp_path / 'second' / 'tokenizer.json').read_text()
  second = json.loads((tmp_path / 'second' / 'summary.json').read_text())
  assert second['params_sha256'] == summary['params_sha256']


def test_keras_own_ids_are_read_from_its_word_index_and_kept(tmp_path):
  np.savez(tmp_path / 'w.npz', *_weights())
  index = tmp_path / 'imdb_word_index.json'
  words = ['film', 'the', 'br', 'was', 'not']  # in no order of our reviews
  index.write_text(json.dumps({word: i for i, word in enumerate(words, 1)}))
  argv = [*NOTEBOOK, f'--config.init_from={tmp_path}/w.npz',
          f'--config.data.word_index={index}', '--config.num_epochs=0',
          f'--workdir={tmp_path}/run']
  finished(run_here(*argv))
  tokenizer = json.loads((tmp_path / 'run' / 'tokenizer.json').read_text())
  vocab = tokenizer['model']['vocab']
  assert [vocab[word] for word in words] == [4, 5, 6, 7, 8]
  assert len(vocab) == 9
  # The run directory has all that it needs: to go on, and to predict.
  index.unlink()
  finished(run_here(*argv))
  ask = ('--mode=predict', '--json', f'--workdir={tmp_path}/run')
  (known, unknown) = (json.loads(finished(run_here(*ask, text)))
                      for text in ('the film', 'a movie'))
  assert 'note' not in known and unknown['note'] == 'only unknown words'
  # A run that is yet to begin says what it lacks, and leaves nothing.
  process = run_here(*argv[:-1], f'--workdir={tmp_path}/second')
  assert process.returncode == 2 and process.stderr.count('\n') == 1
  assert 'cannot read' in process.stderr and str(index) in process.stderr
  assert not (tmp_path / 'second' / 'config.json').exists()


def test_weights_of_other_sizes_are_refused_by_name(tmp_path):
  np.savez(tmp_path / 'w.npz', *_weights())
  process = run_here(
      *NOTEBOOK, '--config.model.hidden_dim=9', f'--workdir={tmp_path}/run',
      f'--config.init_from={tmp_path}/w.npz')
  assert process.returncode == 2
  assert 'w.npz has hidden/bias of shape [3], the config asks for [9]' in (
      process.stderr)
  assert process.stderr.count('\n') == 1


def test_only_the_last_state_is_pooled_in_keras(trained, tmp_path):
  shutil.copytree(trained[0], tmp_path / 'run')
  process = run_here(
      '--mode=export', '--format=keras', f'--workdir={tmp_path}/run')
  assert process.returncode == 2
  assert 'needs config.model.pooling=last' in process.stderr
