"""What the site has beside docs/: README first, every field, results, the tour.

`mkdocs build --strict` calls this. Nothing it adds is written to the checkout,
so a page can't differ from what it is made of.
"""

import base64
import json
import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[1]
# What pages show or link to that lies outside docs/, and where it goes.
BESIDE = {'README.md': 'index.md', 'RESULTS.md': 'RESULTS.md',
          'CHANGELOG.md': 'CHANGELOG.md', 'CONTRIBUTING.md': 'CONTRIBUTING.md',
          'examples/tour.ipynb': 'tour.md',
          'benchmarks/gradient.png': 'gradient.png',
          'benchmarks/first_run.png': 'first_run.png',
          'benchmarks/peers.png': 'peers.png',
          'benchmarks/scaling.png': 'scaling.png'}


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages and pictures that are made of other files."""
  for source, name in BESIDE.items():
    content = (ROOT / source).read_bytes()
    if source.endswith('.ipynb'):
      content, pictures = notebook_page(content.decode())
      for picture, png in pictures.items():
        files.append(File.generated(config, picture, content=png))
    if name.endswith('.md'):
      content = _moved(content.decode()).encode()
    files.append(File.generated(config, name, content=content))
  files.append(File.generated(config, 'fields.md', content=fields_page()))
  return files


def on_page_markdown(markdown: str, **kwargs: object) -> str:
  """A page of docs/, with links to where its neighbours are on the site."""
  return _moved(markdown)


def _moved(markdown: str) -> str:
  """The same with its links as the site has them, where all is in one place."""
  for source, name in BESIDE.items():
    markdown = re.sub(rf'\]\((\.\./)?{re.escape(source)}(?=[)#])',
                      f']({name}', markdown)
  return re.sub(r'\]\((\.\./)?docs/', '](', markdown)


def notebook_page(notebook: str) -> tuple[bytes, dict[str, bytes]]:
  """A notebook with its outputs as Markdown, and its pictures by name."""
  page: list[str] = []
  pictures = {}
  for cell in json.loads(notebook)['cells']:
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
      page.append(source)
      continue
    page.append(f'```python\n{source}\n```')
    printed = ''
    for output in cell['outputs']:
      data = {kind: ''.join(lines) for kind, lines in output.get(
          'data', {'text/plain': output.get('text', '')}).items()}
      if 'image/png' in data:
        name = f'{cell["id"]}.png'
        pictures[name] = base64.b64decode(data['image/png'])
        page += [*_fenced(printed), f'![what it shows]({name})']
        printed = ''
      elif data['text/plain'].startswith('<'):  # an object's name: it is HTML
        page.append(data['text/html'])
      else:
        printed += data['text/plain'].rstrip() + '\n'
    page += _fenced(printed)
  return '\n\n'.join(page).encode(), pictures


def _fenced(text: str) -> list[str]:
  return [f'```text\n{text.rstrip()}\n```'] if text else []


def fields_page() -> str:
  """A page with every field of configs/default.py, in its order."""
  source = (ROOT / 'configs' / 'default.py').read_text('utf-8')
  page = ['# Every field', '', 'Made of `configs/default.py`. On the command '
          'line each is `--config.FIELD=VALUE`.']
  for paragraph in source.partition('config = ConfigDict()\n')[2].split('\n\n'):
    page += _section(paragraph.splitlines())
  return '\n'.join(page) + '\n'


def _section(lines: list[str]) -> list[str]:
  """The heading and table of a paragraph of fields, as lines of Markdown."""
  heading, above, rows = 'The run', '', []
  if first := re.match(r'  # (.+)|  config\.(\w+) = ConfigDict\(\)', lines[0]):
    heading = first[1] or f'config.{first[2]}'
    lines = lines[1:]
  for line in lines:
    if line.startswith('  # '):
      above += line[3:]
    elif field := re.fullmatch(r'  config\.([\w.]+) = (.+?)  # (.+)', line):
      name, value, comment = field.groups()
      if above:
        comment = f'{above.strip()} {comment[0].upper()}{comment[1:]}'
      meaning = comment.replace('|', r'\|')
      rows.append(f'| `{name}` | `{value}` | {meaning} |')
      above = ''
  return ['', f'## {heading}', '', '| field | default | meaning |',
          '|---|---|---|', *rows]
