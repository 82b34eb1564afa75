"""A person's own files: found, counted, held out, written, or refused."""

import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import pathlib
import random
import re
import shutil
import tempfile

from hypothesis import example, given, settings, strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import data_sets
from support.command import ROOT, finished, run_main

from flax_imdb.data import sources, tables, texts
from flax_imdb.data.reviews import load_splits, training_tokenizer
from flax_imdb.errors import UserError

# Of two classes, and long enough that some are in each share.
ROWS = [(f'Das ist der {i}. Film, "schön" und groß', 'gut' if i % 2 else 'übel')
        for i in range(60)]


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.chdir(tmp_path)


def of(train_file, **fields):
  """config.data of files, as configs/texts.py has it."""
  return data_sets.of('files', train_file=str(train_file),
                      validation_by='text', **fields)


def table(rows, header=('text', 'label'), **fmt) -> bytes:
  """A CSV of rows, as Python writes it."""
  file = io.StringIO(newline='')
  csv.writer(file, **fmt).writerows([header, *rows])
  return file.getvalue().encode()


def parquet(**columns) -> bytes:
  file = io.BytesIO()
  pq.write_table(pa.table(columns), file)
  return file.getvalue()


def prepared(data) -> list[str]:
  """What is announced when a data set is prepared."""
  lines = []
  assert sources.prepare(data, lines.append) == sources.fingerprint(data)
  return lines


def pairs(data, *splits) -> list[tuple[str, str]]:
  """All texts and names of labels in some splits."""
  names = sources.class_names(data)
  return [(text, names[label]) for split in splits for text, label in zip(
      *sources.read_texts(data, split), strict=True)]


def error_of(data) -> str:
  """The line in which a data set is refused; nothing may be left then."""
  with pytest.raises(UserError) as caught:
    sources.prepare(data, lambda line: None)
  left = [x for x in pathlib.Path('cache').rglob('*') if 'files-' in str(x)]
  assert not left
  message = str(caught.value)
  assert '\n' not in message and message.isprintable()
  return message


# Files that are right.

CSV = table(ROWS)
OBJECTS = '\n'.join(json.dumps(
    {'Review': t, 'id': i, 'Sentiment': y}, ensure_ascii=bool(i % 2))
    for i, (t, y) in enumerate(ROWS)).encode()
COLUMNS = {'review': [t for t, _ in ROWS], 'stars': [y for _, y in ROWS]}


@pytest.mark.parametrize('name, content', {
    'a.csv': CSV, 'A.CSV': CSV, 'a.txt': CSV,
    'semicolon.csv': table(ROWS, delimiter=';'),
    'said.csv': b'\xef\xbb\xbfsep=;\r\n' + table(ROWS, delimiter=';'),
    'tab.csv': table(ROWS, delimiter='\t'),
    'a.tsv': table(ROWS, delimiter='\t'),
    'a.b.csv.gz': gzip.compress(CSV[:700]) + gzip.compress(CSV[700:]),
    'a.csv.zst': pa.compress(CSV, 'zstd', asbytes=True) * 1,
    'mark.csv': b'\xef\xbb\xbf' + CSV,
    'unix.csv': table(ROWS, lineterminator='\n'),
    'blank.csv': b'\n\r\n' + CSV.replace(b'\r\n', b'\r\n\r\n'),
    'no end.csv': CSV.rstrip(),
    'quoted.csv': table(ROWS, quoting=csv.QUOTE_ALL),
    'a.jsonl': OBJECTS, 'a.json': OBJECTS + b'\n\n', 'a.ndjson': OBJECTS,
    'a.jsonl.gz': gzip.compress(OBJECTS),
    'a.parquet': parquet(**COLUMNS),
    'words.parquet': parquet(**{
        'stars': pa.array(COLUMNS['stars']).dictionary_encode(),
        'review': pa.array(COLUMNS['review'], pa.large_string())}),
}.items())
def test_every_format_is_read(name, content):
  pathlib.Path(name).write_bytes(content)
  data = of(name)
  prepared(data)
  assert sorted(pairs(data, 'train', 'test')) == sorted(ROWS)
  assert sources.class_names(data) == ('gut', 'übel')


