"""Run directories at gs://, the real command line against an emulator."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from support.command import ROOT, TINY, environ, finished, run_main

from flax_imdb.errors import TransientError, UserError
from flax_imdb.storage import bucket, files

NEEDED = [name for name in ('gcsfs', 'gcp_storage_emulator')
          if not importlib.util.find_spec(name)]
emulated = pytest.mark.skipif(bool(NEEDED), reason=f'{NEEDED} not installed')


@pytest.fixture(scope='module')
def store(trained):
  """An object store with a finished run at gs://bucket/run; don't change it.

  After `trained`, which compiles the programs of it.
  """
  from support.object_store import ObjectStore
  with ObjectStore() as store:
    finished(run_main(*TINY, '--workdir=gs://bucket/run', **store.env))
    yield store


@pytest.fixture
def copy(store):
  """What copies the finished run to a directory, without its end."""
  def copy(name):
    for file, content in store.files('run/').items():
      if file != 'summary.json':
        store.write(f'{name}/{file}', content)
    return f'--workdir=gs://bucket/{name}'
  yield copy
  store.fault = lambda method, path: None


def _one_line(process, status):
  assert process.returncode == status, process.stderr
  lines = [line for line in process.stderr.splitlines()
           if 'Using GOOGLE_AUTH_TOKEN_FOR_TESTING' not in line]
  assert len(lines) == 1, process.stderr
  return lines[0]


def _same(found, local):
  """Compares the files of a remote run with a local run directory."""
  for name in ('config.json', 'labels.json', 'data.json', 'tokenizer.json',
               'metrics.jsonl', 'calibration.json'):
    assert found[name] == (local / name).read_bytes()
  summaries = [json.loads(found['summary.json']),
               json.loads((local / 'summary.json').read_text())]
  for summary in summaries:
    summary.pop('seconds')
  assert summaries[0] == summaries[1]


@emulated
def test_a_remote_run_is_the_local_one(store, trained):
  found = store.files('run/')
  _same(found, trained[0])
  tops = {name.split('/')[0].split('.tfevents')[0] for name in found}
  assert tops == {
      'config.json', 'labels.json', 'data.json', 'tokenizer.json',
      'checkpoints', 'events.out', 'metrics.jsonl', 'calibration.json',
      'summary.json', 'MODEL_CARD.md', 'projector', 'projector_config.pbtxt'}
  assert {name.split('/')[1] for name in found if name.startswith(
      'checkpoints/')} == {'7', '14'}
  (events,) = (v for k, v in found.items() if re.match(
      r'events\.out\.tfevents\.[1-9]', k))
  for name in 'events.out.tfevents.final', 'projector/tensors.tsv':
    assert found[name]
  assert found['MODEL_CARD.md'].startswith(b'---\nlicense: "apache-2.0"')
  assert events.count(b'validation/loss') == 2  # one an epoch


@pytest.mark.slow
@emulated
def test_a_remote_run_is_evaluated_predicted_with_and_exported(store, trained):
  argv = ['--workdir=gs://bucket/run']
  line = finished(run_main('--mode=eval', *argv, **store.env)).splitlines()[-1]
  assert line in trained[1].splitlines()
  words = ['--mode=predict', 'I', 'was', 'bored.']
  assert finished(run_main(*words, *argv, **store.env)) == finished(
      run_main(*words, f'--workdir={trained[0]}'))
  finished(run_main('--mode=export', *argv, **store.env))
  exported = store.files('run/export/')
  assert set(exported) == {'MODEL_CARD.md', 'model.json', 'model.stablehlo',
                           'tokenizer.json'}
  assert b'serve_export.py' in exported['MODEL_CARD.md']
  store.delete('run/export/')


@pytest.mark.slow
@emulated
def test_a_finished_remote_run_says_so_and_another_config_is_refused(
    store, copy):
  argv = [*TINY, copy('done')]
  assert 'already at step 14 of 14' in finished(run_main(*argv, **store.env))
  refused = run_main(*argv, '--config.num_epochs=3', **store.env)
  assert 'made with another config (num_epochs' in _one_line(refused, 2)


@pytest.mark.slow
@emulated
def test_a_remote_run_begins_with_the_weights_of_another(store):
  finished(run_main(*TINY, '--config.init_from=gs://bucket/run',
                    '--config.num_epochs=0', '--workdir=gs://bucket/second',
                    **store.env))
  first, second = (json.loads(store.files(f'{name}/')['summary.json'])
                   for name in ('run', 'second'))
  # The last step's weights in both; here no training changed them.
  assert first['params_sha256'] == second['params_sha256']


def _fault(store, name, what, status):
  """Fails what writes such an object, once an epoch is told of."""
  def fault(method, path):
    return status if (
        method == 'POST' and f'{name}/{what}' in path and '"step": 7' in
        store.files(f'{name}/').get('metrics.jsonl', b'').decode()) else None
  return fault


def _start(*argv, **env):
  return subprocess.Popen(
      [sys.executable, '-m', 'flax_imdb.main', *argv], cwd=ROOT,
      env=environ(**env),
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@emulated
@pytest.mark.parametrize('moment', [
    'checkpoints/14/commit_success', 'checkpoints/14/model/d', 'metrics.jsonl'])
def test_a_remote_run_killed_in_a_save_resumes_to_the_same_bits(
    moment, store, copy, trained):
  name = f'killed-{moment.replace("/", "-")}'
  store.fault, store.faults = _fault(store, name, moment, 503), []
  process = _start(*TINY, f'--workdir=gs://bucket/{name}', **store.env)
  while process.poll() is None and not (  # it tries again and again
      store.faults and 'checkpoints/7/commit_success.txt' in store.files(
          f'{name}/')):
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL and store.faults
  store.fault = lambda method, path: None
  before = store.files(f'{name}/')
  assert 'checkpoints/14/commit_success.txt' not in before
  assert len(before['metrics.jsonl'].splitlines()) == 2 - (
      moment == 'metrics.jsonl')
  assert 'resuming from step 7 of 14' in finished(
      run_main(*TINY, f'--workdir=gs://bucket/{name}', **store.env))
  _same(store.files(f'{name}/'), trained[0])


@pytest.mark.slow
@emulated
def test_a_damaged_remote_checkpoint_is_set_aside(store, copy, trained):
  argv = [*TINY, copy('damaged')]
  arrays = [file for file in store.files('damaged/checkpoints/14/')
            if '/d/' in file]
  for file in arrays:
    file = f'damaged/checkpoints/14/{file}'
    store.write(file, store.files(file)[''][:-20])
  output = finished(run_main(*argv, **store.env))
  assert 'it is set aside as gs://bucket/damaged/damaged/14-' in output
  assert 'resuming from step 7 of 14' in output
  found = store.files('damaged/')
  _same(found, trained[0])
  assert sum('/d/' in file for file in found if file.startswith('damaged/')
             ) == len(arrays)


@pytest.mark.slow
@emulated
def test_a_broken_remote_score_is_set_aside(store, copy, trained):
  argv = [*TINY, copy('score')]
  store.write('score/checkpoints/14/metrics/metrics', b'{"score": NaN}')
  output = finished(run_main(*argv, **store.env))
  assert 'its score is damaged' in output
  assert 'resuming from step 7 of 14' in output
  _same(store.files('score/'), trained[0])


@pytest.mark.slow
@emulated
def test_what_is_larger_than_it_may_be_is_not_read(store, copy):
  argv = [*TINY, copy('large')]
  store.write('large/checkpoints/14/progress/more', bytes(5 << 20))
  output = finished(run_main(*argv, **store.env))
  assert 'its descriptions take 5,' in output
  assert 'resuming from step 7 of 14' in output
  store.write('large/config.json', bytes(5 << 20))
  line = _one_line(run_main(*argv, **store.env), 2)
  assert '(its 5,242,880 bytes are more than the ' in line


@pytest.mark.slow
@emulated
@pytest.mark.parametrize('what', ['model/manifest.ocdbt', 'progress/metadata'])
def test_a_checkpoint_that_is_not_to_be_read_is_not_taken_for_damaged(
    what, store, copy):
  argv = [*TINY, copy('unread')]
  store.fault = lambda method, path: (
      403 if method == 'GET' and f'checkpoints/14/{what}' in path else None)
  before = store.files('unread/')
  line = _one_line(run_main(*argv, **store.env), 69)
  assert 'cannot read checkpoint 14 (' in line and 'a fault of the tes' in line
  assert store.files('unread/') == before


@pytest.mark.slow
@emulated
@pytest.mark.parametrize('what', [
    'metrics.jsonl', 'checkpoints/14/model', 'checkpoints/14/metrics/metrics',
    'events.out', 'calibration.json', 'summary.json'])
def test_a_store_that_fails_is_told_in_a_line_and_the_run_goes_on_later(
    what, store, trained):
  name = 'failed-' + what.split('/')[-1]
  argv = [*TINY, f'--workdir=gs://bucket/{name}']
  store.fault = _fault(store, name, what, 403)
  line = _one_line(run_main(*argv, **store.env), 69)
  assert 'cannot write gs://bucket/' in line and 'a fault of the test' in line
  store.fault = lambda method, path: None
  finished(run_main(*argv, **store.env))
  _same(store.files(f'{name}/'), trained[0])


@pytest.mark.slow
@emulated
def test_a_request_that_fails_for_a_moment_is_made_again(store, trained):
  seen = set()
  def fault(method, path):  # each object of a checkpoint at its first try
    path = path.partition('&ifGen')[0]
    if '/once/checkpoints/' not in path or path in seen or len(seen) > 5:
      return None
    seen.add(path)
    return 503
  store.fault = fault
  finished(run_main(*TINY, '--workdir=gs://bucket/once', **store.env))
  store.fault = lambda method, path: None
  _same(store.files('once/'), trained[0])


@pytest.mark.slow
@emulated
def test_two_processes_share_a_remote_directory(store, tmp_path):
  runs = {}
  for workdir in ('gs://bucket/two', str(tmp_path / 'two')):
    runs[workdir] = subprocess.run(
        [sys.executable, 'launch/local.py', '--processes=2', '--devices=1',
         '--', *TINY, f'--workdir={workdir}'], cwd=ROOT,
        env=environ(**store.env), capture_output=True, text=True, timeout=300,
        check=False)
    assert runs[workdir].returncode == 0, runs[workdir].stderr
  _same(store.files('two/'), tmp_path / 'two')
  assert not [name for name in store.files('two/') if name.startswith('.')]


@emulated
def test_a_second_start_in_a_bucket_is_refused(store, monkeypatch):
  for name, value in store.env.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(bucket, '_BEAT', 0.2)
  path, lost = 'gs://bucket/held/.lock', []
  with files.locked(path, lost.append):
    mine = store.files('held/')['.lock'].decode()
    assert re.match(rf'process {os.getpid()} on \S+ since 20', mine)
    monkeypatch.setattr(socket, 'gethostname', lambda: 'another')
    with pytest.raises(TransientError, match=f'gs://bucket/held is .*{mine}'):
      with files.locked(path, lost.append):
        pass
    time.sleep(0.5)  # some beats later it still holds
    assert not lost and store.files('held/')['.lock'].decode() == mine
  assert not store.files('held/')


@emulated
@pytest.mark.parametrize('who', ['process 1 on elsewhere since', 'process'])
def test_a_lock_of_a_dead_process_in_a_bucket_is_taken(
    who, store, monkeypatch):
  for name, value in store.env.items():
    monkeypatch.setenv(name, value)
  dead = subprocess.Popen(['true'])
  dead.wait()
  here = f'process {dead.pid} on {socket.gethostname()} since yesterday'
  store.write('dead/.lock', here.encode())
  start = time.monotonic()
  with files.locked('gs://bucket/dead/.lock', print):
    assert time.monotonic() - start < bucket._STALE / 2
  monkeypatch.setattr(bucket, '_STALE', 1.0)
  store.write('dead/.lock', who.encode())  # of another host: waited for
  start = time.monotonic()
  with files.locked('gs://bucket/dead/.lock', print):
    assert time.monotonic() - start > 1


@emulated
def test_one_that_stood_still_in_a_bucket_notices_that_it_is_replaced(
    store, monkeypatch):
  for name, value in store.env.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(bucket, '_BEAT', 0.2)
  told = []
  with files.locked('gs://bucket/slow/.lock', told.append):
    store.delete('slow/')
    store.write('slow/.lock', b'process 7 on another since now')
    end = time.monotonic() + 10
    while not told and time.monotonic() < end:
      time.sleep(0.05)
  assert told == [
      'gs://bucket/slow/.lock is now held by process 7 on another since now']
  assert '.lock' in store.files('slow/')  # it is not ours


REFUSED = {
    'unknown bucket': ('gs://nobody/run', {}, 'there is no bucket gs://nobody'),
    'no credentials': (
        'gs://bucket/run', {'STORAGE_EMULATOR_HOST': None, 'HOME': '/nowhere',
                            'NO_GCE_CHECK': 'true'},
        '): gcloud auth application-default login, or set GOOGLE_APPLICATION'),
    'no such credentials': (
        'gs://bucket/run', {'STORAGE_EMULATOR_HOST': None,
                            'GOOGLE_APPLICATION_CREDENTIALS': '/nowhere'},
        'gs:// needs credentials (File /nowhere was not found.): gcloud auth'),
}


@pytest.mark.slow
@emulated
@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_reached_is_refused_in_a_line(name, store):
  workdir, env, message = REFUSED[name]
  for mode in ('train', 'eval'):
    start = time.monotonic()
    process = run_main(f'--mode={mode}', f'--workdir={workdir}',
                       **store.env | env)
    assert message in _one_line(process, 2)
    assert time.monotonic() - start < 60


@pytest.mark.slow
@emulated
@pytest.mark.parametrize(('method', 'part', 'message'), [
    ('GET', '/b/bucket?', 'cannot open gs://bucket (403'),
    ('POST', '.writable', 'cannot write to gs://bucket/new (Forbidden')])
def test_missing_rights_are_told_in_a_line(
    method, part, message, store, copy):
  store.fault = lambda *request: (
      403 if request[0] == method and part in request[1] else None)
  process = run_main(*TINY, '--workdir=gs://bucket/new', **store.env)
  assert message in _one_line(process, 2)
  assert not store.files('new/')


@pytest.mark.slow
@emulated
@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_what_is_not_to_be_seen_is_not_taken_for_absent(mode, store):
  store.fault = lambda method, path: (
      403 if method == 'GET' and 'run/config.json' in path else None)
  try:
    process = run_main(f'--mode={mode}', '--workdir=gs://bucket/run',
                       **store.env)
  finally:
    store.fault = lambda method, path: None
  assert '(Forbidden: ' in _one_line(process, 69)


@pytest.mark.slow
@emulated
def test_a_store_that_is_away_is_told_within_a_minute(store):
  start = time.monotonic()
  process = run_main('--mode=eval', '--workdir=gs://bucket/run', **store.env | {
      'STORAGE_EMULATOR_HOST': 'http://127.0.0.1:9'})
  assert 'cannot reach gs://bucket (' in _one_line(process, 69)
  assert time.monotonic() - start < 60


def _modules(*argv, **env):
  """The modules that the command line imports."""
  process = subprocess.run(
      [sys.executable, '-X', 'importtime', '-m', 'flax_imdb.main', *argv],
      cwd=ROOT, env=os.environ | env, capture_output=True, check=True,
      timeout=300, text=True)
  return {line.rsplit('|', 1)[1].strip() for line in
          process.stderr.splitlines() if line.startswith('import time:')}


def test_a_local_run_imports_no_client_of_a_store(trained):
  found = _modules('--mode=eval', f'--workdir={trained[0]}')
  assert 'etils.epath' in found  # by orbax
  assert not found & {'gcsfs', 'aiohttp', 'google.auth', 'google.cloud.storage'}


@pytest.mark.slow
@emulated
def test_a_remote_run_imports_no_tensorflow_where_it_is_installed(store):
  found = _modules('--mode=eval', '--workdir=gs://bucket/run', **store.env)
  assert 'gcsfs' in found and 'tensorflow' not in found


@pytest.mark.slow
@emulated
def test_the_plain_protocol_is_spoken_and_no_listing_is_kept(store):
  program = ('from flax_imdb.storage import files; '
             'p = files.as_path("gs://bucket/run"); '
             'store = p._backend.fs(p); '
             'print(type(store), store.dircache.use_listings_cache)')
  process = subprocess.run(
      [sys.executable, '-c', program], cwd=ROOT, env=os.environ | store.env,
      capture_output=True, text=True, check=True, timeout=300)
  assert process.stdout == "<class 'gcsfs.core.GCSFileSystem'> False\n"


def test_without_gcsfs_the_fix_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  bucket._reach.cache_clear()
  with pytest.raises(UserError, match='gs:// needs gcsfs: pip install gcsfs'):
    files.as_path('gs://bucket/run')


@pytest.mark.parametrize('name', [
    's3://bucket/run', 'file:///run', 'gs://', 'gs://bucket', 'gs://bucket/',
    'gs://Bucket/run', 'gs://b/run', 'gs://bucket/a#b', 'gs://bucket/a?b',
    'gs://bucket/a*', 'gs://bucket/[a]', 'gs://bucket/../run', 'gs://bucket/.',
    'gs://bucket/a\nb', 'gs://user@bucket/run', 'a://b'])
def test_other_names_are_refused(name):
  assert files._place(name) is bucket
  with pytest.raises(UserError, match='are not supported but for gs://BUCKET'):
    files.as_path(name)


@pytest.mark.parametrize(('given', 'name'), [
    ('gs://bucket/run/', 'gs://bucket/run'),
    ('gs://my-bucket_1.org//a///b c', 'gs://my-bucket_1.org/a/b c')])
def test_a_name_is_written_in_one_way(given, name):
  assert files.absolute(given) == name


def test_only_errors_of_the_store_are_its_failures(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gcsfs', bucket)  # as if it were imported
  assert bucket.failure(OSError('Forbidden: b/x\nyou may not')) == (
      'Forbidden: b/x you may not')
  assert bucket.failure(ValueError(
      'UNAVAILABLE: CURL error Could not connect [tensorstore...]')) == (
          'UNAVAILABLE: CURL error Could not connect')
  for error in (FileNotFoundError('bucket/run'), ValueError('DATA_LOSS: crc'),
                ValueError('another'), OSError(28, 'No space left on device'),
                ValueError("PERMISSION_DENIED: x [os_error_code='13']")):
    assert bucket.failure(error) is None
  monkeypatch.delitem(sys.modules, 'gcsfs')
  assert bucket.failure(ValueError('UNAVAILABLE: x')) is None


@emulated
def test_texts_are_read_from_a_bucket_and_named_there(store, tmp_path):
  rows = [f'"text {i}",{"ab"[i % 2]}\n' for i in range(60)]
  store.write('texts/one.csv', ('text,label\n' + ''.join(rows[:30])).encode())
  store.write('texts/two.csv', ('text,label\n' + ''.join(rows[30:])).encode())
  def prepare(pattern, place='gs://bucket/texts'):
    return run_main(
        '--mode=prepare', '--config=configs/texts.py',
        f'--config.data.train_file={place}/{pattern}',
        XDG_CACHE_HOME=str(tmp_path), **store.env)
  assert 'train: 2 classes: a 30, b 30' in finished(prepare('*.csv'))
  assert 'reading' not in finished(prepare('*.csv'))
  store.write('texts/two.csv', b'text,label\nhello, you,b\n')
  message = _one_line(prepare('*.csv'), 2)
  assert 'error: gs://bucket/texts/two.csv, line 2: 3 cells' in message
  assert 'no file has a name like that' in _one_line(prepare('x*.csv'), 2)
  store.write('top.csv', ('text,label\n' + ''.join(rows)).encode())
  assert 'train: 2 classes: a 30, b 30' in finished(
      prepare('top.csv', 'gs://bucket'))
