"""Coloured words: the text stays what it is, and nothing in it is obeyed."""

import html.parser
import re

import pytest

from flax_imdb.inference import highlight

HOSTILE = [
    '<script>alert(1)</script>', '</p></article><img src=x onerror=alert(1)>',
    '"><style>*{display:none}</style>', '&lt;b&gt; &amp; &#60;script&#62;',
    "' onmouseover='x", '<!-- ', ']]>', '\0\x1b[31m\x9b\x7f\r\n\t tab',
    '\u202eright to left\u202c', '\U0001f600 映画 שלום']


def _words(text):
  """Each run of three characters a word, of falling scores in turns."""
  return [[i, min(i + 3, len(text)), (-1) ** i * 2.0 / (1 + i)]
          for i in range(0, len(text), 3)]


def _prediction(text, **more):
  return {'label': 'positive', 'probability': 0.75, 'text': text,
          'words': _words(text), 'baseline': 0.1, 'gap': -0.01} | more


class _Reader(html.parser.HTMLParser):
  """The elements of a page, and the text of those of class text."""

  def __init__(self, page):
    super().__init__()
    self.elements, self.texts, self.inside = [], [], False
    self.feed(page)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if ('class', 'text') in attrs:
      self.inside = True
      self.texts.append('')

  def handle_endtag(self, tag):
    self.inside = self.inside and tag != 'p'

  def handle_data(self, data):
    if self.inside:
      self.texts[-1] += data


def test_a_page_holds_the_texts_and_nothing_of_theirs_is_obeyed():
  page = highlight.PAGE % 'positive' + ''.join(
      highlight.page_review(_prediction(text)) for text in HOSTILE)
  read = _Reader(page)
  assert {tag for tag, _ in read.elements} == {
      'html', 'meta', 'link', 'title', 'style', 'h1', 'p', 'mark', 'article',
      'h2', 'bdi'}
  assert sum(tag == 'style' for tag, _ in read.elements) == 1
  for _, attributes in read.elements:
    assert set(attributes) <= {'lang', 'charset', 'http-equiv', 'content',
                               'name', 'rel', 'href', 'class', 'style', 'dir'}
    assert attributes.get('href', 'data:,') == 'data:,'
  assert read.texts == [text.translate(highlight.PICTURES)
                        for text in HOSTILE]
  assert 'url(' not in page and 'http:' not in page and 'https:' not in page
  assert "default-src 'none'" in page and 'script-src' not in page
  assert 'prefers-color-scheme: dark' in page and 'width=device-width' in page
  assert not set(page) & {*map(chr, range(9)), '\x0b', '\x1b', '\x7f', '\x9b'}


def test_names_of_classes_and_notes_are_escaped():
  part = highlight.page_review(_prediction('', label='<b>', note='no words'))
  assert '&lt;b&gt; 0.750 (no words)' in part and '<b>' not in part
  assert 'baseline +0.10, gap -0.0100' in part


def test_colour_is_the_share_of_the_largest_score():
  text, words = 'ab cd ef gh', [
      [0, 2, 2.0], [3, 5, -1.0], [6, 8, 0.1], [9, 11, 0.5]]
  part = highlight.page_review(_prediction(text, words=words))
  assert ('<mark style="--share:1.00">ab</mark> <mark class="against" '
          'style="--share:0.50">cd</mark> ef <mark style="--share:0.25">gh'
          '</mark>') in part
  found = highlight.coloured(text, words)
  assert [(s.start, s.end, str(s.style)) for s in found.spans] == [
      (0, 2, 'black on rgb(0,215,0)'), (3, 5, 'black on rgb(255,100,100)'),
      (9, 11, 'black on rgb(150,215,150)')]
  assert found.plain == text
  assert highlight.strongest(text, words) == (
      'ab +2.00  cd -1.00  gh +0.50  ef +0.10')


@pytest.mark.parametrize('words', [[], [[0, 4, 0.0]]])
def test_words_without_a_score_have_no_colour(words):
  assert not highlight.coloured('text', words).spans
  assert '<mark' not in highlight.page_review(_prediction('text', words=words))


@pytest.mark.parametrize('text', HOSTILE)
def test_a_terminal_is_sent_no_command(text):
  found = highlight.coloured(text, _words(text)).plain
  assert len(found) == len(text)  # places stay what they are
  assert all(x.isprintable() or x in '\t\n\u202e\u202c' for x in found)
  assert not set(highlight.strongest(text, _words(text))) & {'\x1b', '\0'}


def test_a_fragment_brings_its_colours_and_nothing_of_a_text_is_obeyed():
  between = _prediction('<i>not</i> bad', words=[[11, 14, 1.0]])
  fragment = highlight.fragment([
      between, *(_prediction(text) for text in HOSTILE)])
  elements = _Reader(fragment).elements
  assert [tag for tag, _ in elements].count('p') == 1 + len(HOSTILE)
  assert {tag for tag, _ in elements} == {'p', 'strong', 'br', 'mark'}
  assert {name for _, attributes in elements for name in attributes} == {
      'dir', 'style'}
  assert 'url(' not in fragment and not set(fragment) & set('\x00\x1b\x7f\x9b')
  shown = re.sub('<.*?>', '', fragment)
  for text in HOSTILE:
    assert html.escape(text.translate(highlight.PICTURES)) in shown
  assert 'rgba(22, 143, 70, 0.45); border-bottom: 2px solid' in fragment
  assert 'rgba(214, 48, 49, 0.11); border-bottom: 2px dashed' in fragment