def test_what_was_found_is_said_before_anything_is_written(monkeypatch):
  rows = [*ROWS, ROWS[3], ('', 'gut'), (' ', 'übel'), ('', ''),
          ('so so', 'gut'), ('so so', 'übel'), ('so so', 'gut')]
  pathlib.Path('a.csv').write_bytes(
      table([(i, y, t) for i, (t, y) in enumerate(rows)],
            ('id', 'Label', 'Review')))
  written = []
  build = texts.builder
  monkeypatch.setattr(texts, 'builder', lambda data, found: (
      written.extend(lines), build(data, found))[1])
  lines = []
  sources.prepare(of('a.csv'), lines.append)
  assert lines[:len(written)] == written and len(written) == 7
  assert lines[0].endswith(
      'a.csv: text is Review, label is Label; the first rows:')
  assert lines[1:4] == [f'  {y}: {t}' for t, y in ROWS[:3]]
  assert lines[4] == ('train: 67 rows; left out: 3 without a text, 1 repeated, '
                      '3 whose text has two labels')
  assert lines[5] == 'train: 2 classes: gut 30, übel 30'
  assert lines[6].startswith('held out to test by a hash of the text: ')
  assert sorted(pairs(of('a.csv'), 'train', 'test')) == sorted(ROWS)


def test_rows_are_counted_while_they_are_read_and_written():
  pathlib.Path('a.csv').write_bytes(table([*ROWS, ('', 'gut')]))
  told, n = [], len(ROWS)
  sources.prepare(of('a.csv'), print, lambda *words: told.append(words))
  assert told == [*(('reading train', i, 0) for i in range(1, n + 2)),
                  *(('preparing texts', i, n) for i in range(1, n + 1))]


def test_what_a_strangers_file_shows_is_one_line_without_control_characters():
  rows = [('\x1b[31m red\n\x07' + 'x' * 99, 'a'), *ROWS]
  pathlib.Path('a.csv').write_bytes(table(rows))
  line = prepared(of('a.csv'))[1]
  assert line.isprintable() and len(line) == len('  a: ') + 70


@pytest.mark.parametrize('labels, names', [
    ((10, 9, -1), ('-1', '9', '10')), (('b', 'Ä', '10'), ('10', 'b', 'Ä')),
    ((True, False), ('false', 'true'))])
def test_names_are_sorted_numbers_by_their_size(labels, names):
  rows = [(f'text {i}', labels[i % len(labels)]) for i in range(60)]
  pathlib.Path('a.jsonl').write_text('\n'.join(
      json.dumps({'text': t, 'label': y}) for t, y in rows))
  pathlib.Path('a.csv').write_bytes(table(
      [(t, json.dumps(y).strip('"') if y in (True, False) else y)
       for t, y in rows]))
  for name in 'a.jsonl', 'a.csv':
    prepared(of(name))
    assert sources.class_names(of(name)) == names
    found = dict(pairs(of(name), 'train', 'test'))
    assert found['text 0'] == json.dumps(labels[0]).strip('"') or (
        found['text 0'] == labels[0])


@pytest.mark.parametrize('header, rows, fields, text, name', [
    (('x', 'y'), [('gut', 'ein Film'), ('gut', 'noch einer'), ('öde', 'x')],
     {}, 'ein Film', 'gut'),
    (('words', 'y'), [('a', 'u'), ('b', 'v'), ('c', 'u')], {}, 'a', 'u'),
    (('5', 'label'), [('a', 'u'), ('b', 'v')], {'text_field': '5'},
     'a', 'u'),
    (('title', 'body', 'stars', 'class'),
     [('a', 'b', 5, 'u'), ('', 'c', 1, 'v')],
     {'text_field': 'title+body', 'label_field': 'class'}, 'a b', 'u'),
    (('content', 'text', 'label', 'target'), [('x', 'a', 'u', 'w'),
                                              ('x', 'b', 'v', 'w')],
     {}, 'a', 'u'),
    (('', 'SENTENCE', 'Label', ''), [('0', 'a', 'u', ''), ('1', 'b', 'v', '')],
     {}, 'a', 'u')])
def test_columns_are_found_by_name_or_chosen(header, rows, fields, text, name):
  pathlib.Path('a.csv').write_bytes(table(rows, header))
  pathlib.Path('t.csv').write_bytes(table(rows, header))
  data = of('a.csv', test_file='t.csv', **fields)
  prepared(data)
  assert (text, name) in pairs(data, 'train')
  assert sorted(pairs(data, 'train')) == sorted(pairs(data, 'test'))


def test_many_files_and_splits_of_their_own():
  for i in range(3):
    pathlib.Path(f'train{i}.csv').write_bytes(table(ROWS[i::3]))
  pathlib.Path('v.jsonl').write_bytes(OBJECTS[:200].rpartition(b'\n')[0])
  pathlib.Path('t[1].csv').write_bytes(table(ROWS[:9]))
  data = of('train?.csv', validation_file='v.jsonl', test_file='t[1].csv',
            text_field='text', label_field='label')
  assert 'v.jsonl has no column text: there are Review, id' in error_of(data)
  pathlib.Path('v.jsonl').write_bytes(
      OBJECTS.replace(b'Review', b'text').replace(b'Sentiment', b'label'))
  prepared(data)
  assert sorted(pairs(data, 'train')) == sorted(ROWS)
  assert sorted(pairs(data, 'validation')) == sorted(ROWS)
  assert sorted(pairs(data, 'test')) == sorted(ROWS[:9])


