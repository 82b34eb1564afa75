"""Tables in files, row by row: CSV, TSV, JSON lines and Parquet.

The files are a person's own, and so are their mistakes: each is a UserError
that names file and line. However large a file is, what is held of it are a row,
or some of a Parquet file, and no row may be larger than `MOST_BYTES`.
"""

from collections.abc import Iterator, Sequence
import contextlib
import csv
import gzip
import io
import json
import re
from typing import Any, BinaryIO, NoReturn
import zlib

from flax_imdb.errors import UserError
from flax_imdb.storage import files

# Of a row. JSON may take 25 times as much in memory.
MOST_BYTES = 16 << 20
_MB = f'{MOST_BYTES >> 20} MB'
SHOWN = 70  # characters of what a file holds, in a message
_SAMPLE = 1 << 20  # bytes that tell an encoding
_BATCH = 128  # rows of Parquet in memory
# What a file's name ends with, .gz or .zst left out: what is in it.
_FORMATS = {'.csv': 'csv', '.txt': 'csv', '.tsv': 'tsv', '.tab': 'tsv',
            '.jsonl': 'json', '.ndjson': 'json', '.json': 'json',
            '.parquet': 'parquet', '.pq': 'parquet'}
_PACKED = ('.gz', '.zst')
# Encodings, by iconv's names; in which smaller one most of a text can be
# written; which characters are common in it; and their least share.
_BEYOND_LATIN = (
    ('SHIFT_JIS', 'shift_jis', '[\u3041-\u30f6]', 0.2),
    ('EUC-KR', 'euc_kr', '[\uac00-\ud7a3]', 0.9),
    ('GB18030', 'gb2312', '[\u4e00-\u9fff]', 0.6),
    ('CP1251', 'cp1251', '[\u0430-\u044f\u0451]', 0.7))
# Raise it when rows are read otherwise.
VERSION = 1


def kind(path: str) -> str:
  """Which of csv, tsv, json and parquet a file is, by its name.

  Raises UserError if it is none.
  """
  name = path.lower().rpartition('/')[2]
  packed = next((x for x in _PACKED if name.endswith(x)), '')
  ending = re.search(r'\.\w+$|$', name.removesuffix(packed))
  found = _FORMATS.get(ending[0]) if ending else None
  if not found:
    raise UserError(f'{path}: what is in it its name must say: '
                    f'{", ".join(_FORMATS)}, and .gz or .zst after it')
  if found == 'parquet' and packed:
    raise UserError(f'{path}: Parquet is packed inside: unpack the file, and '
                    f'leave out {packed}')
  return found


def place(path: str, row: int) -> str:
  """Where a row is, for somebody to look there."""
  return f'{path}, {"row" if kind(path) == "parquet" else "line"} {row:,}'


def shown(text: str) -> str:
  """What a file holds, for a line on a screen: short, no control codes."""
  line = ' '.join(text[:4 * SHOWN].split())
  line = ''.join(x if x.isprintable() else '?' for x in line)
  return line if len(line) <= SHOWN else f'{line[:SHOWN - 3]}...'


def columns(path: str) -> list[str]:
  """The names of a file's columns; of JSON lines, the keys of the first one.

  Raises UserError as `read`, or if there are no rows, or two of a name.
  """
  with _opened(path) as file:
    if kind(path) == 'json':
      found = next(([*value] for _, value in _objects(path, file)), [])
    elif kind(path) == 'parquet':
      found = _parquet(file).schema_arrow.names
    else:
      found = next((cells for _, cells in _cells(path, file)), [])
  if not found:
    raise UserError(f'{path} has no rows')
  if twice := [x for x in found if x and found.count(x) > 1]:
    raise UserError(f'{place(path, 1)}: two columns are called '
                    f'{shown(twice[0])}: rename one')
  return found


