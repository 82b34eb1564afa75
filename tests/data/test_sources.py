"""The data sets: prepared from a loopback server, read, and every error."""

import hashlib
import http.server
import io
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
from support import data_sets
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums, resource

from flax_imdb.data import grammar, imdb, sources
from flax_imdb.errors import TransientError, UserError

IMDB, GRAMMAR = 'imdb_reviews', 'grammar_reviews'
REAL_DIR = os.environ.get('TFDS_DATA_DIR', '')
REPO = pathlib.Path(sources.__file__).parents[1]
# (name in the archive, text, split, label); surrounding blanks are stripped.
REVIEWS = [
  ('train/pos/0_9.txt', "It's <br /><br />good.\n", 'train', 1),
  ('train/pos/1_10.txt', 'Für Élise, 映画 — lovely', 'train', 1),
  ('train/neg/0_2.txt', 'dull', 'train', 0),
  ('train/neg/1_1.txt', 'The worst.', 'train', 0),
  ('train/neg/2_1.txt', 'A bore', 'train', 0),
  ('train/unsup/0_0.txt', 'seen', 'unsupervised', -1),
  ('test/pos/0_8.txt', 'fine', 'test', 1),
  ('test/neg/0_3.txt', 'bad', 'test', 0),
]


def make_archive(reviews=REVIEWS) -> bytes:
  """Returns an aclImdb_v1.tar.gz with things in it that are not reviews."""
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode='w:gz') as archive:
    others = [('README', 'read me'), ('train/pos/urls.dat', 'http://x.invalid')]
    link = tarfile.TarInfo('aclImdb/train/pos/7_7.txt')
    link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
    archive.addfile(link)
    for name, text, *_ in others + list(reviews):
      member = tarfile.TarInfo(f'aclImdb/{name}')
      member.size = len(text.encode())
      archive.addfile(member, io.BytesIO(text.encode()))
  return file.getvalue()


ARCHIVE = make_archive()


def expected(split: str) -> set:
  return {(text.strip(), y) for _, text, s, y in REVIEWS if s == split}


def pairs(split: str) -> list:
  texts, labels = sources.read_texts(data_sets.of(IMDB), split)
  assert labels.dtype == np.int16 and labels.shape == (len(texts),)
  return list(zip(texts, labels.tolist(), strict=True))


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers as the server's `mode` says, and counts the requests."""

  def do_GET(self):
    server = self.server
    server.requests += 1
    self.send_response(404 if server.mode == 'missing' else 200)
    self.send_header('Content-Length', str(len(server.body)))
    self.end_headers()
    if server.mode == 'stalls':
      server.release.wait(10)
    sent = len(server.body) // (2 if server.mode == 'truncates' else 1)
    self.wfile.write(server.body[:sent])

  def log_message(self, *args):
    pass


@pytest.fixture(autouse=True)
def own_directories(tmp_path, monkeypatch):
  for variable in list(os.environ):
    if variable.lower().endswith('_proxy'):
      monkeypatch.delenv(variable)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


@pytest.fixture
def point_at(monkeypatch):
  """Makes both builders take `body`'s checksum and download from `url`."""

  def point(url: str, body: bytes = ARCHIVE):
    sha256 = hashlib.sha256(body).hexdigest()
    info = checksums.UrlInfo(
      tfds.core.utils.Size(len(body)), sha256, 'aclImdb_v1.tar.gz'
    )
    monkeypatch.setattr(imdb.ImdbReviews, 'url_infos', {url: info})
    monkeypatch.setattr(imdb.stock, '_DOWNLOAD_URL', url)

  return point


@pytest.fixture
def server(point_at):
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
    httpd.mode, httpd.body, httpd.requests = 'works', ARCHIVE, 0
    httpd.release = threading.Event()
    httpd.url = f'http://127.0.0.1:{httpd.server_port}/aclImdb_v1.tar.gz'
    point_at(httpd.url)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    yield httpd
    httpd.release.set()
    httpd.shutdown()
    thread.join()


