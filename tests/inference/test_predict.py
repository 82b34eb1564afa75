"""Raw text is read as in training, and answered in its order."""

import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from support.command import (
  ROOT,
  STRICT,
  environ,
  finished,
  run_here,
  standard_input,
)
from support.models import logits_of, one_by_one, tiny_model

from flax_imdb.checkpoint import records
from flax_imdb.data.reviews import Reviews
from flax_imdb.data.sources import LABELS
from flax_imdb.data.tokenizer import encode, fit_tokenizer
from flax_imdb.errors import UserError
from flax_imdb.inference import predict

TEXTS = ['good film', 'bad film', 'a good bad film']


@pytest.mark.parametrize('logit', [-1e4, -30.0, -1.5, 0.0, 1e-3, 2.0, 1e4])
def test_probability_is_the_logistic_function(logit):
  p = predict.probability(logit)
  want = 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
  assert p == pytest.approx(want, rel=1e-12) and 0 <= p <= 1
  assert p + predict.probability(-logit) == pytest.approx(1)


def _predict(texts, *temperature):
  """Predictions of a model whose logit is the last token's id minus 5."""
  tokenizer = fit_tokenizer(TEXTS, 100)
  seen = []
  def logits(params, reviews):
    assert params == 'params'
    seen.append(reviews)
    return (reviews.ids[reviews.offsets[1:] - 1] - 5.0).astype(np.float32)
  predictions = list(predict.predict(
      logits, 'params', tokenizer, texts, LABELS, *temperature))
  return predictions, seen[0], tokenizer


def test_predict_gives_label_probability_and_text_in_order():
  texts = ['A good FILM', 'a bad', 'good', 'bad good']
  predictions, reviews, tokenizer = _predict(texts)
  want = encode(tokenizer, texts)
  np.testing.assert_array_equal(reviews.ids, np.concatenate(want))
  np.testing.assert_array_equal(np.diff(reviews.offsets), [4, 3, 2, 3])
  for prediction, text, ids in zip(predictions, texts, want, strict=True):
    z = float(ids[-1]) - 5
    assert prediction == {
        'label': 'positive' if z > 0 else 'negative',
        'probability': predict.probability(z), 'text': text}
  assert {p['label'] for p in predictions} == {'positive', 'negative'}


@pytest.mark.parametrize('temperature', [0.1, 3.0])
def test_a_temperature_changes_the_probability_and_no_label(temperature):
  texts = ['good', 'a bad', 'film']
  plain, *_ = _predict(texts)
  divided, reviews, _ = _predict(texts, temperature)
  for before, after, end in zip(
      plain, divided, reviews.offsets[1:], strict=True):
    z = float(reviews.ids[end - 1]) - 5
    assert after == before | {
        'probability': predict.probability(z / temperature)}
  assert plain != divided


def test_of_several_classes_each_has_a_probability_and_the_label_the_largest():
  tokenizer, names = fit_tokenizer(TEXTS, 100), ('a', 'b', 'c')
  rows = np.array([[1, 3, 2], [800, -800, 0], [0.5, 0.5, 0]], np.float32)
  found = list(predict.predict(
      lambda params, reviews: rows, None, tokenizer, TEXTS, names, 2.0))
  assert [p['label'] for p in found] == ['b', 'a', 'a']
  assert [p['text'] for p in found] == TEXTS
  for prediction, row in zip(found, rows / 2, strict=True):
    assert list(prediction['probabilities']) == list(names)
    p = np.exp(row - row.max(), dtype=np.float64)
    np.testing.assert_allclose(
        list(prediction['probabilities'].values()), p / p.sum(), rtol=1e-12)
    assert prediction['probability'] == max(
        prediction['probabilities'].values())
  assert predict.prediction_text(found[1]) == 'a 1.000  bad film'


def test_a_run_is_predicted_with_at_the_temperature_of_its_step(
    trained, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained[0], workdir)
  def predictions(*flags):
    printed = finished(run_here(
        '--mode=predict', f'--workdir={workdir}', '--json', *flags,
        stdin='\n'.join(TEXTS).encode()))
    return [json.loads(line) for line in printed.splitlines()]
  (workdir / 'calibration.json').unlink()
  plain = {step: predictions(f'--step={step}') for step in (7, 14)}
  records.write_calibration(str(workdir), 7, 0.5)
  assert predictions('--step=14') == plain[14]  # another's is not taken
  for before, after in zip(plain[7], predictions('--step=7'), strict=True):
    p, q = before.pop('probability'), after.pop('probability')
    assert math.log(q / (1 - q)) == pytest.approx(2 * math.log(p / (1 - p)))
    assert before == after


