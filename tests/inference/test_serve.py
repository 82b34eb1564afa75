"""HTTP as clients meet it: answers, mistakes, limits, signals and the page."""

import concurrent.futures
import contextlib
import http.client
import importlib
import json
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import prometheus_client.parser
import pytest
from support.command import (
  ROOT,
  STRICT,
  environ,
  finished,
  run_here,
)

from flax_imdb import cli
from flax_imdb.checkpoint import run
from flax_imdb.errors import TransientError, UserError
from flax_imdb.inference import batching, predict, serve

PAGE = ROOT / 'flax_imdb' / 'inference' / 'page'
TEXTS = ['I was bored.', '', 'caf&eacute; <b>good</b>', 'هذا الفيلم رائع',
         'e\u0301te\u0301 \U0001f600 \0', '<script>alert(1)</script> bad ' * 9]


class _Server:
  """One in this process, whose batches can be held back."""

  def __init__(self, workdir):
    self.found = run.restore(str(workdir), None)
    self.sizes, self.metrics = [], serve._Metrics()
    self.batcher = batching.Batcher(self.found, self._note_batch)
    self.batcher.warm()
    self.goes_on, self.working = threading.Event(), threading.Lock()
    work = self.batcher.work
    def held_work(seconds):
      if self.goes_on.wait(seconds):
        with self.working:
          if self.goes_on.is_set():
            work(seconds)
    self.batcher.work = held_work

  def hold(self):
    """Lets no batch begin from now on, until `goes_on` is set."""
    self.goes_on.clear()
    with self.working:  # or the one that waits for a text would have it
      pass

  def _note_batch(self, size):
    self.sizes.append(size)
    self.metrics.batches.observe(size)

  @contextlib.contextmanager
  def listening(self, texts_per_minute=0):
    """Answers in a thread, and has answered all when the context ends."""
    self.sizes.clear()
    self.metrics = serve._Metrics()
    self.goes_on.set()
    listener = serve._bind('127.0.0.1', 0)
    serve._listen(listener)
    self.port = listener.getsockname()[1]
    stop = threading.Event()
    application = serve._application(
        self.found, self.batcher, serve._Limit(texts_per_minute), self.metrics)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      done = pool.submit(serve._answer, listener, application, self.batcher,
                         self.metrics, stop.is_set)
      try:
        yield self
      finally:
        self.goes_on.set()
        stop.set()
    done.result(0)

  def ask(self, method, path, body=None):
    return _ask(self.port, method, path, body)


def _ask(port, method, path, body=None, headers=()):
  """Status, headers and content, of JSON what it holds."""
  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
  with contextlib.closing(connection):
    if isinstance(body, dict):
      body = json.dumps(body).encode()
    connection.request(method, path, body, dict(headers))
    response = connection.getresponse()
    content = response.read()
    if response.getheader('content-type') == 'application/json':
      content = json.loads(content)
    return response.status, response.headers, content


def _answers(port):
  with contextlib.suppress(OSError, http.client.HTTPException):
    return _ask(port, 'POST', '/predict', {'text': 'good'})[0] == 200


@pytest.fixture(scope='module')
def warm(trained):
  return _Server(trained[0])


@pytest.fixture
def server(warm):
  with warm.listening() as server:
    yield server


def _wait(condition):
  until = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < until, 'it does not happen'
    time.sleep(0.01)


# Answers.


