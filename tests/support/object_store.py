"""A Google Cloud Storage of this machine, for tests: gs:// without a network.

The package gcp-storage-emulator answers the JSON API that gcsfs, TensorStore
and google-cloud-storage speak. It takes no notice of preconditions, by which
TensorStore sees whether another has written; these are added here, and faults.
"""

from collections.abc import Callable
import functools
from http.server import ThreadingHTTPServer
import io
import json
import logging
import re
import threading
import urllib.parse
import urllib.request

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage

BUCKET = 'bucket'
logging.getLogger('gcp_storage_emulator').setLevel(logging.CRITICAL)


class ObjectStore:
  """A context manager: the store listens while it lasts.

  Attributes:
    env: makes the clients talk to it.
    fault: takes a method and a request's path and query, unquoted; returns the
      status to fail with, or None. Assign to it.
    faults: the requests that failed by it.
  """

  def __init__(self):
    self._storage = Storage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, self._storage)
    self.fault: Callable[[str, str], int | None] = lambda method, path: None
    self.faults: list[str] = []
    self._server = _Server(
        ('127.0.0.1', 0), functools.partial(_Handler, self))
    url = f'http://127.0.0.1:{self._server.server_port}'
    self.env = {
        'STORAGE_EMULATOR_HOST': url, 'TENSORSTORE_GCS_HTTP_URL': url,
        'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none'}  # or TensorStore looks for one
    self.lock = threading.Lock()

  def __enter__(self):
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *error):
    self._server.shutdown()
    self._server.server_close()

  def files(self, under=''):
    """{name: bytes} of what the bucket holds below a directory."""
    with self.lock:
      return {
          name.removeprefix(under): self._storage.get_file(BUCKET, name)
          for name in sorted(self._storage.objects.get(BUCKET, {}))
          if name.startswith(under)}

  def write(self, name, content):
    """Writes an object, as a client does."""
    url = (f'{self.env["STORAGE_EMULATOR_HOST"]}/upload/storage/v1/b/{BUCKET}/o'
           f'?uploadType=media&name={urllib.parse.quote(name, safe="")}')
    urllib.request.urlopen(url, data=content).close()

  def delete(self, under):
    """Deletes all objects whose name begins so."""
    for name in self.files(under):
      self._storage.delete_file(BUCKET, under + name)

  def generation(self, name):
    """The generation of an object, '0' where there is none."""
    about = self._storage.objects.get(BUCKET, {}).get(name, {})
    return about.get('generation', '0')


class _Server(ThreadingHTTPServer):

  def handle_error(self, request, client_address):
    """gcsfs asks two things at once and hangs up on the slower answer."""


class _Handler(server.RequestHandler):
  """Answers a request; all before it are answered."""

  def __init__(self, store, *args):
    self._store = store
    self._generation = ''
    super().__init__(store._storage, *args)

  def parse_request(self):
    """Looks at a request before the emulator does."""
    if not super().parse_request():
      return False
    parsed = urllib.parse.urlparse(self.path)
    query = urllib.parse.parse_qs(parsed.query)
    name = urllib.parse.unquote(parsed.path.partition('/o/')[2])
    name = query.get('name', [name])[0]
    if query.get('uploadType') == ['multipart']:  # it is in the body
      body = self.rfile.read(int(self.headers['Content-Length']))
      self.rfile = io.BytesIO(body)
      name = json.loads(re.search(rb'{.*}', body)[0])['name']
    with self._store.lock:
      self._generation = self._store.generation(name)
    status = self._store.fault(self.command, urllib.parse.unquote(self.path))
    if status:
      self._store.faults.append(self.path)
    elif name and query.get('ifGenerationMatch', [self._generation]) != [
        self._generation]:
      status = 412
    elif self._generation != '0' and (
        query.get('ifGenerationNotMatch') == [self._generation]):
      status = 304
    if not status:
      return True
    self.rfile.read(int(self.headers.get('Content-Length') or 0))
    self.send_response(status)
    content = b'' if status == 304 else json.dumps({'error': {
        'code': status, 'message': 'a fault of the test'}}).encode()
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    self.wfile.write(content)
    self.wfile.flush()
    return False

  def end_headers(self):
    if self.command == 'GET':
      self.send_header('x-goog-generation', self._generation)
    super().end_headers()

  def do_GET(self):
    with self._store.lock:
      super().do_GET()

  def do_POST(self):
    with self._store.lock:
      super().do_POST()

  def do_PUT(self):
    with self._store.lock:
      super().do_PUT()

  def do_DELETE(self):
    with self._store.lock:
      super().do_DELETE()