def prepare(name: str = IMDB) -> list[str]:
  lines = []
  sources.prepare(data_sets.of(name), lines.append)
  return lines


def error_of(call, *args, kind=UserError) -> str:
  with pytest.raises(kind) as caught:
    call(*args)
  message = str(caught.value)
  assert '\n' not in message
  return message


def files_below(path: pathlib.Path) -> list[str]:
  return sorted(file.name for file in path.rglob('*') if file.is_file())


def test_imdb_is_downloaded_once_and_read(server, capfd):
  assert sources.fingerprint(data_sets.of(IMDB)) is None
  lines = prepare()
  assert [line.split()[0] for line in lines] == ['downloading', 'prepared']
  assert server.url in lines[0] and f'{IMDB} in ' in lines[1]
  assert prepare() == [] and server.requests == 1
  for split in ('train', 'test', 'unsupervised'):
    assert set(pairs(split)) == expected(split)
  assert capfd.readouterr() == ('', '')


def test_each_chunk_of_the_archive_and_each_text_of_it_is_counted(server):
  told = []
  sources.prepare(
      data_sets.of(IMDB), print, lambda *words: told.append(words))
  size = imdb.ImdbReviews.url_infos.popitem()[1].size
  downloaded = [done for what, done, n in told if what == 'downloading'
                and n == size]
  assert downloaded[-1] == len(ARCHIVE) and len(set(downloaded)) == len(
      downloaded)
  assert told[len(downloaded):] == [
      ('preparing texts', i + 1, 100_000) for i in range(len(REVIEWS))]


def test_splits_are_slices_of_one_order(server):
  prepare()
  whole = pairs('train')
  assert pairs('train[:40%]') == whole[:2]
  assert pairs('train[2:]') == whole[2:]
  assert pairs('train[-1:]+test[:1]') == whole[-1:] + pairs('test')[:1]


def test_stock_tfds_reads_our_directory_in_the_same_order(server):
  prepare()
  stock = tfds.builder(IMDB, data_dir=sources.data_dir(IMDB))
  examples = list(stock.as_data_source('train'))
  assert [(e['text'].decode(), e['label']) for e in examples] == pairs('train')


def test_the_address_and_checksum_are_the_official_ones():
  stock = imdb.stock
  assert imdb.ImdbReviews.url_infos == stock.Builder.url_infos
  ((url, info),) = stock.Builder.url_infos.items()
  assert url == stock._DOWNLOAD_URL
  assert (info.size, info.filename) == (84_125_825, 'aclImdb_v1.tar.gz')
  builder = imdb.ImdbReviews(data_dir=sources.data_dir(IMDB))
  path = builder.data_path.relative_to(sources.data_dir(IMDB))
  assert str(path) == sources.PATHS[IMDB]
  assert 'Large Movie Review' in builder.info.description


def test_an_archive_put_there_by_hand_needs_no_network(point_at):
  point_at('http://127.0.0.1:1/aclImdb_v1.tar.gz')
  manual = sources.data_dir(IMDB) / 'downloads' / 'manual'
  manual.mkdir(parents=True)
  archive = manual / 'aclImdb_v1.tar.gz'
  archive.write_bytes(ARCHIVE[:-9])
  message = error_of(prepare)
  assert str(archive) in message and 'delete it' in message
  archive.write_bytes(ARCHIVE)
  assert len(prepare()) == 1
  assert set(pairs('test')) == expected('test')


def test_a_download_of_stock_tfds_needs_no_network(point_at):
  url = 'http://127.0.0.1:1/aclImdb_v1.tar.gz'
  point_at(url)
  info = imdb.ImdbReviews.url_infos[url]
  folder = tfds.core.Path(sources.data_dir(IMDB) / 'downloads' / IMDB)
  folder.mkdir(parents=True)
  cached = folder / resource.get_dl_fname(url, info.checksum)
  cached.write_bytes(ARCHIVE)
  resource.write_info_file(
    url, cached, IMDB, original_fname=info.filename, url_info=info
  )
  assert len(prepare()) == 1
  assert set(pairs('test')) == expected('test')


