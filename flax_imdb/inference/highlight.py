"""Texts with their words coloured by score: on a terminal, and as a page.

Words are [begin, end, score], of text[begin:end], in ascending order; how much
colour one has is its score's share of the largest one in its text.
"""

from collections.abc import Callable, Iterator, Sequence
import html
from typing import Any

from rich.text import Text

Word = Sequence[Any]  # [int, int, float]

_STRONGEST = 5
_LEAST = 0.1  # of the largest score; what has less stays uncoloured
# Characters that a terminal would obey and a page may not hold, but for tab and
# line feed, as the pictures that Unicode has of them, one for one.
PICTURES = {i: 0x2400 + i for i in range(32) if i not in (9, 10)} | {
    127: 0x2421} | dict.fromkeys(range(128, 160), 0xfffd)


def strongest(text: str, words: Sequence[Word]) -> str:
  """The five words whose scores are the largest in either direction."""
  chosen = sorted(words, key=lambda word: -abs(word[2]))[:_STRONGEST]
  return '  '.join(f'{text[begin:end].translate(PICTURES)} {score:+.2f}'
                   for begin, end, score in chosen)


def coloured(text: str, words: Sequence[Word]) -> Text:
  """The text for a terminal: green for positive scores, red for negative."""
  found = Text(text.translate(PICTURES))
  for begin, end, share in _shares(words):
    fade = round(200 * (1 - abs(share)))
    red, green = (fade, 215) if share > 0 else (255, fade)
    found.stylize(f'black on rgb({red},{green},{fade})', begin, end)
  return found


def _shares(words: Sequence[Word]) -> Iterator[tuple[int, int, float]]:
  """Begin, end and share, -1 to 1, of the words that have a colour."""
  most = max((abs(score) for _, _, score in words), default=0)
  for begin, end, score in words:
    if most and abs(score) >= _LEAST * most:
      yield begin, end, score / most


# Nothing but the styles below is allowed, whatever a text holds. A file is
# whole after each review, for body and html may end with it.
PAGE = '''<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>Which words decided</title>
<style>
:root { --for: 22 143 70; --against: 214 48 49; --dim: #595f69; --line: #d5d9de;
  --text: #16181d; color: var(--text); background: #fff }
@media (prefers-color-scheme: dark) {
  :root { --for: 52 190 104; --against: 255 96 92; --dim: #a3abb6;
    --line: #3a4049; --text: #e8eaed; background: #14171b } }
body { font: 1rem/1.7 system-ui, sans-serif; max-width: 46rem;
  margin: 0 auto; padding: 1rem }
h1 { font-size: 1.4rem; line-height: 1.3 }
article { border-top: 1px solid var(--line); padding: 1rem 0 }
h2 { font-size: 1rem; margin: 0 }
p { margin: .5rem 0; overflow-wrap: anywhere }
.text, bdi { white-space: pre-wrap }
.note { color: var(--dim); font-size: .875rem }
mark { color: var(--text); border-radius: .2rem; padding: .1rem 0;
  background: rgb(var(--for) / calc(var(--share) * .45));
  border-bottom: 2px solid rgb(var(--for) / var(--share)) }
mark.against { background: rgb(var(--against) / calc(var(--share) * .45));
  border-bottom: 2px dashed rgb(var(--against) / var(--share)) }
@media print { mark { print-color-adjust: exact } }
</style>
<h1>Which words decided</h1>
<p class="note">A word with a <mark style="--share:1">solid line</mark> speaks
for %s, one with a <mark class="against" style="--share:1">dashed line</mark>
against it; the stronger the colour, the more. Scores are parts of the logit:
with that of a review of padding, the baseline, they add up to it but for the
gap.</p>
'''


def marked(text: str, words: Sequence[Word],
           attributes: Callable[[float], str] | None = None) -> str:
  """The text as HTML, escaped, each word that has a colour in a mark.

  `attributes` makes those of a mark from its share, -1 to 1. By default it is
  for a page that says what one of class `against`, or of none, looks like at a
  --share from 0 to 1. Control characters are pictures of them.
  """
  attributes = attributes or _for_page
  text, done, parts = text.translate(PICTURES), 0, []
  for begin, end, share in _shares(words):
    parts.append(f'{html.escape(text[done:begin])}<mark {attributes(share)}>'
                 f'{html.escape(text[begin:end])}</mark>')
    done = end
  return ''.join(parts) + html.escape(text[done:])


def _for_page(share: float) -> str:
  against = '' if share > 0 else 'class="against" '
  return f'{against}style="--share:{abs(share):.2f}"'


def _for_notebook(share: float) -> str:
  colour, line = (('22, 143, 70', 'solid') if share > 0
                  else ('214, 48, 49', 'dashed'))
  return (f'style="color: inherit; background-color: rgba({colour}, '
          f'{abs(share) * .45:.2f}); border-bottom: 2px {line} '
          f'rgba({colour}, {abs(share):.2f})"')


def page_review(prediction: dict[str, Any]) -> str:
  """The part of a page for what `predict` returned with its words."""
  words = html.escape(strongest(prediction['text'], prediction['words']))
  note = f' ({prediction["note"]})' if 'note' in prediction else ''
  return (
      f'<article>\n<h2>{html.escape(prediction["label"])} '
      f'{prediction["probability"]:.3f}{note}</h2>\n'
      f'<p class="text" dir="auto">'
      f'{marked(prediction["text"], prediction["words"])}</p>\n'
      f'<p class="note"><bdi>{words}</bdi> '
      f'({sums(prediction)})</p>\n</article>\n')


def sums(prediction: dict[str, Any]) -> str:
  """Where the scores begin, and what they lack to add up to the logit."""
  return f'baseline {prediction["baseline"]:+.2f}, gap {prediction["gap"]:+.4f}'


def fragment(predictions: Sequence[dict[str, Any]]) -> str:
  """What `predict` returned with its words, as HTML for a notebook to show.

  Each text is a paragraph below its label and probability, with its words as on
  the page. Colours stand at each word: a notebook that is not trusted shows no
  style sheet.
  """
  return '\n'.join(
      f'<p dir="auto" style="max-width: 46em; line-height: 1.7">'
      f'<strong>{html.escape(prediction["label"])} '
      f'{prediction["probability"]:.3f}</strong><br>'
      f'{marked(prediction["text"], prediction["words"], _for_notebook)}</p>'
      for prediction in predictions)
