"""What was exported answers as predict does, without this package."""

import dataclasses
from importlib import metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv

import jax
import numpy as np
import pytest
from support.command import EVERY_INPUT, ROOT, finished, run_here
from support.models import drawn_params
import tokenizers

from flax_imdb.cluster import devices
from flax_imdb.cluster.devices import AXIS
from flax_imdb.config import load_config
from flax_imdb.data.ngrams import NONE
from flax_imdb.data.reading import Reading
from flax_imdb.data.sources import LABELS
from flax_imdb.data.tokenizer import PADDING_ID, START_ID, fit_tokenizer
from flax_imdb.fields import check_fields
from flax_imdb.inference import evaluate, export, predict
from flax_imdb.model import classifier

OLD = ROOT / 'tests' / 'checkpoint' / 'run_of_0.1.0.tar.gz'
EXAMPLE = ROOT / 'examples' / 'serve_export.py'
# Runs the example where importing the package or Flax, or reading a pickle,
# fails; its arguments are the example's.
GUARDED = '''
import runpy, sys
import jax, jax.export, tokenizers  # what they read themselves does not count
sys.modules.update(flax=None, flax_imdb=None, orbax=None, ml_collections=None)
def forbid(event, args):
  if event == 'pickle.find_class':
    sys.stderr.write(f'unpickles {args}')
    import os; os._exit(3)
sys.addaudithook(forbid)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
'''
TEXTS = [
    'I was not bored.', '', 'zzyzx qwrtp', '[PAD] [UNK]', 'caf\u00e9 \u201cit',
    'BAD<br />bad', "don\u2019t", 'a\x0cform feed', 'a &#98;ad film&period;',
    'the<b>film</b> was &quot;bad&quot;', 'AT&notbad &amp;#98;ad',
    f'&#{"9" * 32}; &#{"9" * 5000}; bad', 'e\u0301 \u6620\u753b bad',
    *(f'{"the film was good , but " * n}bad' for n in range(0, 24, 2)),
    *('never ' * n + 'dull' for n in range(30))]


def _serve(folder, texts, *command):
  """The objects that the example prints, in a directory of no package."""
  env = {k: v for k, v in os.environ.items() if not k.startswith(
      ('JAX_', 'XLA_', 'NPROC', 'PYTHONPATH', 'XDG_'))}
  process = subprocess.run(
      [*command, str(EXAMPLE), str(folder)], cwd=folder, capture_output=True,
      env=env | {'JAX_PLATFORMS': 'cpu'}, check=False, timeout=300,
      input='\n'.join(texts).encode() + b'\n')
  assert process.returncode == 0, process.stderr.decode()
  return [json.loads(line) for line in process.stdout.decode().splitlines()]


@pytest.fixture(scope='module')
def exported(trained, tmp_path_factory):
  """(exported directory, what predict answers to `TEXTS`)."""
  workdir, _ = trained
  copy = tmp_path_factory.mktemp('export') / 'run'
  shutil.copytree(workdir, copy)
  line = finished(run_here('--mode=export', f'--workdir={copy}'))
  assert line == f'wrote step 14 to {copy}/export\n'
  printed = finished(run_here(
      '--mode=predict', f'--workdir={copy}', '--json',
      stdin='\n'.join(TEXTS).encode()))
  predictions = [json.loads(text) for text in printed.splitlines()]
  for prediction in predictions:
    prediction.pop('note', None)
  assert len({p['probability'] for p in predictions}) > 30
  assert {p['label'] for p in predictions} == set(LABELS)
  return copy / 'export', predictions


def test_the_example_answers_as_predict_does_without_this_package(exported):
  folder, predictions = exported
  about = json.loads((folder / 'model.json').read_text())
  assert about['unescape'] is True
  fitted = json.loads((folder.parent / 'calibration.json').read_text())
  assert about['temperature'] == fitted['temperature'] != 1
  assert about['rows'] == 12 // jax.local_device_count()  # those of predict
  assert sorted(p.name for p in folder.iterdir()) == [
      'MODEL_CARD.md', 'model.json', 'model.stablehlo', 'tokenizer.json']
  assert _serve(folder, TEXTS, sys.executable, '-W', 'error', '-c',
                GUARDED) == predictions
  alone = _serve(folder, TEXTS[-1:], sys.executable)
  assert alone == predictions[-1:]


@pytest.mark.parametrize(('backend', 'given'), [
    ('cpu', "{'xla_cpu_prefer_vector_width': 512}"), ('gpu', 'None'),
    ('tpu', 'None')])
def test_the_example_gives_flags_for_a_cpu_to_a_cpu_only(
    backend, given, exported):
  guarded = GUARDED.replace('sys.modules', f'''
jax.default_backend = lambda: {backend!r}
jit = jax.jit
def shown(function, compiler_options=None):
  print(compiler_options, file=sys.stderr)
  return jit(function)
jax.jit = shown
sys.modules''')
  process = subprocess.run(
      [sys.executable, '-c', guarded, str(EXAMPLE), str(exported[0])],
      capture_output=True, text=True, check=True, timeout=300, input='good\n')
  assert given in process.stderr.splitlines()
  assert json.loads(process.stdout)['text'] == 'good'