@pytest.mark.parametrize(
  'mode, says',
  [
    ('truncates', 'closed after'),
    ('missing', '404'),
    ('stalls', 'timed out'),
    ('other', 'another file'),
  ],
)
def test_a_failed_download_leaves_nothing_behind(
  server, monkeypatch, mode, says
):
  monkeypatch.setattr(imdb, '_STALL_SECONDS', 0.3)
  server.mode = mode
  if mode == 'other':
    server.body = ARCHIVE[:-1] + b'!'
  # What the network lost may come again; another file comes again, too.
  message = error_of(
    prepare, kind=UserError if mode == 'other' else TransientError
  )
  assert says in message and 'quickstart' in message and server.url in message
  assert files_below(sources.data_dir(IMDB)) == []
  assert sources.fingerprint(data_sets.of(IMDB)) is None
  server.mode, server.body = 'works', ARCHIVE
  prepare()
  assert set(pairs('train')) == expected('train')


def test_no_network_is_said_at_once(point_at):
  point_at('http://127.0.0.1:1/aclImdb_v1.tar.gz')
  start = time.perf_counter()
  message = error_of(prepare, kind=TransientError)
  assert time.perf_counter() - start < 3
  for word in ('127.0.0.1:1', 'refused', 'TFDS_DATA_DIR', 'manual', 'quick'):
    assert word in message


def test_a_name_server_that_hangs_is_not_waited_for(point_at, monkeypatch):
  point_at('http://reviews.invalid/aclImdb_v1.tar.gz')
  hang = threading.Event()

  def connect(*args, **kwargs):
    hang.wait(10)
    raise OSError('no such host')

  monkeypatch.setattr(imdb.socket, 'create_connection', connect)
  monkeypatch.setattr(imdb, '_PROBE_SECONDS', 0.2)
  assert 'no answer in 0.2 s' in error_of(prepare, kind=TransientError)
  hang.set()


def test_a_proxy_is_probed_in_place_of_the_host(server, point_at, monkeypatch):
  point_at('http://reviews.invalid/aclImdb_v1.tar.gz')
  monkeypatch.setenv('HTTP_PROXY', f'127.0.0.1:{server.server_port}')
  monkeypatch.setenv('http_proxy', f'http://127.0.0.1:{server.server_port}')
  prepare()
  assert server.requests == 1
  assert set(pairs('train')) == expected('train')


@pytest.mark.parametrize('proxy', [
    'http://127.0.0.1:port', 'http://127.0.0.1:65536', 'http://[::1',
    'http://alice:s3/cret@127.0.0.1:80'])
def test_a_proxy_that_is_no_address_is_named(
    proxy, server, point_at, monkeypatch):
  point_at('http://reviews.invalid/aclImdb_v1.tar.gz')
  for variable in 'HTTP_PROXY', 'http_proxy':
    monkeypatch.setenv(variable, proxy)
  message = error_of(prepare)
  assert 'what http_proxy is in the environment is no address' in message
  assert 's3' not in message  # of a password


# Named, for the archive holds the second in which a worker made it, and workers
# that differ in a test's name run none.
@pytest.mark.parametrize('body', [ARCHIVE[:200], b'not an archive' * 99],
                         ids=['cut off', 'none'])
def test_a_damaged_archive_is_named(server, point_at, body):
  server.body = body
  point_at(server.url, body)  # so that its checksum is right
  message = error_of(prepare)
  assert 'aclImdb_v1.tar.gz is damaged' in message and 'delete it' in message
  assert sources.fingerprint(data_sets.of(IMDB)) is None
  assert not list(sources.data_dir(IMDB).rglob('*incomplete*'))