# What is held out.


def test_equal_texts_are_on_one_side():
  generator = random.Random(0)
  rows = [(f'text {generator.randrange(200)}', 'ab'[i % 2])
          for i in range(2_000)]
  unlike = {text: [y for t, y in rows if t == text][0] for text, _ in rows}
  rows = [(text, unlike[text]) for text, _ in rows]
  pathlib.Path('a.csv').write_bytes(table(
      [(text, y, i) for i, (text, y) in enumerate(rows)],
      ('text', 'label', '')))
  data = of('a.csv', test_fraction=0.3)
  prepared(data)
  train, test = ({t for t, _ in pairs(data, x)} for x in ('train', 'test'))
  assert train | test == set(unlike) and not train & test
  assert 35 <= len(test) <= 85  # 200 x 0.3, four standard deviations
  share = {t: texts.hashed(t) / 2**64 for t in unlike}
  assert test == {t for t in unlike if share[t] < 0.3}


def test_validation_by_text_is_a_share_of_its_own():
  config = data_sets.config_of(of('a.csv', test_fraction=0.3))
  config.data.validation_fraction = 0.3
  rows = [(f'text {i}', 'ab'[i % 2]) for i in range(1_000)]
  pathlib.Path('a.csv').write_bytes(table(rows))
  tokenizer = training_tokenizer(config, lambda line: None)
  splits = load_splits(config, tokenizer, lambda line: None)
  sizes = {name: len(split) for name, split in splits.items()}
  assert sum(sizes.values()) == 1_000
  # Of 700; with one hash for both there would be none.
  assert 160 <= sizes['validation'] <= 260
  again = load_splits(config, tokenizer, pytest.fail)  # from the cache
  assert {name: len(split) for name, split in again.items()} == sizes


def test_of_many_texts_a_smaller_share_is_held_out(monkeypatch):
  monkeypatch.setattr(texts, 'MOST_HELD_OUT', 20)
  rows = [(f'text {i}', 'ab'[i % 2]) for i in range(1_000)]
  pathlib.Path('a.csv').write_bytes(table(rows))
  config = data_sets.config_of(of('a.csv'))
  tokenizer = training_tokenizer(config, lambda line: None)
  sizes = {name: len(split) for name, split in load_splits(
      config, tokenizer, lambda line: None).items()}
  # Binomial: 20 and a deviation of 4.4, of which five are not left.
  assert 0 < sizes['test'] < 42 and 0 < sizes['validation'] < 42
  assert sum(sizes.values()) == 1_000


def test_any_set_is_divided_by_text_and_equal_texts_stay_together(monkeypatch):
  config = data_sets.config_of(data_sets.of('grammar_reviews'))
  config.data.validation_by = 'text'
  words = [f'word{i % 50}' for i in range(400)]
  monkeypatch.setattr(sources, 'prepare', lambda *args: 'fingerprint')
  monkeypatch.setattr(sources, 'read_texts', lambda data, split, *rows: (
      words, np.zeros(400, np.int16)))
  monkeypatch.setattr(sources, 'count_texts', lambda data, split: 400)
  config.data.validation_fraction = 0.4
  tokenizer = training_tokenizer(config, lambda line: None)
  splits = load_splits(config, tokenizer, lambda line: None,
                       ['train', 'validation'])
  seen = set(tokenizer.get_vocab())
  held = {word for word in words
          if texts.hashed(word, 'validation') < 0.4 * 2**64}
  assert 8 <= len(held) <= 32
  assert not seen & held and len(splits['validation']) == 8 * len(held)


@pytest.mark.parametrize('fields', [
    {'validation_file': 'v.csv'}, {'validation_split': 'test'}])
def test_a_split_of_its_own_validates(fields):
  pathlib.Path('a.csv').write_bytes(table(ROWS))
  pathlib.Path('v.csv').write_bytes(table(ROWS[:10]))
  pathlib.Path('t.csv').write_bytes(table(ROWS[:7]))
  config = data_sets.config_of(of('a.csv', test_file='t.csv', **fields))
  tokenizer = training_tokenizer(config, lambda line: None)
  splits = load_splits(config, tokenizer, lambda line: None)
  sizes = [len(splits[name]) for name in ('train', 'validation', 'test')]
  assert sizes == [60, 10 if 'validation_file' in fields else 7, 7]
  config.data.validation_fraction = 0.0  # it does not matter
  assert len(load_splits(config, tokenizer, lambda line: None,
                         ['validation'])['validation']) == sizes[1]