@pytest.mark.parametrize(('text', 'note'), [
    ('', 'no words'), (' \t', 'no words'), ('... <br />!', 'no words'),
    ('unheard', 'only unknown words'), ('un heard of', 'only unknown words'),
    ('unheard good', None), ('film', None)])
def test_predict_notes_an_answer_that_rests_on_nothing(text, note):
  (_, prediction), *_ = _predict(['good', text])
  assert prediction.get('note') == note
  assert ('note' in prediction) == (note is not None)


def test_predict_equals_the_model_on_the_encoded_texts():
  config, model, params = tiny_model()
  tokenizer = fit_tokenizer(TEXTS, config.data.vocab_size)
  texts = [*TEXTS, '', 'film ' * 40]
  ids = encode(tokenizer, texts)
  reviews = Reviews(np.concatenate(ids), np.cumsum([0, *map(len, ids)]),
                    np.zeros(5, np.int8))
  want = one_by_one(model, params, reviews, config.data.max_length)
  got = predict.predict(
      logits_of(config, model), params, tokenizer, texts, LABELS)
  np.testing.assert_allclose(
      [p['probability'] for p in got],
      [predict.probability(float(z)) for z in want], atol=1e-6)


def test_prediction_text_is_one_line():
  prediction = {'label': 'positive', 'probability': 0.98765, 'text': 'Fine!'}
  assert predict.prediction_text(prediction) == 'positive 0.988  Fine!'
  assert predict.prediction_text({**prediction, 'note': 'no words'}) == (
      'positive 0.988  Fine!  (no words)')


def test_words_are_a_second_line():
  prediction = {
      'label': 'negative', 'probability': 0.1, 'text': 'a\x1b[2J bad one',
      'words': [[0, 1, 0.25], [6, 9, -1.5], [10, 13, 0.5]],
      'baseline': -0.5, 'gap': 0.00125}
  assert predict.prediction_text(prediction) == (
      'negative 0.100  a\x1b[2J bad one\n'
      '  bad -1.50  one +0.50  a +0.25  (baseline -0.50, gap +0.0013)')
  assert predict.prediction_text({**prediction, 'words': []}).endswith(
      'one\n  (baseline -0.50, gap +0.0013)')


# Lines as they come.


@pytest.fixture
def pipe():
  """(file to write to, parts of lines) of a pipe, that end with the test."""
  reads, writes = os.pipe()
  with os.fdopen(writes, 'wb', buffering=0) as file:
    yield file, predict.read_reviews([], f'/dev/fd/{reads}')
    os.close(reads)  # whoever still writes is told


def test_who_waits_for_an_answer_gets_it(pipe):
  file, parts = pipe
  for lines in ['one'], ['two', '', 'four'], ['fünf', '六']:
    file.write(''.join(f'{line}\n' for line in lines).encode())
    assert next(parts) == lines
  # A line, and a character, that is there in part.
  file.write(b'seven\neig' + 'é'.encode()[:1])
  assert next(parts) == ['seven']
  file.write('é'.encode()[1:] + b'ht\r\nlast')
  assert next(parts) == ['eigéht']
  file.close()
  assert list(parts) == [['last']]


def test_lines_without_end_come_in_parts_that_memory_holds(pipe):
  file, parts = pipe
  def write():
    number = itertools.count()
    try:
      while True:
        file.write(b''.join(b'%d\n' % next(number) for _ in range(10_000)))
    except (OSError, ValueError):  # the reader has seen enough
      pass
  writer = threading.Thread(target=write, daemon=True)
  writer.start()
  seen = []
  while len(seen) < 50_000:
    part = next(parts)
    assert 0 < len(part) <= predict._PART_BYTES // predict._LINE_BYTES + 1
    seen += part
  assert seen == [str(i) for i in range(len(seen))]
  parts.close()


def test_long_lines_are_few_a_part(tmp_path):
  path = tmp_path / 'reviews'
  line = 'é' * (1 << 20)  # as long as one may be
  path.write_text(f'{line}\n' * 6 + 'short')
  parts = list(predict.read_reviews([], str(path)))
  assert max(map(len, parts)) <= 3
  assert [x for part in parts for x in part] == [line] * 6 + ['short']


@pytest.mark.parametrize('text', [
    'a', 'a\n', 'a\nb', '\n', '\n\n', 'a\r\nb\r\n', 'a\x0bb\x0cc\u2028d\x85e\n',
    'nul\0\n<br />\n\n'])
def test_lines_end_at_a_line_feed_alone(text, tmp_path):
  path = tmp_path / 'reviews'
  path.write_bytes(text.encode())
  (lines,) = predict.read_reviews([], str(path))
  assert lines == text.replace('\r\n', '\n').removesuffix('\n').split('\n')
  with standard_input(text.encode()):
    assert list(predict.read_reviews([], None)) == [lines]