@pytest.mark.parametrize(
  'name, variable', [(IMDB, 'TFDS_DATA_DIR'), (GRAMMAR, 'XDG_CACHE_HOME')]
)
def test_a_directory_that_cannot_be_written(
  tmp_path, monkeypatch, server, name, variable
):
  (tmp_path / 'file').touch()  # root may write everywhere but below a file
  monkeypatch.setenv(variable, str(tmp_path / 'file' / 'below'))
  message = error_of(prepare, name)
  assert 'Not a directory' in message and f'set {variable}' in message
  assert server.requests == 0


def test_a_directory_in_the_cloud(monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', 'gs://bucket/tfds')
  assert 'local directory' in error_of(sources.data_dir, IMDB)


def test_the_default_directories(monkeypatch):
  monkeypatch.delenv('TFDS_DATA_DIR')
  monkeypatch.delenv('XDG_CACHE_HOME')
  home = pathlib.Path.home()
  assert sources.data_dir(IMDB) == home / 'tensorflow_datasets'
  assert sources.data_dir(GRAMMAR) == home / '.cache' / 'flax_imdb' / 'tfds'


def test_unknown_names_and_splits(server):
  assert sources.fingerprint(data_sets.of('imbd_reviews')) is None
  message = error_of(sources.prepare, data_sets.of('imbd_reviews'), print)
  assert 'imbd_reviews is not in' in message
  assert '--mode=prepare' in error_of(
    sources.read_texts, data_sets.of(IMDB), 'train'
  )
  prepare()
  for split in ('dev', 'train[', 'train[:200%]', ''):
    message = error_of(sources.read_texts, data_sets.of(IMDB), split)
    assert repr(split) in message and 'train, test, unsupervised' in message
  for split in ('train[:0]', 'train[4:2]'):
    assert 'no reviews' in error_of(
      sources.read_texts, data_sets.of(IMDB), split
    )


def test_what_a_killed_process_leaves_is_no_obstacle(server):
  path = sources.data_dir(IMDB) / sources.PATHS[IMDB]
  left = path.with_name(f'incomplete.ABC123_{path.name}')
  left.mkdir(parents=True)
  (left / 'dataset_info.json').write_text('{')
  manual = sources.data_dir(IMDB) / 'downloads' / 'manual'
  manual.mkdir(parents=True)
  (manual / 'incomplete.0123').write_bytes(ARCHIVE[:50])
  prepare()
  assert set(pairs('train')) == expected('train')


def test_a_half_copied_directory_is_named(server):
  prepare()
  path = sources.data_dir(IMDB) / sources.PATHS[IMDB]
  (path / 'features.json').unlink()
  for call, args in [
    (sources.fingerprint, ()),
    (sources.prepare, (print,)),
    (sources.read_texts, ('train',)),
  ]:
    message = error_of(call, data_sets.of(IMDB), *args)
    assert str(path) in message and 'delete it' in message


def test_a_damaged_array_record_is_named(server):
  prepare()
  path = sources.data_dir(IMDB) / sources.PATHS[IMDB]
  (file,) = path.glob('*-train.array_record*')
  os.truncate(file, 100)
  message = error_of(sources.read_texts, data_sets.of(IMDB), 'train')
  assert str(path) in message and 'delete it' in message
  assert set(pairs('test')) == expected('test')


def crc32c(data: bytes) -> int:
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
  crc = crc32c(data)
  rotated = (crc >> 15 | crc << 17) + 0xA282EAD8
  return struct.pack('<I', rotated & 0xFFFFFFFF)


def to_tfrecord(path: pathlib.Path) -> None:
  """Rewrites a prepared directory as stock tfds with TensorFlow writes it.

  'train' gets two files, so that slices cross from one to the other.
  """
  builder = tfds.builder_from_directory(path)
  info = json.loads((path / 'dataset_info.json').read_text())
  features = builder.info.features
  for split in info['splits']:
    name = split['name']
    records = [
      features.serialize_example(features.encode_example(example))
      for example in builder.as_data_source(name)
    ]
    shards = [records[:2], records[2:]] if name == 'train' else [records]
    split['shardLengths'] = [str(len(shard)) for shard in shards]
    for i, shard in enumerate(shards):
      file = f'{IMDB}-{name}.tfrecord-{i:05}-of-{len(shards):05}'
      with (path / file).open('wb') as out:
        for record in shard:
          length = struct.pack('<Q', len(record))
          out.write(length + masked(length) + record + masked(record))
  for old in path.glob('*.array_record*'):
    old.unlink()
  info['fileFormat'] = 'tfrecord'
  (path / 'dataset_info.json').write_text(json.dumps(info))


SPLITS = (
  'train',
  'test',
  'unsupervised',
  'train[:40%]',
  'train[1:4]',
  'train[3:]+test',
)


def test_tfrecord_reads_like_array_record(server):
  assert masked(b'123456789') == struct.pack(  # CRC-32C's check value
    '<I', ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF
  )
  prepare()
  before = [pairs(split) for split in SPLITS]
  to_tfrecord(sources.data_dir(IMDB) / sources.PATHS[IMDB])
  assert [pairs(split) for split in SPLITS] == before
  assert prepare() == [], 'a directory in the other format is prepared too'
  assert "'dev'" in error_of(sources.read_texts, data_sets.of(IMDB), 'dev')


@pytest.mark.parametrize(
  'cut', ['in a record', 'in a length', 'between', 'gone']
)
def test_a_damaged_tfrecord_is_named(server, cut):
  prepare()
  path = sources.data_dir(IMDB) / sources.PATHS[IMDB]
  to_tfrecord(path)
  (file,) = path.glob('*-train.tfrecord-00000*')
  first = 16 + struct.unpack('<Q', file.read_bytes()[:8])[0]
  size = {'in a record': first - 5, 'in a length': first + 5, 'between': first}
  if cut == 'gone':
    file.unlink()
  else:
    os.truncate(file, size[cut])
  message = error_of(sources.read_texts, data_sets.of(IMDB), 'train')
  assert file.name in message and 'damaged' in message and 'delete' in message


def test_nothing_imports_tensorflow(server, tmp_path):
  """A fake tensorflow that cannot be imported proves it, for both formats."""
  fake = tmp_path / 'fake' / 'tensorflow' / '__init__.py'
  fake.parent.mkdir(parents=True)
  fake.write_text("raise RuntimeError('tensorflow was imported')\n")
  prepare()
  root = sources.data_dir(IMDB)
  shutil.copytree(root / 'downloads', tmp_path / 'new' / 'downloads')
  shutil.copytree(root / IMDB, tmp_path / 'tfrecord' / IMDB)
  to_tfrecord(tmp_path / 'tfrecord' / sources.PATHS[IMDB])
  # The child has to take our archive's checksum for the official one.
  ((url, info),) = imdb.ImdbReviews.url_infos.items()
  code = f"""if True:
    import os, sys
    from flax_imdb.data import grammar, imdb, sources
    from tensorflow_datasets.core.download.checksums import UrlInfo
    imdb.stock._DOWNLOAD_URL = {url!r}
    imdb.ImdbReviews.url_infos = {{
        {url!r}: UrlInfo({int(info.size)}, {info.checksum!r}, {info.filename!r})
    }}
    os.environ['TFDS_DATA_DIR'] = {str(tmp_path / 'new')!r}
    from flax_imdb.config import packaged
    data = packaged('default').data
    sources.prepare(data, print)
    texts, _ = sources.read_texts(data, 'train')
    os.environ['TFDS_DATA_DIR'] = {str(tmp_path / 'tfrecord')!r}
    assert sources.read_texts(data, 'train')[0] == texts
    data.name = 'grammar_reviews'
    sources.prepare(data, print)
    assert 'tensorflow' not in sys.modules
  """
  path = f'{fake.parents[1]}{os.pathsep}{REPO}'
  child = subprocess.run(
    [sys.executable, '-W', 'error', '-c', code],
    check=False,
    env=os.environ | {'PYTHONPATH': path},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert child.returncode == 0, child.stderr
  assert child.stderr == '' and len(child.stdout.splitlines()) == 2


def test_a_fingerprint_needs_no_tfds_and_follows_the_data(server):
  code = (
    'import sys; from flax_imdb.config import packaged;'
    'from flax_imdb.data import sources;'
    "sources.fingerprint(packaged('default').data);"
    "sys.exit('tensorflow_datasets' in sys.modules)"
  )
  subprocess.run([sys.executable, '-c', code], check=True, cwd=REPO, timeout=60)
  prepare()
  path = sources.data_dir(IMDB) / sources.PATHS[IMDB]
  seen = {sources.fingerprint(data_sets.of(IMDB)) for _ in range(2)}
  assert len(seen) == 1 and None not in seen
  with (path / 'dataset_info.json').open('a') as info:
    info.write(' ')
  seen.add(sources.fingerprint(data_sets.of(IMDB)))
  (file,) = path.glob('*-test.array_record*')
  file.rename(path / 'other')
  seen.add(sources.fingerprint(data_sets.of(IMDB)))
  os.truncate(path / 'other', 100)
  seen.add(sources.fingerprint(data_sets.of(IMDB)))
  assert len(seen) == 4


def test_grammar_reviews_are_generated(monkeypatch, capfd):
  monkeypatch.setattr(
    grammar,
    'generate',
    lambda seed, n: ((f'review {seed} {i}', i % 2) for i in range(n)),
  )
  assert len(prepare(GRAMMAR)) == 1
  assert capfd.readouterr() == ('', '')
  numbers = {}
  for split, n in [('train', 4_000), ('test', 1_000)]:
    texts, labels = sources.read_texts(data_sets.of(GRAMMAR), split)
    assert len(texts) == n
    numbers[split] = [int(text.removeprefix('review 0 ')) for text in texts]
    np.testing.assert_array_equal(labels, np.array(numbers[split]) % 2)
  assert set(numbers['train']) == set(range(4_000))
  assert set(numbers['test']) == set(range(4_000, 5_000))
  assert 'train, test,' in error_of(
    sources.read_texts, data_sets.of(GRAMMAR), 'unsupervised'
  )


def test_the_real_grammar_is_what_is_prepared():
  prepare(GRAMMAR)
  texts, labels = sources.read_texts(data_sets.of(GRAMMAR), 'train+test')
  generated = set(grammar.generate(seed=0, n=5_000))
  assert set(zip(texts, labels.tolist(), strict=True)) == generated


def test_the_slower_of_two_processes_uses_the_work_of_the_faster(monkeypatch):
  """The faster one finishes while the slower one generates its examples."""
  lines = []

  def generate(seed, n):
    monkeypatch.setattr(grammar, 'generate', quick)
    lines.extend(prepare(GRAMMAR))
    return quick(seed, n)

  def quick(seed, n):
    return [(f'review {i}', i % 2) for i in range(n)]

  monkeypatch.setattr(grammar, 'generate', generate)
  assert prepare(GRAMMAR) == [] and len(lines) == 1
  assert len(sources.read_texts(data_sets.of(GRAMMAR), 'test')[0]) == 1_000
  path = sources.data_dir(GRAMMAR) / sources.PATHS[GRAMMAR]
  assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.slow
@pytest.mark.skipif(
  not (pathlib.Path(REAL_DIR) / sources.PATHS[IMDB]).is_dir() or not REAL_DIR,
  reason='TFDS_DATA_DIR holds no imdb_reviews',
)
def test_the_real_imdb(monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', REAL_DIR)
  assert prepare() == []
  for split in ('train', 'test'):
    texts, labels = sources.read_texts(data_sets.of(IMDB), split)
    assert len(texts) == 25_000 and labels.sum() == 12_500
    assert set(labels.tolist()) == {0, 1} and min(map(len, texts)) > 10