def test_a_class_that_would_be_held_out_whole_is_learned_from():
  rare = next(f'rare {i}' for i in range(99)
              if texts.hashed(f'rare {i}') < 0.1 * 2**64)
  pathlib.Path('a.csv').write_bytes(table([*ROWS, (rare, 'selten')]))
  data = of('a.csv')
  prepared(data)
  assert (rare, 'selten') in pairs(data, 'train')


# The fingerprint.


def test_the_fingerprint_changes_with_files_and_fields():
  path = pathlib.Path('a.csv')
  path.write_bytes(CSV)
  data = of('a.csv')
  assert sources.fingerprint(data) is None
  prepared(data)
  first = sources.fingerprint(data)
  assert prepared(data) == []
  content = CSV.replace(b'Film', b'film')  # of the same size
  path.write_bytes(content)
  os.utime(path, ns=(1, 1))
  assert sources.fingerprint(data) is None
  prepared(data)
  second = sources.fingerprint(data)
  assert second != first and 'film' in pairs(data, 'train')[0][0]
  for fields in {'test_fraction': 0.2}, {'text_field': 'text'}:
    prepared(of('a.csv', **fields))
    assert sources.fingerprint(of('a.csv', **fields)) not in (first, second)


def test_a_fingerprint_reads_no_content(monkeypatch):
  pathlib.Path('a.csv').write_bytes(CSV)
  data = of('a.csv')
  prepared(data)
  monkeypatch.setattr(tables, 'read', None)
  monkeypatch.setattr(tables, 'columns', None)
  assert prepared(data) == []


def test_a_file_that_is_written_meanwhile_is_noticed(monkeypatch):
  path = pathlib.Path('a.csv')
  path.write_bytes(CSV)
  build = texts.builder
  def changed(data, found):
    path.write_bytes(CSV + b'another,gut\n')
    return build(data, found)
  monkeypatch.setattr(texts, 'builder', changed)
  assert 'was written while it was read: run again' in error_of(of('a.csv'))


# Files that are wrong.