def test_an_answer_is_what_predict_prints(server, trained):
  for flags, more in ((), {}), (('--explain',), {'explain': True}):
    lines = [json.loads(line) for line in finished(run_here(
        '--mode=predict', f'--workdir={trained[0]}', '--json', *flags,
        stdin='\n'.join(TEXTS).encode())).splitlines()]
    status, _, several = server.ask('POST', '/predict', {'texts': TEXTS} | more)
    assert status == 200 and list(several) == ['predictions']
    for text, line, one in zip(
        TEXTS, lines, several['predictions'], strict=True):
      status, headers, alone = server.ask(
          'POST', '/predict', {'text': text} | more)
      assert status == 200
      assert headers['content-type'] == 'application/json'
      for answer in one, alone:
        answer = dict(answer)
        for name in 'probability', 'baseline', 'gap':
          if name in line:
            assert answer.pop(name) == pytest.approx(line[name], abs=3e-6)
        for got, want in zip(answer.pop('words', []), line.get('words', []),
                             strict=True):
          assert got == [*want[:2], pytest.approx(want[2], abs=3e-6)]
        assert answer == {name: x for name, x in line.items() if name not in (
            'probability', 'baseline', 'gap', 'words')}


def test_requests_that_come_together_are_one_batch(server):
  server.hold()
  texts = [f'good {"bad " * i}' for i in range(10)]
  with concurrent.futures.ThreadPoolExecutor(10) as pool:
    answers = [pool.submit(server.ask, 'POST', '/predict', {'text': text})
               for text in texts]
    _wait(lambda: server.batcher.waiting() == 10)
    server.goes_on.set()
    for text, answer in zip(texts, answers, strict=True):
      status, _, prediction = answer.result()
      assert status == 200 and prediction['text'] == text
  assert server.sizes == [10]


@pytest.mark.parametrize(('body', 'status', 'says'), [
    (b'', 400, 'no JSON'), (b'{"text": "good"', 400, 'no JSON'),
    (b'\xff', 400, 'no JSON'), (b'[' * 100_000, 400, 'no JSON'),
    (b'1' * 5000, 400, 'no JSON'), (b'null', 422, 'send an object'),
    (b'"good"', 422, 'send an object'), ({}, 422, '"text" or "texts"'),
    ({'text': 'a', 'texts': ['b']}, 422, 'not both'),
    ({'text': 1}, 422, 'must be a string'),
    ({'text': ['a']}, 422, 'must be a string'),
    ({'texts': 'a'}, 422, 'list of strings'),
    ({'texts': ['a', None]}, 422, 'list of strings'),
    ({'texts': []}, 422, '1 to 64 texts'),
    ({'texts': ['a'] * 65}, 422, '1 to 64 texts'),
    ({'texts': ['a'] * 9, 'explain': True}, 422, '1 to 8 texts'),
    ({'text': 'a', 'explain': 1}, 422, 'true or false'),
    ({'text': 'a', 'label': 'b'}, 422, 'nothing but'),
    (b'{"text": "\\ud800"}', 422, 'half a character'),
    ({'text': 'a' * (1 << 20)}, 413, 'more than 262,144 bytes')], ids=str)
def test_a_mistake_is_one_line_of_json(server, body, status, says):
  got, _, answer = server.ask('POST', '/predict', body)
  assert got == status and list(answer) == ['error']
  assert says in answer['error'] and '\n' not in answer['error']
  assert len(answer['error']) < 200
  assert server.ask('POST', '/predict', {'text': 'good'})[0] == 200


def test_what_has_no_end_is_not_read_to_its_end(server):
  """In chunks, whose size nobody says before."""
  with socket.create_connection(('127.0.0.1', server.port)) as client:
    client.settimeout(60)
    client.sendall(b'POST /predict HTTP/1.1\r\nhost: x\r\n'
                   b'transfer-encoding: chunked\r\n\r\n')
    for _ in range(5):
      client.sendall(b'10000\r\n' + b'a' * (1 << 16) + b'\r\n')
    assert client.recv(100).startswith(b'HTTP/1.1 413 ')


