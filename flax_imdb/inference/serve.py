"""HTTP in, HTTP out: predictions, a page to try them on, health and metrics."""

import asyncio
from collections.abc import Awaitable, Callable
import concurrent.futures
import contextlib
import errno
import json
import math
import pathlib
import resource
import socket
import time
from typing import Any

from flax_imdb.checkpoint import run
from flax_imdb.cluster import preemption
from flax_imdb.errors import TransientError, UserError
from flax_imdb.inference import batching

try:
  from limits import RateLimitItemPerMinute
  from limits.storage import MemoryStorage
  from limits.strategies import FixedWindowRateLimiter
  import prometheus_client
  from starlette.applications import Starlette
  from starlette.exceptions import HTTPException
  from starlette.requests import ClientDisconnect, Request
  from starlette.responses import JSONResponse, Response
  from starlette.routing import Route
  import uvicorn
  from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as e:
  raise UserError(f"--mode=serve needs {e.name}: pip install '.[serve]'") from e

# Of a request. The longest review of IMDB has 14,000 characters.
MOST_BYTES, MOST_TEXTS, MOST_EXPLAINED = 1 << 18, 64, 8
_ANSWER_SECONDS = 10  # then whoever waits for an answer is told to come later
# From when a connection is made, or its last answer is sent, to when the next
# one is: who sends or reads more slowly is hung up on.
_REQUEST_SECONDS = 20
_KEEP_SECONDS = 5  # between two requests
# Connections that are listened to. As many again are told to come later when
# they have sent something, and all others are closed at once.
_MOST_CONNECTIONS = 1000
_REFUSED_SECONDS = 1
_BACKLOG = 256  # that the system keeps, and that are accepted at once
_FILES = 200  # beside those of connections
_LOOK_SECONDS = 0.1  # for a signal, while nothing is asked
_LATER = {'retry-after': '1'}

_PAGE = pathlib.Path(__file__).with_name('page')
_PATHS = {'/': 'index.html', '/docs': 'docs.html', **{
    f'/{name}': name for name in (
        'page.css', 'page.js', 'docs.js', 'icon.svg', 'openapi.json')}}
_TYPES = {'.html': 'text/html', '.css': 'text/css', '.js': 'text/javascript',
          '.svg': 'image/svg+xml', '.json': 'application/json'}
# A page loads nothing but these files, and what it shows can't do so either.
_HEADERS = [(name.encode(), value.encode()) for name, value in {
    'content-security-policy':
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        "img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'",
    'x-content-type-options': 'nosniff', 'referrer-policy': 'no-referrer',
    'cache-control': 'no-store'}.items()]

_App = Callable[[Any, Any, Any], Awaitable[None]]  # of ASGI


def serve_run(workdir: str, which: str | None, host: str, port: int,
              texts_per_minute: int, announce: Callable[[str], None]) -> None:
  """Answers HTTP with a run directory until SIGTERM or SIGINT.

  Who asks for more than so many `texts_per_minute` from one address is told to
  come later (429); 0 is any number. `announce` is told once connections are
  taken, and when what was accepted is answered. `which` and errors as of
  `run.restore`; also raises UserError if there is no such address or limit, and
  TransientError if the port is in use.
  """
  if texts_per_minute and texts_per_minute < MOST_TEXTS:
    raise UserError(
        f'--texts_per_minute={texts_per_minute}: must be at least {MOST_TEXTS}'
        ', which one request may have, or 0 for any number')
  with contextlib.closing(_bind(host, port)) as listener:
    found = run.restore(workdir, which)
    metrics, limit = _Metrics(), _Limit(texts_per_minute)
    batcher = batching.Batcher(found, metrics.batches.observe)
    batcher.warm()
    _allow_connections()
    _listen(listener)
    with preemption.deferred(look_every=1) as stop:
      host, port = listener.getsockname()[:2]
      where = f'[{host}]:{port}' if ':' in host else f'{host}:{port}'
      announce(f'step {found.step} of {workdir} answers at http://{where}, '
               'until Ctrl-C')
      _answer(listener, _application(found, batcher, limit, metrics), batcher,
              metrics, lambda: stop.signal is not None)
    announce(f'stopped by {stop.signal}; what was accepted is answered')


def _answer(listener: socket.socket, application: _App,
            batcher: batching.Batcher, metrics: '_Metrics',
            asked_to_stop: Callable[[], bool]) -> None:
  """Answers until asked to stop, and then those who came before.

  HTTP has a thread of its own; this one works for it.
  """
  server = uvicorn.Server(uvicorn.Config(
      application, http=_Connection, ws='none', loop='asyncio', lifespan='off',
      log_config=None, log_level='error', access_log=False, proxy_headers=False,
      server_header=False, backlog=_BACKLOG, timeout_keep_alive=_KEEP_SECONDS))
  metrics.watch(batcher, server)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    running = pool.submit(server.run, [listener])
    try:
      while not running.done():
        batcher.work(_LOOK_SECONDS)
        server.should_exit = asked_to_stop()
    finally:
      server.should_exit = True
  running.result()