def read(path: str, wanted: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
  """Reads the values of some columns, row by row, and the line of each.

  The columns are there, or UserError. Values are texts in CSV and TSV; in the
  others also None, bool, int and float. A line is that in which a row begins,
  from 1 on; of Parquet it is the row's number.

  Raises UserError for whatever is wrong with the file, and TransientError where
  a disk or a store may soon be as it was.
  """
  with _opened(path) as file:
    if kind(path) == 'json':
      for line, value in _objects(path, file):
        yield line, [_plain(path, line, key, value) for key in wanted]
    elif kind(path) == 'parquet':
      yield from _parquet_rows(path, file, wanted)
    else:
      rows = _cells(path, file)
      first, header = next(rows, (1, []))
      if not {*wanted} <= {*header}:
        raise UserError(f'{path} was written while it was read: run again')
      at = [header.index(name) for name in wanted]
      for line, cells in rows:
        if len(cells) != len(header):
          raise UserError(
              f'{place(path, line)}: {len(cells)} cells, but line {first} '
              f'names {len(header)} columns: put a text that holds the '
              'delimiter in quotes')
        yield line, [cells[i] for i in at]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
  """A file's content, unpacked; whatever can't be read is a UserError."""
  try:
    with files.opened(path) as file:
      if path.lower().endswith('.gz'):
        with gzip.GzipFile(fileobj=file) as unpacked:
          yield unpacked  # type: ignore[misc]
      elif path.lower().endswith('.zst'):
        import pyarrow as pa
        stream: Any = pa.CompressedInputStream(
            pa.PythonFile(file, mode='r'), 'zstd')
        yield io.BufferedReader(stream)  # type: ignore[misc]
      else:
        yield file
  except UserError:
    raise
  except (EOFError, zlib.error, gzip.BadGzipFile) as e:
    raise UserError(
        f'{path} is damaged ({shown(str(e))}): pack it again') from e
  except Exception as e:
    fix = 'see that it is a file that can be read'
    # What pyarrow raises: its own types, and OSErrors without a number.
    of_arrow = type(e).__module__.startswith('pyarrow') or (
        isinstance(e, OSError) and not files.os_error(e)
        and path.lower().endswith(('.zst', '.parquet', '.pq')))
    if of_arrow or isinstance(e, UnicodeDecodeError):
      raise UserError(f'{path} is damaged ({shown(str(e))}): make it '
                      'again') from e
    files.raise_failure(e, f'cannot read {path}', fix)
    raise


class _Lines:
  """The lines of a text file, UTF-8 without its mark, one after another.

  Attributes:
    number: of the line that was read last, from 1 on.
    row: the bytes of the lines since somebody emptied it.
  """

  def __init__(self, path: str, file: BinaryIO):
    self._path, self._file = path, file
    self.number, self.row = 0, bytearray()

  def __iter__(self) -> '_Lines':
    return self

  def __next__(self) -> str:
    line = self._file.readline(MOST_BYTES + 1)
    if not line:
      raise StopIteration
    if not self.number:
      line = line.removeprefix(b'\xef\xbb\xbf')
    self.number += 1
    self.row += line
    if len(self.row) > MOST_BYTES:
      begins = self.number - self.row.count(b'\n', 0, len(self.row) - 1)
      raise UserError(
          f'{place(self._path, begins)}: the row that begins here has more '
          f'than {_MB}: close the quote in it, or end its line')
    try:
      text = line.decode()
    except UnicodeDecodeError as e:
      self._refuse(line, f'the byte 0x{line[e.start]:02x}')
    if '\0' in text:
      self._refuse(line, 'a NUL byte')
    return text

  def _refuse(self, line: bytes, what: str) -> NoReturn:
    """Raises the UserError for a line that is no text; reads on a little."""
    where = f'{place(self._path, self.number)}: {what}'
    with _opened(self._path) as file:
      start = file.read(_SAMPLE)
    encoding = _encoding(start, line)
    if not encoding:
      raise UserError(f'{where} is in no text: is {self._path} a text file?')
    raise UserError(
        f'{where} is not UTF-8; {encoding} would fit: iconv -f {encoding} -t '
        f'UTF-8 FILE > NEW, and give the new file')


def _encoding(start: bytes, line: bytes) -> str | None:
  """The encoding that a text which is not UTF-8 may have, by iconv's name.

  `start` is where the file begins, `line` that which failed. What decodes is
  told apart by what it decodes to: bytes beyond ASCII stand alone between
  letters in Western Europe, and in runs elsewhere.
  """
  if start.startswith((b'\xff\xfe\0\0', b'\0\0\xfe\xff')):
    return 'UTF-32'
  if start.startswith((b'\xff\xfe', b'\xfe\xff')):
    return 'UTF-16'
  pairs = max(1, len(start) // 2)
  for name, zeros in (('UTF-16LE', start[1::2]), ('UTF-16BE', start[::2])):
    if zeros.count(0) > pairs / 4 and start.count(0) < 1.2 * zeros.count(0):
      return name
  if b'\0' in start or b'\0' in line:
    return None
  # To the end of a line, so that no character is cut.
  sample = start[:start.rfind(b'\n') + 1] + line
  runs = re.findall(rb'[\x80-\xff]+', sample)
  if sum(map(len, runs)) > 2 * len(runs):
    for name, plain, common, share in _BEYOND_LATIN:
      with contextlib.suppress(UnicodeDecodeError):
        text = re.sub(r'[\x00-\x7f]+', '', sample.decode(name))
        usual = text.encode(plain, 'ignore').decode(plain)
        if len(re.findall(common, usual)) > share * len(text):
          return name
  for name in 'CP1252', 'ISO-8859-1':
    with contextlib.suppress(UnicodeDecodeError):
      sample.decode(name)
      return name
  return None


def _cells(path: str, file: BinaryIO) -> Iterator[tuple[int, list[str]]]:
  """The rows of a CSV or TSV, the header first, and the line of each."""
  csv.field_size_limit(MOST_BYTES)
  lines = _Lines(path, file)
  first = ''
  for first in lines:
    if first.strip():
      break
    lines.row.clear()
  else:
    first = ''
  # Excel's first line may say what delimits the cells of the others.
  if told := re.fullmatch('sep=([,;\t])\\s*', first):
    lines.row.clear()
    first = next(lines, '')
    delimiter = told[1]
  else:
    delimiter = '\t' if kind(path) == 'tsv' else _delimiter(first)
  def with_first() -> Iterator[str]:
    yield first
    yield from lines
  rows = csv.reader(with_first(), delimiter=delimiter, strict=True)
  begins = lines.number
  while True:
    try:
      cells = next(rows)
    except StopIteration:
      return
    except csv.Error as e:
      line = begins + _broken(lines.row.decode(), delimiter)
      if 'new-line' in str(e):
        raise UserError(
            f'{place(path, line)}: lines end with a lone carriage return: '
            "tr '\\r' '\\n' < FILE > NEW, and give the new file") from e
      raise UserError(
          f'{place(path, line)}: a quote opens here and is not closed before '
          'the delimiter: close it, and write a quote in a text as ""') from e
    if cells:
      yield begins, cells
    lines.row.clear()
    begins = lines.number + 1


def _delimiter(header: str) -> str:
  """Which of , ; and a tab makes the most cells of a header."""
  line = header.partition('\r')[0]
  return max(',;\t', key=lambda x: len(next(csv.reader([line], delimiter=x))))


def _broken(row: str, delimiter: str) -> int:
  """In which line of a row, from 0 on, the cell begins that is no cell."""
  cell = re.compile(
      rf'(?:"(?:[^"]++|"")*+"|[^"{delimiter}\r\n][^{delimiter}\r\n]*+)?'
      rf'(?:{delimiter}|\r?\n)')
  at = 0
  while found := cell.match(row, at):
    at = found.end()
  return row.count('\n', 0, at)


def _objects(
    path: str, file: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
  """The objects of JSON lines, and the line of each."""
  lines = _Lines(path, file)
  for text in lines:
    lines.row.clear()
    if not (text := text.strip()):
      continue
    where = place(path, lines.number)
    try:
      value = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as e:
      hint = ('write one object a line, as jq -c .[] does'
              if text in ('{', '[') else 'mend it')
      raise UserError(f'{where} is not JSON ({e.msg}, column {e.colno}): '
                      f'{hint}') from e
    except (ValueError, RecursionError) as e:
      raise UserError(f'{where} is not JSON ({e}): mend it') from e
    if not isinstance(value, dict):
      raise UserError(f'{where} is JSON, but no object: write one object a '
                      'line, as jq -c .[] does')
    yield lines.number, value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):  # json would take the last
    raise ValueError('a key stands there twice')
  return found


def _plain(path: str, line: int, key: str, value: dict[str, Any]) -> Any:
  """A value of an object; UserError if it is missing or nested."""
  if key not in value:
    raise UserError(f'{place(path, line)} has no key {shown(key)}: give each '
                    'object a text and a label')
  found = value[key]
  if isinstance(found, dict | list):
    raise UserError(f'{place(path, line)}: {shown(key)} is a '
                    f'{"list" if isinstance(found, list) else "object"}: write '
                    'a text, a whole number, or true or false')
  return found


def _parquet(file: BinaryIO) -> Any:
  import pyarrow.parquet as pq
  return pq.ParquetFile(file, buffer_size=1 << 20)


def _parquet_rows(path: str, file: BinaryIO,
                  wanted: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
  import pyarrow as pa
  table = _parquet(file)
  for name in wanted:
    found = table.schema_arrow.field(name).type
    if pa.types.is_nested(found) or pa.types.is_temporal(found):
      raise UserError(
          f'{path}: column {shown(name)} is of type {shown(str(found))}: give '
          'one of texts, whole numbers or booleans')
  row = 0
  for batch in table.iter_batches(_BATCH, columns=[*wanted]):
    # In the order in which they are wanted, whatever the file's is.
    values = [batch.column(name).to_pylist() for name in wanted]
    for cells in zip(*values, strict=True):
      row += 1
      if any(isinstance(x, str) and len(x) > MOST_BYTES for x in cells):
        raise UserError(f'{place(path, row)}: a cell has more than {_MB}: '
                        'shorten it')
      yield row, [*cells]