def test_the_largest_text_is_answered(server):
  text = 'good ' * (serve.MOST_BYTES // 5 - 10)
  status, _, answer = server.ask(
      'POST', '/predict', {'text': text, 'explain': True})
  assert status == 200 and answer['text'] == text
  assert len(answer['words']) == len(text.split())


@pytest.mark.parametrize(('method', 'path', 'status'), [
    ('GET', '/none', 404), ('GET', '/../serve.py', 404), ('POST', '/', 405),
    ('GET', '/page/page.js', 404), ('GET', '/predict', 405)])
def test_other_paths_and_methods_are_refused_in_json(
    server, method, path, status):
  got, _, answer = server.ask(method, path)
  assert got == status and list(answer) == ['error']


def test_health_says_what_answers(server):
  status, _, answer = server.ask('GET', '/healthz')
  assert status == 200
  assert answer == {'status': 'ok', 'step': server.found.step,
                    'labels': ['negative', 'positive']}


def test_metrics_are_counted(server):
  for body in {'text': 'a'}, {'texts': ['a', 'b']}, {}:
    server.ask('POST', '/predict', body)
  server.ask('GET', '/elsewhere')
  status, _, content = server.ask('GET', '/metrics')
  assert status == 200
  samples = {
      (sample.name, *sample.labels.values()): sample.value for family in
      prometheus_client.parser.text_string_to_metric_families(content.decode())
      for sample in family.samples}
  requests = 'flax_imdb_requests_total'
  assert samples[requests, '/predict', '200'] == 2
  assert samples[requests, '/predict', '422'] == 1
  assert samples[requests, 'other', '404'] == 1
  assert samples['flax_imdb_predict_seconds_count',] == 2
  assert samples['flax_imdb_batch_texts_sum',] == 3 == sum(server.sizes)
  assert samples['flax_imdb_waiting_texts',] == 0
  assert samples['flax_imdb_connections',] >= 1


# Limits.


def test_who_comes_when_too_many_wait_is_told_to_come_later(server):
  server.hold()
  waiting = server.batcher.ask(['good'] * batching.MOST_WAITING)
  status, headers, answer = server.ask('POST', '/predict', {'text': 'bad'})
  assert status == 503 and headers['retry-after'] == '1'
  assert answer == {'error': 'too many texts wait for an answer'}
  server.goes_on.set()
  for future in waiting:
    assert future.result(60)['text'] == 'good'
  assert server.ask('POST', '/predict', {'text': 'bad'})[0] == 200


def test_an_address_that_asks_for_too_much_is_told_to_come_later(warm):
  with warm.listening(texts_per_minute=serve.MOST_TEXTS) as server:
    texts = ['good'] * serve.MOST_TEXTS
    assert server.ask('POST', '/predict', {'texts': texts[1:]})[0] == 200
    status, headers, answer = server.ask('POST', '/predict', {'texts': texts})
    assert (status, answer) == (
        429, {'error': 'more than 64 texts in a minute'})
    assert 1 <= int(headers['retry-after']) <= 60
    assert server.ask('GET', '/healthz')[0] == 200
    _, _, metrics = server.ask('GET', '/metrics')
    assert b'{path="/predict",status="429"} 1.0' in metrics


def test_after_a_minute_an_address_may_ask_again(monkeypatch):
  limit, now = serve._Limit(100), time.time()
  limit.check('here', 100)
  with pytest.raises(serve.HTTPException):
    limit.check('here', 1)
  limit.check('there', 100)
  monkeypatch.setattr(time, 'time', lambda: now + 61)
  limit.check('here', 100)


@pytest.mark.parametrize('number', [-1, 1, serve.MOST_TEXTS - 1])
def test_a_limit_that_a_request_can_exceed_is_refused(number, tmp_path):
  with pytest.raises(UserError, match=f'--texts_per_minute={number}: must be '
                     'at least 64'):
    serve.serve_run(str(tmp_path), None, '127.0.0.1', 0, number, print)


def test_who_waits_too_long_is_told_so_and_not_computed(server, monkeypatch):
  monkeypatch.setattr(serve, '_ANSWER_SECONDS', 0.1)
  server.hold()
  status, headers, answer = server.ask('POST', '/predict', {'text': 'bad'})
  assert status == 503 and headers['retry-after'] == '1'
  assert answer == {'error': 'no answer in 0.1 s'}
  server.goes_on.set()
  _wait(lambda: not server.batcher.waiting())
  assert server.sizes == []


@pytest.mark.parametrize('sent', [
    b'', b'POST /predict HTTP/1.1\r\nhost: x\r\nconte',
    b'POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 20\r\n\r\n{"text"'])
def test_a_client_that_never_finishes_is_hung_up_on(server, monkeypatch, sent):
  monkeypatch.setattr(serve, '_REQUEST_SECONDS', 0.3)
  with socket.create_connection(('127.0.0.1', server.port)) as client:
    client.settimeout(60)
    client.sendall(sent)
    with contextlib.suppress(ConnectionResetError):
      assert client.recv(100) == b''
  assert server.ask('POST', '/predict', {'text': 'good'})[0] == 200


def test_a_client_that_sends_bit_by_bit_is_hung_up_on(server, monkeypatch):
  monkeypatch.setattr(serve, '_REQUEST_SECONDS', 0.3)
  with socket.create_connection(('127.0.0.1', server.port)) as client:
    client.sendall(b'GET / HTTP/1.1\r\n')
    with pytest.raises(OSError):
      for _ in range(6000):
        client.sendall(b'x: y\r\n')
        time.sleep(0.01)


def test_a_connection_is_kept_for_the_next_request(server, monkeypatch):
  begun, end_in = [], serve._Connection._end_in
  def noted(self, seconds):
    begun.append(seconds)
    end_in(self, seconds)
  monkeypatch.setattr(serve._Connection, '_end_in', noted)
  connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=60)
  with contextlib.closing(connection):
    for _ in range(3):
      connection.request('GET', '/healthz')
      response = connection.getresponse()
      assert response.status == 200 and response.read()
      sock = connection.sock
    assert connection.sock is sock is not None
  _wait(lambda: begun[:3] == [serve._REQUEST_SECONDS] * 3)  # as long again