def _bind(host: str, port: int) -> socket.socket:
  """A socket with this address, before anything takes time."""
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind, protocol)
  except (OSError, UnicodeError) as e:  # the latter of what can be no name
    raise _refused(e, host, port) from e
  try:
    # Or connections that a killed server left would hold the port for minutes.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
  except OSError as e:
    listener.close()
    raise _refused(e, host, port) from e
  return listener


def _listen(listener: socket.socket) -> None:
  try:
    listener.listen(_BACKLOG)
  except OSError as e:  # two that started together may have the same address
    raise _refused(e, *listener.getsockname()[:2]) from e


def _refused(error: OSError | UnicodeError, host: str, port: int) -> Exception:
  if getattr(error, 'errno', None) == errno.EADDRINUSE:
    return TransientError(
        f'port {port} of {host} is in use: end the process that listens there, '
        'or give another --port')
  why = getattr(error, 'strerror', None) or error
  return UserError(
      f'cannot listen at --host={host} --port={port} ({why}): give another')


def _allow_connections() -> None:
  """Raises the soft limit of open files, as far as the hard one allows."""
  # Those that are too many are closed some turns of the event loop after they
  # are accepted.
  wanted = 2 * _MOST_CONNECTIONS + 8 * _BACKLOG + _FILES
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != resource.RLIM_INFINITY and soft < wanted:
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


class _Connection(H11Protocol):
  """One that ends, whatever the other side does, and of which there are few."""

  _REFUSAL = (b'HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\n'
              b'content-type: application/json\r\ncontent-length: 41\r\n'
              b'connection: close\r\n\r\n'
              b'{"error":"too many connections are open"}')

  def connection_made(self, transport: Any) -> None:
    super().connection_made(transport)
    self._is_extra = len(self.connections) > _MOST_CONNECTIONS
    self._ends = self.loop.call_later(
        _REFUSED_SECONDS if self._is_extra else _REQUEST_SECONDS,
        transport.abort)
    if len(self.connections) > 2 * _MOST_CONNECTIONS:
      transport.abort()

  def data_received(self, data: bytes) -> None:
    if self._is_extra:
      self.transport.write(self._REFUSAL)
      self.transport.close()
    else:
      super().data_received(data)

  def on_response_complete(self) -> None:
    self._end_in(_REQUEST_SECONDS)
    super().on_response_complete()

  def connection_lost(self, exc: Exception | None) -> None:
    self._ends.cancel()  # or the connection would stay in memory till then
    super().connection_lost(exc)

  def shutdown(self) -> None:
    """Waits for no request that takes longer than an answer may."""
    self._end_in(_ANSWER_SECONDS + _REFUSED_SECONDS)
    super().shutdown()

  def _end_in(self, seconds: float) -> None:
    self._ends.cancel()
    self._ends = self.loop.call_later(seconds, self.transport.abort)


class _Metrics:
  """What Prometheus is told: figures of this process alone."""

  def __init__(self) -> None:
    self._registry = prometheus_client.CollectorRegistry()
    prometheus_client.ProcessCollector(registry=self._registry)
    self.requests = prometheus_client.Counter(
        'flax_imdb_requests', 'Requests that were answered.',
        ['path', 'status'], registry=self._registry)
    self.seconds = prometheus_client.Histogram(
        'flax_imdb_predict_seconds', 'From a request to its predictions.',
        buckets=[.0025, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10],
        registry=self._registry)
    self.batches = prometheus_client.Histogram(
        'flax_imdb_batch_texts', 'Texts that were answered together.',
        buckets=[1, 2, 4, 8, 16, 32], registry=self._registry)

  def watch(self, batcher: batching.Batcher, server: uvicorn.Server) -> None:
    """Adds what is there when it is asked for."""
    for name, what, measure in (
        ('waiting_texts', 'Texts that wait for a batch.', batcher.waiting),
        ('connections', 'Open connections.',
         lambda: len(server.server_state.connections))):
      prometheus_client.Gauge(f'flax_imdb_{name}', what,
                              registry=self._registry).set_function(measure)

  async def page(self, request: Request) -> Response:
    """The endpoint that Prometheus reads."""
    return Response(prometheus_client.generate_latest(self._registry),
                    media_type=prometheus_client.CONTENT_TYPE_LATEST)


class _Limit:
  """How much one address may ask for in a minute from its first request on."""

  def __init__(self, texts_per_minute: int):
    self._most = (RateLimitItemPerMinute(texts_per_minute)
                  if texts_per_minute else None)
    self._limiter = FixedWindowRateLimiter(MemoryStorage())

  def check(self, address: str, texts: int) -> None:
    """Counts so many texts, or raises HTTPException."""
    if self._most and not self._limiter.hit(self._most, address, cost=texts):
      ends = self._limiter.get_window_stats(self._most, address).reset_time
      raise HTTPException(
          429, f'more than {self._most.amount:,} texts in a minute',
          {'retry-after': f'{max(1, math.ceil(ends - time.time()))}'})