@pytest.mark.parametrize('fields', [
    pytest.param(  # so wide that the rows of a call matter
        {'model.layers': 2, 'model.bidirectional': True,
         'model.pooling': 'max+mean'}, marks=pytest.mark.slow),
    pytest.param(
        {'model.dtype': 'bfloat16', 'data.bucket_width': 64,
         'data.max_length': 30}, marks=pytest.mark.slow),
    {'model.cell': 'simple_rnn', 'model.mask_padding': False,
     'model.pooling': 'last', 'data.bucket_width': 0, 'debug': True},
], ids=lambda fields: fields['model.pooling'] if 'model.pooling' in fields
    else 'bfloat16')
def test_every_kind_of_model_answers_the_same_bits(fields, tmp_path):
  config = load_config('configs/quickstart.py')
  config.data.max_length, config.data.bucket_width = 40, 16
  config.eval_batch_size = 32  # several calls
  config.update_from_flattened_dict(fields)
  check_fields(config)
  model = classifier.build_model(config)
  params = drawn_params(model, seed=1)
  params['embed']['embedding'] *= 20  # so that logits differ visibly
  tokenizer = fit_tokenizer(TEXTS, config.data.vocab_size)
  rows = config.eval_batch_size // jax.local_device_count()
  (tmp_path / 'model.stablehlo').write_bytes(
      export.program(config, model, jax.device_get(params)))
  (tmp_path / 'tokenizer.json').write_text(
      export.serving_tokenizer(tokenizer, config))
  # Without a temperature, as older exports are.
  (tmp_path / 'model.json').write_text(json.dumps(
      {'labels': LABELS, 'threshold': 0, 'rows': rows, 'unescape': True,
       'inputs': ['ids', 'lengths'],
       'reading': dataclasses.asdict(Reading.of(config.data))}))
  logits = evaluate.make_logits(
      config, evaluate.make_forward(model), NONE.annotate)
  texts = (2 * TEXTS)[:3 * rows + 1]  # one is left for the last call
  want = list(predict.predict(
      logits, devices.replicate(params), tokenizer, texts, LABELS))
  got = _serve(tmp_path, texts, sys.executable)
  assert [p['probability'] for p in got] == [p['probability'] for p in want]
  assert [p['label'] for p in got] == [p['label'] for p in want]


@pytest.mark.parametrize('form', ['scan', 'loop'])
@pytest.mark.parametrize('devices', [1, 2])
def test_it_rounds_as_predict_does_on_any_number_of_devices(devices, form):
  config = load_config('configs/words.py')
  model = classifier.build_model(config)
  params = drawn_params(model, seed=1)
  rng = np.random.default_rng(0)
  ids = rng.integers(4, 1000, (devices, 64, 40)).astype(np.int32)
  lengths = rng.integers(1, 38, (devices, 64)).astype(np.int32)
  mesh = jax.sharding.Mesh(jax.devices()[:devices], (AXIS,))
  forward = evaluate.make_forward(
      model.clone(recurrence=form), jax.devices()[:devices])
  want = forward(
      jax.device_put(params, jax.sharding.NamedSharding(
          mesh, jax.sharding.PartitionSpec())),
      {'ids': ids, 'lengths': lengths})
  call = jax.jit(jax.export.deserialize(
      bytearray(export.program(config, model, jax.device_get(params)))).call)
  for i in range(devices):
    np.testing.assert_array_equal(call(ids[i], lengths[i]), want[i])


def test_a_run_of_an_older_tokenizer_is_served_by_its_rules(tmp_path):
  with tarfile.open(OLD) as archive:
    archive.extractall(tmp_path, filter='data')
  texts = ['&#102;ilm', '<i>film</i> wrong', 'can\u00b4t film', 'wrong film']
  finished(run_here('--mode=export', f'--workdir={tmp_path}'))
  printed = finished(run_here('--mode=predict', f'--workdir={tmp_path}',
                              '--json', stdin='\n'.join(texts).encode()))
  predictions = [json.loads(text) for text in printed.splitlines()]
  for prediction in predictions:
    prediction.pop('note', None)
  assert _serve(tmp_path / 'export', texts, sys.executable) == predictions
  about = json.loads((tmp_path / 'export' / 'model.json').read_text())
  assert about['unescape'] is False and about['temperature'] == 1.0
  (first, *_) = printed.splitlines()
  assert json.loads(first)['note'] == 'only unknown words'  # 102 and ilm


