"""What the site has beside docs/: README first, every field, and the results.

`mkdocs build --strict` calls this. Nothing it adds is written to the checkout,
so a page can't differ from what it is made of.
"""

import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[1]
# What pages show or link to that lies outside docs/, and where it goes.
BESIDE = {'README.md': 'index.md', 'RESULTS.md': 'RESULTS.md',
          'CHANGELOG.md': 'CHANGELOG.md', 'CONTRIBUTING.md': 'CONTRIBUTING.md',
          'benchmarks/gradient.png': 'gradient.png',
          'benchmarks/scaling.png': 'scaling.png'}


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages and pictures that are made of other files."""
  for source, name in BESIDE.items():
    content = (ROOT / source).read_bytes()
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
  return markdown.replace('](docs/', '](')


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