def test_open_connections_are_bounded(server, monkeypatch):
  monkeypatch.setattr(serve, '_MOST_CONNECTIONS', 3)
  address = '127.0.0.1', server.port
  with contextlib.ExitStack() as stack:
    def connect():
      client = stack.enter_context(socket.create_connection(address))
      client.settimeout(60)
      time.sleep(0.05)  # and not before those that come after it
      return client
    clients = [connect() for _ in range(7)]
    request = b'GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n'
    with contextlib.suppress(ConnectionError):
      assert clients[6].recv(100) == b''  # at once
    clients[3].sendall(request)
    refusal = b''.join(iter(lambda: clients[3].recv(1000), b''))
    head, body = refusal.split(b'\r\n\r\n')
    assert head.startswith(b'HTTP/1.1 503 ') and b'\nretry-after: 1' in head
    assert f'content-length: {len(body)}'.encode() in head
    assert json.loads(body) == {'error': 'too many connections are open'}
    for client in clients[4:6]:  # and who sends nothing, soon
      with contextlib.suppress(ConnectionError):
        assert client.recv(100) == b''
    clients[0].sendall(request)
    assert clients[0].recv(100).startswith(b'HTTP/1.1 200 ')
  _wait(lambda: _answers(server.port))


def test_a_failure_of_the_model_is_told_and_does_not_end_it(
    server, monkeypatch, caplog):
  def fail(*args):
    raise ValueError('of the model')
  with monkeypatch.context() as patched:
    patched.setattr(predict, 'predict', fail)
    status, _, answer = server.ask('POST', '/predict', {'text': 'good'})
  assert status == 500
  assert answer == {'error': 'the server failed; its own output says how'}
  _wait(lambda: 'ValueError: of the model' in caplog.text)
  assert server.ask('POST', '/predict', {'text': 'good'})[0] == 200


# The command.