def test_every_input_is_served_as_it_is_predicted(
    trained_on_every_input, tmp_path):
  workdir, _ = trained_on_every_input
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  finished(run_here('--mode=export', f'--workdir={copy}'))
  texts = [*TEXTS, *(' '.join(TEXTS[n::7]) for n in range(7)), 'good ' * 300]
  printed = finished(run_here('--mode=predict', f'--workdir={copy}', '--json',
                              stdin='\n'.join(texts).encode()))
  predictions = [json.loads(text) for text in printed.splitlines()]
  for prediction in predictions:
    prediction.pop('note', None)
  assert _serve(copy / 'export', texts, sys.executable) == predictions
  assert len({p['probability'] for p in predictions}) > 30
  about = json.loads((copy / 'export' / 'model.json').read_text())
  assert about['temperature'] != 1
  assert about['inputs'] == [
      'ids', 'lengths', 'segments', 'bigrams', 'log_odds', 'linear']


@pytest.mark.slow
@pytest.mark.parametrize('fields', [
    {'data.read': 'last'}, {'data.read': 'spread'},
    {'data.read': 'last', 'data.segment_length': 0, 'data.bucket_width': 0},
    {'data.segment_length': 0, 'model.inputs': 'words+bigrams'},
    {'data.segment_length': 0}, {'model.members': 2}],
    ids=['last', 'spread', 'whole, last', 'whole', 'whole, all inputs',
         'two members'])
def test_every_reading_is_served_as_it_is_predicted(fields, tmp_path):
  flags = [f'--config.{k}={v}' for k, v in fields.items()]
  workdir = f'--workdir={tmp_path}/run'
  finished(run_here(*EVERY_INPUT, *flags, '--config.num_epochs=1', workdir))
  finished(run_here('--mode=export', workdir))
  texts = [*TEXTS, *(' '.join(TEXTS[n::7]) for n in range(7))]
  printed = finished(run_here('--mode=predict', workdir, '--json',
                              stdin='\n'.join(texts).encode()))
  predictions = [json.loads(text) for text in printed.splitlines()]
  for prediction in predictions:
    prediction.pop('note', None)
  assert _serve(tmp_path / 'run' / 'export', texts,
                sys.executable) == predictions


def test_the_program_is_for_all_platforms_and_shapes(exported):
  folder, _ = exported
  program = jax.export.deserialize(
      bytearray((folder / 'model.stablehlo').read_bytes()))
  assert program.platforms == export.PLATFORMS == ('cpu', 'cuda', 'tpu')
  assert [str(x) for x in program.in_avals] == [
      'int32[rows,width]', 'int32[rows]']
  assert str(program.out_avals[0]) == 'float32[rows]'
  for rows, width in ((1, 1), (3, 70)):
    logits = program.call(np.ones((rows, width), np.int32),
                          np.ones(rows, np.int32))
    assert logits.shape == (rows,) and np.isfinite(logits).all()


def test_the_tokenizer_cuts_and_pads_as_the_batches_do(exported):
  folder, _ = exported
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  short, long = tokenizer.encode_batch(['the film', 'the ' * 99])
  assert len(long.ids) == len(short.ids) == 40  # TINY's max_length
  assert sum(short.attention_mask) == 3 and sum(long.attention_mask) == 40
  assert short.ids[0] == START_ID
  assert set(short.ids[3:]) == {PADDING_ID}
  assert len(tokenizer.encode_batch(['the film'])[0].ids) == 20  # its bucket


def test_a_damaged_program_is_an_exception_and_no_crash(exported, tmp_path):
  folder, _ = exported
  whole = (folder / 'model.stablehlo').read_bytes()
  for damaged in (b'', whole[:1000], b'\x80\x04.' + whole[3:]):
    with pytest.raises(Exception):  # noqa: B017, flatbuffers raises many kinds
      jax.export.deserialize(bytearray(damaged))


def test_an_unwritable_directory_is_one_line(exported, tmp_path):
  shutil.copytree(exported[0].parent, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run' / 'export')
  (tmp_path / 'run' / 'export').write_text('a file')
  process = run_here('--mode=export', f'--workdir={tmp_path}/run')
  assert process.returncode == 2
  assert re.fullmatch(r'error: cannot write .*/export/.*\n', process.stderr)


@pytest.mark.slow
def test_its_requirements_are_all_that_the_example_needs(exported, tmp_path):
  folder, predictions = exported
  pip = [str(tmp_path / 'venv' / 'bin' / 'python'), '-m', 'pip', '-q',
         '--disable-pip-version-check']
  venv.create(tmp_path / 'venv', with_pip=True)
  probe = subprocess.run(
      [*pip, 'download', '--no-deps', '--retries=0', '--timeout=5', 'pip',
       '-d', str(tmp_path)], capture_output=True, check=False)
  if probe.returncode:
    pytest.skip('pip has no network')
  # As they are here, of the versions that it allows: others' bits may differ.
  versions = tmp_path / 'versions.txt'
  versions.write_text(''.join(
      f'{name}=={metadata.version(name)}\n'
      for name in ('jax', 'jaxlib', 'tokenizers', 'flatbuffers')))
  requirements = EXAMPLE.with_name('requirements.txt')
  subprocess.run([*pip, 'install', '--no-compile', '-r', str(requirements),
                  '-c', str(versions)], check=True, timeout=600)
  assert _serve(folder, TEXTS, pip[0], '-W', 'error') == predictions