GZ = gzip.compress(CSV)
ZST = pa.compress(CSV, 'zstd', asbytes=True)
PARQUET = parquet(**COLUMNS)
MANY = [(f'text {i}', i) for i in range(1_200)]
# What is in a file, the fields beside train_file, and what is said.
WRONG = {
    'empty.csv': (b'', {}, 'empty.csv has no rows'),
    'blank.csv': (b'\n\n \n', {}, 'blank.csv has no rows'),
    'header.csv': (b'text,label\n', {}, 'there are no rows to learn from'),
    'texts are empty.csv': (
        b'text,label\n,a\n ,b\n', {}, 'there are no rows to learn from'),
    'one class.csv': (
        table([('x', 'a'), ('y', 'a')]), {}, 'there is one class, a,'),
    'one column.csv': (
        b'text\nhello\n', {}, 'line 1 has the columns text: say'),
    'no names.csv': (b'good film,5\nbad film,1\nworse,1\n', {},
                     'line 1: 5 is no name of a column: put a line of names'),
    'no names 2.csv': (
        b'fine,pos\nbad film,neg\nworse,neg\nbest,pos\n', {},
        'line 1: pos is no name of a column'),
    'no names 3.tsv': (
        b'a\t' + b'long ' * 20 + b'\nb\tshort one\nc\tanother\nb\tx\n', {},
        r'line 1: long long .*\.\.\. is no name of a column'),
    'unknown.csv': (
        table([('a', 'b', 'c')], ('x', 'y', 'z')), {},
        'columns x, y, z: say .*--config.data.text_field and --config.data.l'),
    'no label.csv': (
        table([('a', 'b', 'c')], ('text', 'y', 'z')), {},
        'columns text, y, z: say .* with --config.data.label_field'),
    'two texts.csv': (
        table([('a', 'b', 'c')], ('review', 'comment', 'label')), {},
        'columns review, comment, label: .*--config.data.text_field'),
    'alike.csv': (table([('a', 'b'), ('c', 'd')], ('x', 'y')), {},
                  'columns x, y: say'),
    'missing column.csv': (CSV, {'text_field': 'body'},
                           'has no column body: there are text, label'),
    'missing part.csv': (CSV, {'text_field': 'text+body'}, 'no column body'),
    'twice.csv': (table([('a', 'b', 'c')], ('text', 'text', 'label')), {},
                  'line 1: two columns are called text: rename one'),
    'many.csv': (
        table(MANY), {}, 'line 1,002: the label 1000 is that of class 1,001.*'
        '--config.data.label_field'),
    'long label.csv': (
        table([('a', 'b' * 201)]), {}, 'line 2: the label b.*200'),
    'line in label.csv': (
        table([('a', 'b\nc')]), {}, 'line 2: the label b c has'),
    'open quote.csv': (
        b'text,label\nfine,a\n"never closed,b\nmore,a\n' * 1, {},
        'line 3: a quote opens here'),
    'open quote 2.csv': (
        b'text,label\n"two\nlines",a\nx,"open\n"y",a\n', {},
        'line 4: a quote opens here and is not closed'),
    'text after a quote.csv': (
        b'text,label\n"a" b,c\n', {}, 'line 2: a quote opens here'),
    'few cells.csv': (
        b'text,label\na,b\n"c\nd"\n', {}, 'line 3: 1 cells, but line 1 names'),
    'many cells.csv': (b'text,label\nhello, you,b\n', {}, 'line 2: 3 cells'),
    'old Mac.csv': (
        b'text,label\ra,b\rc,d\r', {}, r"line 1: .*tr '\\r' '\\n'"),
    'cp1252.csv': (CSV.decode().encode('cp1252'), {},
                   'line 2: the byte 0xf6 is not UTF-8; CP1252 would fit: '
                   'iconv -f CP1252 -t UTF-8'),
    'utf-16.csv': (CSV.decode().encode('utf-16'), {},
                   'line 1: .*UTF-16 would fit: iconv -f UTF-16'),
    'utf-16 bare.csv': (CSV.decode().encode('utf-16-le'), {}, '-f UTF-16LE'),
    'utf-32.csv': (CSV.decode().encode('utf-32'), {}, 'iconv -f UTF-32'),
    'shift_jis.csv': (
        'text,label\nこの映画はとても面白い,良い\n'.encode('shift_jis'), {},
        'line 2: .*iconv -f SHIFT_JIS'),
    'gb18030.jsonl': (
        '{"text": "这部电影非常好看，我很喜欢", "label": 1}\n'.encode(
            'gb18030'), {}, 'line 1: .*iconv -f GB18030'),
    'cp1251.tsv': (
        'text\tlabel\nЭтот фильм очень смешной\tда\n'.encode('cp1251'), {},
        'line 2: .*iconv -f CP1251'),
    'NUL.csv': (
        b'text,label\na,b\nc\0d,e\n', {}, 'line 3: a NUL byte is in no text'),
    'NUL.jsonl': (b'{"text": "a\\u0000", "label": 1}\n', {},
                  'line 1: the text holds a NUL character'),
    'half a character.jsonl': (
        b'{"text": "a\\ud800", "label": 1}\n', {},
        'line 1: the text holds half a character'),
    'endless.csv': (b'text,label\na,b\n"' + b'x' * tables.MOST_BYTES, {},
                    'line 3: the row that begins here has more than 16 MB'),
    'endless lines.csv': (
        b'text,label\n"a' + b'\n' * tables.MOST_BYTES, {},
        'line 2: the row that begins here has more than 16 MB'),
    'endless.jsonl': (b'{"text": "' + b'x' * tables.MOST_BYTES, {},
                      'line 1: the row that begins here has more than 16 MB'),
    'bomb.csv.gz': (gzip.compress(b'text,label\n' + b'x' * (1 << 26)), {},
                    'line 2: the row that begins here has more than 16 MB'),
    'no JSON.jsonl': (b'{"text": "a", "label": 1}\n{"text": \n', {},
                      'line 2 is not JSON .*column 9'),
    'array.json': (b'[\n{"text": "a", "label": 1}]\n', {},
                   'line 1 is not JSON .*jq -c .*does'),
    'no object.jsonl': (b'["a", 1]\n', {}, 'line 1 is JSON, but no object'),
    'deep.jsonl': (b'{"text": ' + b'[' * 100_000 + b'\n', {}, 'is not JSON'),
    'key twice.jsonl': (b'{"text": "a", "label": 1, "label": 2}\n', {},
                        'line 1 is not JSON .a key stands there twice'),
    'huge number.jsonl': (b'{"text": "a", "label": ' + b'9' * 5_000 + b'}', {},
                          'line 1 is not JSON'),
    'no key.jsonl': (b'{"text": "a", "label": 1}\n{"text": "b"}\n', {},
                     'line 2 has no key label'),
    'nested.jsonl': (b'{"text": ["a"], "label": 1}\n', {},
                     'line 1: text is a list: write'),
    'nested label.jsonl': (b'{"text": "a", "label": {}}\n', {},
                           'line 1: label is a object: write'),
    'number for a text.jsonl': (b'{"text": 5, "label": 1}\n', {},
                                'line 1: the text 5 is of type int'),
    'mixed.jsonl': (
        b'{"text": "a", "label": 1}\n{"text": "b", "label": "1"}\n', {},
        'line 2: the label 1 is of type str, but that of .*line 1 of type int'),
    'true and 1.jsonl': (
        b'{"text": "a", "label": 1}\n{"text": "b", "label": true}\n', {},
        'line 2: the label True is of type bool'),
    'fraction.jsonl': (b'{"text": "a", "label": 4.5}\n', {},
                       'line 1: the label 4.5 is of type float'),
    'no label.jsonl': (b'{"text": "a", "label": null}\n', {},
                       'line 1: the label is missing'),
    'no label 2.csv': (
        b'text,label\na,b\nc,\n', {}, 'line 3: the label is missing'),
    'unknown.xlsx': (b'x', {}, 'unknown.xlsx: what is in it its name must say'),
    'unknown': (b'x', {}, 'its name must say: .csv, '),
    'packed.parquet.gz': (PARQUET, {}, 'leave out .gz'),
    'no gzip.csv.gz': (CSV, {}, 'no gzip.csv.gz is damaged .Not a gzipped f'),
    'cut.csv.gz': (GZ[:-20], {}, 'cut.csv.gz is damaged'),
    'changed.csv.gz': (GZ[:80] + b'\xff' + GZ[81:], {}, 'is damaged'),
    'cut.csv.zst': (ZST[:-9], {}, 'cut.csv.zst is damaged .Truncated'),
    'no zstd.csv.zst': (CSV, {}, 'no zstd.csv.zst is damaged'),
    'cut.parquet': (PARQUET[:-9], {}, 'cut.parquet is damaged'),
    'changed.parquet': (PARQUET[:9] + b'\xff' * 40 + PARQUET[49:], {},
                        'changed.parquet is damaged'),
    'no parquet.parquet': (CSV, {}, 'is damaged'),
    'lists.parquet': (parquet(text=[['a'], ['b']], label=[1, 2]), {},
                      'column text is of type list'),
    'days.parquet': (
        parquet(text=['a'], label=pa.array([1], pa.timestamp('ns'))), {},
        'column label is of type timestamp'),
    'numbers.parquet': (parquet(text=[1, 2], label=[1, 2]), {},
                        'row 1: the text 1 is of type int'),
    'fractions.parquet': (parquet(text=['a', 'b'], label=[1.0, 2.0]), {},
                          'row 1: the label 1.0 is of type float'),
    'no label.parquet': (parquet(text=['a', 'b'], label=[1, None]), {},
                         'row 2: the label is missing'),
    'no rows.parquet': (parquet(text=pa.array([], pa.string()),
                                label=pa.array([], pa.int8())), {},
                        'there are no rows to learn from'),
    'few.csv': (table([('a', 'b'), ('c', 'd')]), {},
                'none of the 2 rows is in the share of 0.1 that is held out'),
    'only in test.csv': (
        CSV, {'test_file': 'other.csv'},
        'other.csv, line 3: the label neu is in no row to learn from'),
    'only in validation.csv': (
        CSV, {'validation_file': 'other.csv'},
        'other.csv, line 3: the label neu is in no row'),
    'test is train.csv': (
        CSV, {'test_file': './test is train.csv'},
        'is in config.data.train_file and in config.data.test_file'),
    'test is in a pattern.csv': (
        CSV, {'test_file': 'test *.csv'}, 'is in config.data.train_file and'),
    'test is a link.csv': (
        CSV, {'test_file': 'link.csv'}, 'is in config.data.train_file and in'),
    'test is missing.csv': (
        CSV, {'test_file': 'no.csv'},
        '--config.data.test_file=no.csv: there is no such file, seen from /'),
    'test matches none.csv': (
        CSV, {'test_file': 'zz*.csv'}, r'zz\*.csv: no file has a name like'),
    'test is empty.csv': (CSV, {'test_file': 'nothing.csv'}, 'has no rows'),
    'test is a directory.csv': (
        CSV, {'test_file': 'folder'},
        r'is or holds a directory, folder: .*folder/\*.csv'),
    'test is a pipe.csv': (
        CSV, {'test_file': 'pipe.csv'}, 'is a pipe or a device: give a file'),
    'test is a loop.csv': (CSV, {'test_file': 'loop.csv'}, 'Too many levels'),
}