@contextlib.contextmanager
def _command(workdir, *flags):
  """(process, port) of the command once it answers."""
  with subprocess.Popen(
      [sys.executable, *STRICT, '-m', 'flax_imdb.main', '--mode=serve',
       f'--workdir={workdir}', *flags], cwd=ROOT, env=environ(),
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
    timer = threading.Timer(300, process.kill)  # or a mistake waits for ever
    timer.start()
    try:
      line = process.stdout.readline()
      where = re.search(r' answers at http://127\.0\.0\.1:(\d+), ', line)
      assert where, line + process.stderr.read()
      yield process, int(where[1])
    finally:
      timer.cancel()
      process.kill()


def _half_sent(port):
  """A client, and what it has yet to send."""
  body = b'{"text": "good film"}'
  client = socket.create_connection(('127.0.0.1', port))
  client.settimeout(60)
  client.sendall(b'POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d'
                 b'\r\n\r\n' % len(body) + body[:9])
  return client, body[9:]


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_once_what_was_accepted_is_answered(trained, number):
  with _command(trained[0], '--port=0') as (process, port):
    assert _ask(port, 'POST', '/predict', {'text': 'good'})[0] == 200
    client, rest = _half_sent(port)
    with client:
      time.sleep(0.5)  # until it is accepted
      process.send_signal(number)
      for _ in range(6000):  # until nobody else is
        with contextlib.suppress(ConnectionResetError):
          try:
            socket.create_connection(('127.0.0.1', port)).close()
          except ConnectionRefusedError:
            break
        time.sleep(0.01)
      client.sendall(rest)
      assert client.recv(100).startswith(b'HTTP/1.1 200 ')
    output, error = process.communicate()
    name = signal.Signals(number).name
    assert output == f'stopped by {name}; what was accepted is answered\n'
    assert process.returncode == 0 and error == ''


def test_killed_it_has_answered_nothing_more_and_starts_again_at_once(trained):
  with contextlib.ExitStack() as stack:
    process, port = stack.enter_context(_command(trained[0], '--port=0'))
    # Not closed by its client, it holds the port beyond the process.
    idle = stack.enter_context(socket.create_connection(('127.0.0.1', port)))
    client, rest = _half_sent(port)
    with client:
      time.sleep(0.5)
      refused = run_here(
          '--mode=serve', f'--workdir={trained[0]}', f'--port={port}')
      assert refused.returncode == TransientError.status
      assert refused.stderr == (
          f'error: port {port} of 127.0.0.1 is in use: end the process that '
          'listens there, or give another --port\n')
      process.kill()
      process.wait()
      with contextlib.suppress(ConnectionError):
        client.sendall(rest)
        assert client.recv(100) == b''
    assert idle.recv(100) == b''
    _, again = stack.enter_context(_command(trained[0], f'--port={port}'))
    assert again == port
    assert _ask(port, 'POST', '/predict', {'text': 'good'})[0] == 200


@pytest.mark.parametrize('host', [
    '192.0.2.1', 'no.such.host.invalid', '127.0.0..1'])
def test_an_address_of_another_machine_is_a_mistake(trained, host):
  process = run_here(
      '--mode=serve', f'--workdir={trained[0]}', f'--host={host}')
  assert process.returncode == 2
  assert process.stderr.startswith(
      f'error: cannot listen at --host={host} --port=8000 (')


@pytest.mark.parametrize(('argv', 'says'), [
    (['--mode=serve', '--port=65536'], '--port=65536: must be 1 to 65535'),
    (['--mode=serve', '--port=-1'], '--port=-1: must be'),
    (['--mode=serve', '--port=http'], 'invalid int value'),
    (['--mode=predict', '--port=80'], '--port is for --mode=serve'),
    (['--host=0.0.0.0'], '--host is for --mode=serve'),
    (['--texts_per_minute=99'], '--texts_per_minute is for --mode=serve')])
def test_flags_that_do_not_fit_are_refused(argv, says):
  with pytest.raises(UserError, match=says):
    cli.parse(argv)


def test_it_listens_to_this_machine_alone_unless_told():
  args, _ = cli.parse(['--mode=serve'])
  assert (args.host, args.port) == ('127.0.0.1', 8000)


@pytest.mark.parametrize('package', [
    'limits', 'prometheus_client', 'starlette.applications', 'uvicorn'])
def test_what_is_not_installed_is_named(package, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  monkeypatch.delitem(sys.modules, 'flax_imdb.inference.serve')
  with pytest.raises(UserError, match=r"pip install '\.\[serve\]'"):
    importlib.import_module('flax_imdb.inference.serve')


@pytest.mark.slow
def test_ten_thousand_connections_do_not_end_it(trained):
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if hard != resource.RLIM_INFINITY and hard < 11_000:
    pytest.skip('needs a hard limit of 11,000 open files')
  resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 11_000), hard))
  try:
    with _command(trained[0], '--port=0') as (process, port):
      with contextlib.ExitStack() as stack:
        for i in range(10_000):
          client = stack.enter_context(socket.socket())
          client.setblocking(False)
          client.connect_ex(('127.0.0.1', port))
          if i % 100 == 0:
            time.sleep(0.01)
        _wait(lambda: _answers(port))  # once all are hung up on
      process.send_signal(signal.SIGTERM)
      _, error = process.communicate()
      assert process.returncode == 0 and error == ''
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# The page.