@pytest.mark.parametrize(('last', 'why'), [
    (b'caf\xe9\nno more', 'is not UTF-8 in line 4'),
    (b'x' * (1 << 20) + b'yz', 'more than 1,048,576 characters in line 4'),
    ('é'.encode() * (3 << 20), 'more than 1,048,576 characters in line 4')])
def test_a_mistake_is_told_once_the_lines_before_are_answered(
    last, why, tmp_path):
  path = tmp_path / 'reviews'
  path.write_bytes(b'one\n\nthree\n' + last)
  parts, seen = predict.read_reviews([], str(path)), []
  with pytest.raises(UserError, match=why):
    for part in parts:
      seen += part
  assert seen == ['one', '', 'three']


def test_the_answers_before_a_mistake_are_printed(trained, tmp_path):
  workdir, _ = trained
  argv = ['--mode=predict', f'--workdir={workdir}', '--explain',
          f'--html={tmp_path}/page.html']
  process = run_here(*argv, stdin=b'good\nbad\n\xff\ngood\n')
  assert process.returncode == 2
  assert process.stderr.startswith(
      'error: standard input is not UTF-8 in line 3: convert it')
  assert process.stdout.count('\n') == 4 and '  bad\n' in process.stdout
  assert (tmp_path / 'page.html').read_text().count('</article>') == 2


def test_a_pipe_that_stays_open_is_answered_line_by_line(trained):
  argv = [sys.executable, *STRICT, '-m', 'flax_imdb.main', '--mode=predict',
          f'--workdir={trained[0]}', '--json']
  with subprocess.Popen(
      argv, cwd=ROOT, env=environ(PYTHONUNBUFFERED=None), stdin=subprocess.PIPE,
      stdout=subprocess.PIPE) as process:
    timer = threading.Timer(120, process.kill)  # or a mistake waits for ever
    timer.start()
    for text in 'I was bored.', '', 'not bored at all':
      process.stdin.write(f'{text}\n'.encode())
      process.stdin.flush()
      assert json.loads(process.stdout.readline())['text'] == text
    process.stdin.close()
    assert process.stdout.read() == b'' and process.wait() == 0
    timer.cancel()


# What a person sees.


class _Screen(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def screen(trained, monkeypatch):
  """Explains reviews on a terminal; what it was sent."""
  for name in 'NO_COLOR', 'FORCE_COLOR', 'TTY_COMPATIBLE', 'COLORTERM':
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('TERM', 'xterm-256color')
  def screen(text, *flags):
    with standard_input(text.encode()), monkeypatch.context() as patched:
      patched.setattr('sys.stdout', _Screen())
      predict.predict_run(
          str(trained[0]), None, predict.read_reviews([], None), *flags)
      return sys.stdout.getvalue()
  return screen


TEXT = 'good film, but [bold]bored[/bold] :smile: https://x.org \x1b[31mit'
ANSI = r'\x1b\[[\d;]*m'


def test_words_are_coloured_on_a_terminal(screen, monkeypatch):
  printed = screen(TEXT, False, True)
  assert '\x1b[30;48;5;' in printed  # black on a colour
  plain = re.sub(ANSI, '', printed)
  first, second = plain.splitlines()
  assert first[first.index('  ') + 2:] == TEXT.replace('\x1b', '\u241b')
  assert re.fullmatch(r'  \(baseline [+-]\S+, gap [+-]\S+\)', second)
  for variable, value in ('NO_COLOR', '1'), ('TERM', 'dumb'):
    with monkeypatch.context() as patched:
      patched.setenv(variable, value)
      lines = screen(TEXT, False, True)
      assert not re.search(ANSI, lines.replace('\x1b[31mit', ''))
      assert re.match(r'  \S+ [+-]\d', lines.splitlines()[1])
  assert '\x1b[' not in screen('good', False)  # nor if nothing is explained
  assert json.loads(screen('good', True, True))['words']


def test_elsewhere_nothing_is_coloured(trained, monkeypatch):
  monkeypatch.setenv('FORCE_COLOR', '1')
  printed = finished(run_here(
      '--mode=predict', f'--workdir={trained[0]}', '--explain', 'good film'))
  assert '\x1b' not in printed and printed.count('\n') == 2


def test_a_page_is_not_written_before_there_is_an_answer(trained, tmp_path):
  page = tmp_path / 'page.html'
  page.write_text('before')
  argv = ['--mode=predict', '--explain', f'--html={page}']
  assert run_here(*argv, '--workdir=no', 'good').returncode == 2
  assert run_here(*argv, f'--workdir={trained[0]}').returncode == 2  # is empty
  assert page.read_text() == 'before'
  finished(run_here(*argv, f'--workdir={trained[0]}', 'good <b>film</b>'))
  assert '&lt;b&gt;' in page.read_text()