def wrong_files(name):
  """Makes a wrong file, and what may be named beside it."""
  pathlib.Path(name).write_bytes(WRONG[name][0])
  pathlib.Path('other.csv').write_bytes(
      table([('a', 'gut'), ('b', 'neu'), ('c', 'neu')]))
  pathlib.Path('nothing.csv').write_bytes(b'')
  pathlib.Path('link.csv').symlink_to('test is a link.csv')
  pathlib.Path('loop.csv').symlink_to('loop.csv')
  pathlib.Path('folder').mkdir()
  os.mkfifo('pipe.csv')


@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_file_is_refused_in_a_line(name):
  wrong_files(name)
  _, fields, says = WRONG[name]
  message = error_of(of(name, **fields))
  assert re.search(says, message), message


def test_there_are_forty_wrong_files():
  assert len(WRONG) >= 40


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read all')
def test_a_file_that_may_not_be_read():
  pathlib.Path('a.csv').write_bytes(CSV)
  pathlib.Path('a.csv').chmod(0)
  assert 'cannot read' in error_of(of('a.csv'))


def test_a_bucket_without_its_client(monkeypatch):
  from flax_imdb.storage import bucket
  monkeypatch.setattr(bucket.importlib.util, 'find_spec', lambda name: None)
  bucket._reach.cache_clear()
  assert 'gs:// needs gcsfs: pip install' in error_of(of('gs://bucket/d/a.csv'))
  assert 'remote directories are not supported but for gs' in error_of(
      of('s3://bucket/d/a.csv'))