def test_all_files_are_served_and_allowed_to_load_no_others(server):
  files = {name for name in serve._PATHS.values()}
  assert files == {file.name for file in PAGE.iterdir()}
  for path, name in serve._PATHS.items():
    status, headers, content = server.ask('GET', path)
    assert status == 200
    assert headers['content-type'].split(';')[0] == serve._TYPES[
        pathlib.Path(name).suffix]
    assert headers['x-content-type-options'] == 'nosniff'
    policy = dict(part.strip().split(' ', 1) for part in headers[
        'content-security-policy'].split(';'))
    assert policy.pop('default-src') == "'none'"
    assert set(policy.values()) <= {"'self'", "'none'"}
    assert policy['script-src'] == policy['style-src'] == "'self'"
    if name != 'openapi.json':
      assert content == (PAGE / name).read_bytes()


@pytest.mark.parametrize('name', ['index.html', 'docs.html'])
def test_a_page_has_no_script_style_or_handler_inside(name):
  text = (PAGE / name).read_text('utf-8')
  assert not re.search(r'<style|<script(?![^>]* src=)[^>]*>|\son\w+=|style=|//',
                       text)
  for script in PAGE.glob('*.js'):
    assert not re.search(r'innerHTML|outerHTML|insertAdjacent|document\.write|'
                         r'eval\(|https?:', script.read_text('utf-8'))


def test_openapi_says_what_is_so(server):
  _, _, document = server.ask('GET', '/openapi.json')
  assert set(document['paths']) == {'/predict', '/healthz', '/metrics'}
  schemas = document['components']['schemas']
  texts = schemas['Request']['properties']['texts']
  assert (texts['minItems'], texts['maxItems']) == (1, serve.MOST_TEXTS)
  assert texts['description'] == (
      f'1 to {serve.MOST_TEXTS} texts, up to {serve.MOST_EXPLAINED} to explain')
  operation = document['paths']['/predict']['post']
  assert f'{serve.MOST_BYTES:,} bytes' in (
      operation['responses']['413']['description'])
  sent = operation['requestBody']['content']['application/json']['examples']
  got = set()
  for example in sent.values():
    status, _, answer = server.ask('POST', '/predict', example['value'])
    assert status == 200
    for one in answer.get('predictions', [answer]):
      got |= set(one)
  described = schemas['Prediction']['properties']
  assert got == set(described) - {'probabilities', 'note'}
  assert set(schemas['Prediction']['required']) == {
      'label', 'probability', 'text'}
  _, _, health = server.ask('GET', '/healthz')
  assert set(health) == set(schemas['Health']['properties'])