def _application(found: run.Run, batcher: batching.Batcher, limit: _Limit,
                 metrics: _Metrics) -> _App:
  """The ASGI application; what it answers is in page/openapi.json."""
  async def predict(request: Request) -> Response:
    start = time.perf_counter()
    texts, explained, is_list = _read_request(await _body(request))
    assert request.client  # it came over TCP
    limit.check(request.client.host, len(texts))
    try:
      futures = batcher.ask(texts, explained)
    except batching.Full:
      raise HTTPException(503, 'too many texts wait for an answer', _LATER
                          ) from None
    try:
      async with asyncio.timeout(_ANSWER_SECONDS):
        predictions = await asyncio.gather(*map(asyncio.wrap_future, futures))
    except TimeoutError:
      raise HTTPException(
          503, f'no answer in {_ANSWER_SECONDS} s', _LATER) from None
    metrics.seconds.observe(time.perf_counter() - start)
    return JSONResponse({'predictions': predictions} if is_list
                        else predictions[0])

  async def health(request: Request) -> Response:
    return JSONResponse(
        {'status': 'ok', 'step': found.step, 'labels': found.labels})

  async def mistake(request: Request, e: Exception) -> Response:
    assert isinstance(e, HTTPException)
    return JSONResponse({'error': e.detail}, e.status_code, e.headers)

  async def failure(request: Request, e: Exception) -> Response:
    return JSONResponse({'error': 'the server failed; its own output says how'},
                        500)

  async def hung_up(request: Request, e: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it

  return _measured(Starlette(
      routes=[Route('/predict', predict, methods=['POST']),
              Route('/healthz', health), Route('/metrics', metrics.page),
              *(_file(path, name) for path, name in _PATHS.items())],
      exception_handlers={HTTPException: mistake, ClientDisconnect: hung_up,
                          Exception: failure}), metrics)


def _file(path: str, name: str) -> Route:
  content = (_PAGE / name).read_bytes()
  async def endpoint(request: Request) -> Response:
    return Response(content, media_type=_TYPES[pathlib.Path(name).suffix])
  return Route(path, endpoint)


def _measured(app: Starlette, metrics: _Metrics) -> _App:
  """Adds the headers that all answers have, and counts them."""
  paths = {route.path for route in app.routes if isinstance(route, Route)}

  async def measured(scope: Any, receive: Any, send: Any) -> None:
    status = 0
    async def send_more(message: Any) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
        message = message | {'headers': [*message['headers'], *_HEADERS]}
      await send(message)
    try:
      await app(scope, receive, send_more)
    finally:
      path = scope['path'] if scope['path'] in paths else 'other'
      metrics.requests.labels(path, status).inc()
  return measured


async def _body(request: Request) -> bytes:
  """What was sent, no more of it than may be; or raises HTTPException."""
  content = b''
  async for chunk in request.stream():
    content += chunk
    if len(content) > MOST_BYTES:
      raise HTTPException(
          413, f'more than {MOST_BYTES:,} bytes: send fewer texts at a time')
  return content


def _read_request(content: bytes) -> tuple[list[str], bool, bool]:
  """Texts, whether to explain them, and whether they came as a list.

  Raises HTTPException if that is not what the content holds.
  """
  try:
    sent = json.loads(content)
  except (ValueError, RecursionError) as e:
    raise HTTPException(400, f'no JSON ({e}): send {{"text": "..."}}') from e
  def check(holds: bool, why: str) -> None:
    if not holds:
      raise HTTPException(422, why)
  check(isinstance(sent, dict) and ('text' in sent) != ('texts' in sent),
        'send an object with "text" or "texts", and not both')
  check(set(sent) <= {'text', 'texts', 'explain'},
        'send nothing but "text" or "texts", and "explain"')
  explained = sent.get('explain', False)
  check(isinstance(explained, bool), '"explain" must be true or false')
  is_list = 'texts' in sent
  texts = sent['texts'] if is_list else [sent['text']]
  check(isinstance(texts, list) and all(isinstance(x, str) for x in texts),
        '"texts" must be a list of strings' if is_list
        else '"text" must be a string')
  most = MOST_EXPLAINED if explained else MOST_TEXTS
  check(0 < len(texts) <= most, f'"texts" must have 1 to {most} texts'
        + ' if they are explained' * explained)
  try:
    ''.join(texts).encode()
  except UnicodeEncodeError:
    check(False, 'a text has half a character: send UTF-8, or \\u escapes in '
          'pairs')
  return texts, explained, is_list