def test_more_than_memory_is_to_hold_is_sorted_on_disk_into_the_same_order(
    monkeypatch):
  from tensorflow_datasets.core import shuffle
  pathlib.Path('a.csv').write_bytes(CSV)
  data = of('a.csv')
  prepared(data)
  assert shuffle.MAX_MEM_BUFFER_SIZE == 64 << 20
  whole = pairs(data, 'train'), pairs(data, 'test')
  shutil.rmtree('cache')
  opened = []
  def on_disk():
    make()
    monkeypatch.setattr(shuffle, 'MAX_MEM_BUFFER_SIZE', 100)
    gfile = shuffle.tf.io.gfile
    monkeypatch.setattr(gfile, 'GFile', lambda *args, **mode: (
        opened.append(args), open(*args, **mode))[1])
  make = texts._shuffle_without_tensorflow
  monkeypatch.setattr(texts, '_shuffle_without_tensorflow', on_disk)
  prepared(data)
  assert len(opened) > 30
  assert (pairs(data, 'train'), pairs(data, 'test')) == whole
  assert whole[0] != sorted(whole[0])  # nor is it the file's order


# Properties.

CELLS = st.text(st.characters(exclude_categories=['Cs'],
                              exclude_characters='\0'), max_size=30)
TEXTS = CELLS.filter(str.strip)
NAMES = st.text(st.characters(categories=['L', 'N']), min_size=1, max_size=9)


@st.composite
def rows_of_two_classes(draw):
  """Rows of different texts, each class among them."""
  names = draw(st.lists(NAMES, min_size=2, max_size=5, unique=True))
  found = draw(st.lists(TEXTS, min_size=len(names), max_size=20, unique=True))
  return [(text, names[i % len(names)]) for i, text in enumerate(found)]


def as_csv(rows, others, delimiter, end, quoting, mark):
  """The bytes of a CSV, with a third column of anything."""
  file = io.StringIO(newline='')
  writer = csv.writer(file, delimiter=delimiter, lineterminator=end,
                      quoting=quoting)
  writer.writerow(['other', 'text', 'label'])
  for i, (text, label) in enumerate(rows):
    writer.writerow([others[i % len(others)], text, label])
  return mark + file.getvalue().encode()


@contextlib.contextmanager
def file_of(name, content):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, name)
    path.write_bytes(content)
    yield str(path)


def read_back(path):
  return [(text, label) for _, (text, label) in tables.read(
      path, ['text', 'label'])]


@settings(max_examples=150, deadline=None)
@given(rows_of_two_classes(), st.lists(CELLS, min_size=1, max_size=3),
       st.sampled_from(',;\t'), st.sampled_from(['\n', '\r\n']),
       st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL,
                        csv.QUOTE_NONNUMERIC]),
       st.sampled_from([b'', b'\xef\xbb\xbf']), st.booleans())
@example([('a\r\n"b"', 'x'), ('\u2028', 'y')], [';;'], ',', '\n',
         csv.QUOTE_MINIMAL, b'', True)