CHROMIUM, DRIVER = shutil.which('chromium'), shutil.which('chromedriver')


@pytest.fixture
def browser():
  webdriver = pytest.importorskip('selenium.webdriver')
  if not CHROMIUM or not DRIVER:
    pytest.skip('chromium and chromedriver are not installed')
  options = webdriver.ChromeOptions()
  options.binary_location = CHROMIUM
  for flag in 'headless=new', 'no-sandbox', 'window-size=390,800':
    options.add_argument(f'--{flag}')
  options.set_capability('goog:loggingPrefs', {
      'browser': 'ALL', 'performance': 'ALL'})
  browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
  try:
    yield browser
  finally:
    browser.quit()


@pytest.mark.slow
def test_the_page_answers_while_one_types_and_runs_nothing(server, browser):
  def find(selector):
    return browser.find_elements('css selector', selector)
  def shown(selector):
    return [element.get_property('textContent') for element in find(selector)]
  browser.get(f'http://127.0.0.1:{server.port}/')
  _wait(lambda: shown('#second') == ['positive'])
  (review,) = find('#review')
  text = ('\U0001f600 I was bored. <script>document.title = "run"</script>'
          '<img src=x onerror=\'document.title="run"\'>\nnot good')
  browser.execute_script('arguments[0].focus()', review)
  review.send_keys('I ')
  _wait(lambda: shown('#label') != ['–'])
  browser.execute_script(
      "arguments[0].value = arguments[1];"
      "arguments[0].dispatchEvent(new Event('input'))", review, text)
  _wait(lambda: find('#words li') and shown('#marks') == [f'{text}\u200b']
        and find('#marks mark'))
  want = server.ask('POST', '/predict', {'text': text, 'explain': True})[2]
  # The marks are the words whose share is a tenth or more, in the same places.
  most = max(abs(score) for *_, score in want['words'])
  coloured = [(text[begin:end], 'for' if score > 0 else 'against')
              for begin, end, score in want['words']
              if abs(score) >= 0.1 * most]
  _wait(lambda: shown('#marks mark') == [word for word, _ in coloured])
  assert [mark.get_attribute('class') for mark in find('#marks mark')] == [
      kind for _, kind in coloured]
  assert shown('#label') == [want['label']]
  p = want['probability']
  percent = 100 * (p if want['label'] == 'positive' else 1 - p)
  (said,) = shown('#percent')
  assert said.endswith(' %') and float(said.strip('<> %')) == pytest.approx(
      percent, abs=1)
  assert shown('#said') == [f'{want["label"]}, {said}']
  # What is typed next to a word takes its colour alone.
  before = shown('#marks mark')
  server.hold()
  review.send_keys('x')
  assert shown('#marks mark') in (before, before[:-1])
  server.goes_on.set()
  assert not find('#marks script') and not find('#marks img')
  assert browser.title == 'How does this read?'
  # An example by the keyboard alone.
  (button, *_) = find('#choices button')
  button.send_keys('\ue007')
  _wait(lambda: review.get_property('value') == button.text)
  assert browser.execute_script(
      'return document.documentElement.scrollWidth') <= 390 + 110
  browser.get(f'http://127.0.0.1:{server.port}/docs')
  _wait(lambda: len(find('.operation')) == 3)
  assert browser.get_log('browser') == []
  urls = [params['request']['url'] for entry in browser.get_log('performance')
          if (message := json.loads(entry['message'])['message'])[
              'method'] == 'Network.requestWillBeSent'
          and (params := message['params'])]
  assert len(urls) > 5 and all(url.startswith(
      f'http://127.0.0.1:{server.port}/') for url in urls if url != 'data:,')
