"""docs/architecture.md speaks of what is there."""

import re

import pytest
from support.command import ROOT

PACKAGE = ROOT / 'flax_imdb'
PAGE = (ROOT / 'docs' / 'architecture.md').read_text('utf-8')
# A line that begins far to the right goes on with the one before.
PICTURE = re.search(r'```\n(.*?)```', PAGE, flags=re.DOTALL)[1]
ROWS = re.sub(r'\n {12,}', '  ', PICTURE).splitlines()
FILES = sorted(file for file in PACKAGE.rglob('*.py')
               if file.name != '__init__.py')
SOURCES = [file.read_text('utf-8') for file in (
    *FILES, *(ROOT / 'configs').glob('*.py'))]
QUOTED = sorted(set(re.findall(r'`([^`\n]+)`', PAGE.replace(PICTURE, ''))))


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.name)
def test_the_picture_has_each_file_on_its_floor(file):
  (line,) = (x for x in ROWS if re.search(
      rf'(?<![\w/]){re.escape(file.name)}(?!\w)', x))
  if file.parent != PACKAGE:
    assert line.split()[0] == f'{file.parent.name}/'


def test_the_floors_are_drawn_in_the_order_that_holds():
  from test_imports import FLOORS
  drawn = [name.removesuffix('/').removesuffix('.py') for name in re.findall(
      r'^ (\w+(?:/|\.py))', PICTURE, flags=re.MULTILINE)]
  order = [FLOORS.index(name) for name in drawn]
  assert len(drawn) >= 12 and order == sorted(order, reverse=True)


@pytest.mark.parametrize('name', QUOTED)
def test_what_is_named_exists(name):
  if re.fullmatch(r'[\w/]+(\.py|/)', name):  # `train/` or `data/sources.py`
    assert any(name in str(path.relative_to(parent)) + '/' * path.is_dir()
               for parent in (PACKAGE, ROOT)
               for path in (*parent.glob('*'), *parent.glob('*/*'))), name
    return
  for word in re.findall(r'[A-Za-z_]\w+', re.sub(r"'.*?'", '', name)):
    assert word in ('flax', 'jax') or any(
        re.search(rf'\b{word}\b', text) for text in SOURCES), word