def test_any_csv_is_read_back_equal(
    rows, others, delimiter, end, quoting, mark, packed):
  # Python's writer quotes no lone carriage return if it ends lines otherwise,
  # before 3.13.
  if any('\r' in cell for cell in (*others, *(x for row in rows for x in row))):
    quoting = csv.QUOTE_ALL
  content = as_csv(rows, others, delimiter, end, quoting, mark)
  name = 'a.tsv' if delimiter == '\t' else 'a.csv'
  if packed:
    name, content = f'{name}.gz', gzip.compress(content, 1)
  with file_of(name, content) as path:
    assert tables.columns(path) == ['other', 'text', 'label']
    assert read_back(path) == rows


@settings(max_examples=100, deadline=None)
@given(rows_of_two_classes(), st.booleans(), st.booleans())
def test_any_json_lines_are_read_back_equal(rows, ascii_only, packed):
  content = '\n'.join(json.dumps({'label': y, 'text': t, 'id': 1.5},
                                 ensure_ascii=ascii_only)
                      for t, y in rows).encode()
  name = 'a.jsonl.gz' if packed else 'a.jsonl'
  with file_of(name, gzip.compress(content, 1) if packed else content) as path:
    assert read_back(path) == rows


@settings(max_examples=100, deadline=None)
@given(rows_of_two_classes(),
       st.sampled_from(['cp1252', 'utf-16', 'shift_jis', 'gb18030', 'latin-1']))
def test_another_encoding_is_refused_or_means_the_same(rows, encoding):
  content = as_csv(rows, ['ü'], ',', '\n', csv.QUOTE_ALL, b'')
  try:
    content = content.decode().encode(encoding)
  except UnicodeEncodeError:
    return
  with file_of('a.csv', content) as path:
    with pytest.raises(UserError, match='line [0-9,]+: .*(iconv -f|no text)'):
      list(read_back(path))


@settings(max_examples=15, deadline=None)
@given(rows_of_two_classes())
def test_any_rows_are_written_and_read_by_tfds(rows):
  with file_of('a.csv', as_csv(rows, ['x'], ',', '\n', csv.QUOTE_ALL,
                               b'')) as path:
    shutil.copy(path, f'{path[:-4]}2.csv')
    data = of(path, test_file=f'{path[:-4]}2.csv')
    prepared(data)
    assert sorted(pairs(data, 'train')) == sorted(rows)
    assert sorted(pairs(data, 'test')) == sorted(rows)


def test_the_hash_is_blake2b():
  digest = hashlib.blake2b('für'.encode(), digest_size=8).hexdigest()
  assert texts.hashed('für') == int(digest, 16)


# A run.


@pytest.mark.slow
def test_a_run_from_a_file_to_predictions_without_it(tmp_path):
  generator = random.Random(0)
  kinds = {'gut': ['schön', 'großartig'], 'schlecht': ['öde', 'übel']}
  rows = [(' '.join(generator.choice(['der Film', 'das Ende', *kinds[y]])
                    for _ in range(8)) + f' {kinds[y][i % 2]} {i}', y)
          for i in range(300) for y in kinds]
  (tmp_path / 'reviews.csv').write_bytes(
      table(rows, ('Kritik', 'Urteil'), delimiter=';'))
  env = {'PYTHONPATH': str(ROOT)}
  workdir = f'--workdir={tmp_path}/run'
  train = (
      '--config=configs/texts.py', '--config.num_epochs=1', workdir,
      f'--config.data.train_file={tmp_path}/reviews.csv',
      '--config.data.text_field=Kritik', '--config.data.label_field=Urteil',
      '--config.data.bigrams=400', '--config.data.log_odds_ngrams=1000')
  output = finished(run_main(*train, **env))
  assert 'train: 2 classes: gut 300, schlecht 300' in output
  summary = json.loads((tmp_path / 'run/summary.json').read_text())
  assert summary['test']['accuracy'] > 0.9
  assert 30 < summary['test']['n'] < 100 and summary['validation']['n'] > 20
  evaluated = finished(run_main('--mode=eval', workdir, **env))
  assert f'accuracy {summary["test"]["accuracy"]:.4f}' in evaluated
  (tmp_path / 'reviews.csv').unlink()
  gone = run_main('--mode=eval', workdir, **env)
  assert gone.returncode == 2
  assert re.fullmatch('error: .*there is no such file.*\n', gone.stderr)
  predicted = json.loads(finished(run_main(
      '--mode=predict', '--json', workdir, 'das Ende großartig', **env)))
  assert predicted['probability'] > 0 and predicted['label']
