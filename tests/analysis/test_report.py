"""The page of --mode=report: what it says, and that nothing in it executes."""

import html.parser
import importlib.util
import json
import pathlib
import re
import shlex
import shutil
import struct

import jax
import pytest
from support.command import TINY, finished, run_here

from flax_imdb import cli
from flax_imdb.analysis import figures, findings, mistakes, report
from flax_imdb.config import differences, read_config
from flax_imdb.errors import TransientError, UserError

FIGURES = {'loss', 'accuracy', 'confusion', 'roc', 'precision-recall',
           'reliability', 'length', 'rates', 'gradient-hidden-state',
           'gradient-cell-state', 'gradient-embedded-input'}
# What a review might hold, and what is seen of it where that differs.
HOSTILE = {
    '<script>alert(1)</script>': '', '</p></article><img src=x onerror=f>': '',
    '"><style>*{display:none}</style>': '', '&lt;b&gt; &amp; {{ 7 * 7 }}': '',
    'emoji \U0001f600\U0001f44d\U0001f3fd': '', 'סרט טוב \u202eabc': '',
    'nul 0 and bell \a': 'nul \u2400 and bell \u2407'}
NAMES = '<b>good</b>', 'רע $x^2$'  # of the classes


class Reader(html.parser.HTMLParser):
  """The elements of a page with their attributes, and the text of articles."""

  def __init__(self, page):
    super().__init__()
    self.elements, self.texts, self.inside, self.open = [], [], False, []
    self.feed(page)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in ('meta', 'link'):
      self.open.append(tag)
    if tag == 'p' and ('class', 'text') in attrs:
      self.inside = True
      self.texts.append('')

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag
    self.inside = self.inside and tag != 'p'

  def handle_data(self, data):
    if self.inside:
      self.texts[-1] += data

  def values(self, *keys):
    return [attributes[key] for _, attributes in self.elements for key in keys
            if key in attributes]


def _report(*workdirs):
  """What it prints, and the page."""
  output = finished(run_here(
      '--mode=report', f'--workdir={workdirs[0]}', *map(str, workdirs[1:])))
  return output, (workdirs[0] / 'report' / 'index.html').read_text('utf-8')


def _copied(trained, folder):
  shutil.copytree(trained[0], folder / 'run')
  return folder / 'run'


@pytest.fixture(scope='module')
def reported(tmp_path_factory):
  """(run directory, what was printed, its page), of texts that are hostile.

  Each is there for both classes, but for an unknown word: one is a mistake.
  """
  folder = tmp_path_factory.mktemp('report')
  def write(name, rows):
    (folder / name).write_text(''.join(
        json.dumps({'text': text, 'label': label}) + '\n'
        for text, label in rows), 'utf-8')
  write('train.jsonl', [(f'{word} {"film " * 20} {i}', label)
                        for i in range(30)
                        for word, label in zip('ab', NAMES, strict=True)])
  write('test.jsonl', [(f'{text} {letter}', label) for text in HOSTILE
                       for letter, label in zip('xy', NAMES, strict=True)])
  finished(run_here(
      '--config=configs/texts.py', '--config.num_epochs=1',
      f'--config.data.train_file={folder}/train.jsonl',
      f'--config.data.test_file={folder}/test.jsonl',
      '--config.model.inputs=words', '--config.model.width=4',
      '--config.model.embedding_dim=4', '--config.min_steps_per_epoch=1',
      '--config.global_batch_size=16', '--config.data.vocab_size=50',
      '--config.data.max_length=40', '--config.data.segment_length=20',
      '--config.adversarial_norm=0', f'--workdir={folder}/run'))
  read = mistakes.sources.read_texts
  def with_nul(*args):  # which no file of one's own may hold
    texts, labels = read(*args)
    return [text.replace('nul 0', 'nul \0') for text in texts], labels
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mistakes.sources, 'read_texts', with_nul)
    return folder / 'run', *_report(folder / 'run')


def test_it_has_all_figures_inside_and_as_png(reported):
  workdir, output, page = reported
  read = Reader(page)
  assert not read.open  # each element is closed
  drawn = [attributes for tag, attributes in read.elements if tag == 'svg']
  assert len(drawn) == len(FIGURES)
  for attributes in drawn:
    assert attributes['role'] == 'img' and len(attributes['aria-label']) > 20
  for name in FIGURES:
    image = (workdir / 'report' / f'{name}.png').read_bytes()
    assert image[:8] == b'\x89PNG\r\n\x1a\n'
    assert struct.unpack('>2I', image[16:24])[0] >= 600
  assert f'and {len(FIGURES)} figures in' in output
  assert len(page.encode()) < 3_000_000
  ids = read.values('id')
  assert ids and len(ids) == len(set(ids))
  used = {x.removeprefix('#') for x in read.values('href')
          if x.startswith('#')} | set(re.findall(r'url\(#([^)]*)\)', page))
  assert used and used <= set(ids)


def test_it_says_what_the_run_wrote(reported):
  workdir, _, page = reported
  summary = json.loads((workdir / 'summary.json').read_text())
  for number in (summary['test']['accuracy'], summary['test']['loss'],
                 summary['calibration']['test']['ece']):
    assert f'<dd class="value">{number:.4f}</dd>' in page
  assert f'<dd class="value">{summary["parameters"]:,}</dd>' in page
  assert summary['params_sha256'] in page
  assert summary['environment']['jax'] == jax.__version__
  for name, where in summary['environment'].items():
    assert (f'<th scope="row">{name}</th><td class="text">{where}</td>') in page
  baseline = json.loads((workdir / 'report' / 'baseline.json').read_text())
  assert f'<td>{baseline["test"]["accuracy"]:.4f}</td>' in page
  wrong = round(summary['test']['n'] * (1 - summary['test']['accuracy']))
  assert page.count('<article>') == min(wrong, 8) > 0
  assert 'width=device-width' in page and 'class="missing"' not in page


def test_its_command_trains_the_same(reported):
  workdir, _, page = reported
  command = html.unescape(re.search(
      r'<pre>(python .*?)</pre>', page, re.DOTALL)[1])
  argv = shlex.split(command.replace('\\\n', ''))  # as a shell does
  assert argv[:3] == ['python', '-m', 'flax_imdb.main']
  args, config = cli.parse(argv[3:])
  assert not differences(config, read_config(workdir / 'config.json'))
  assert args.workdir.endswith('runs/run_again')


def _check_nothing_runs(page):
  read = Reader(page)
  assert not {tag for tag, _ in read.elements} & {
      'script', 'img', 'iframe', 'object', 'embed', 'form', 'base', 'b',
      'foreignObject', 'foreignobject', 'audio', 'video'}
  assert sum(tag == 'style' for tag, _ in read.elements) == 1
  for _, attributes in read.elements:
    assert not [key for key in attributes if key.startswith('on')]
    assert 'src' not in attributes
  for target in read.values('href', 'xlink:href'):
    assert target.startswith('#') or target == 'data:,'
  assert not re.search(r'url\((?!#)|@import|https?:', page)
  policy = [attributes['content'] for tag, attributes in read.elements
            if attributes.get('http-equiv') == 'Content-Security-Policy']
  assert policy and "default-src 'none'" in policy[0]
  assert 'script-src' not in policy[0]
  assert not set(page) & {*map(chr, range(9)), '\x0b', '\x1b', '\x7f'}
  return read


def test_what_a_review_or_a_class_holds_stays_text(reported):
  _, _, page = reported
  read = _check_nothing_runs(page)
  shown = {text.rstrip('xy').rstrip() for text in read.texts}
  assert shown == {seen or text for text, seen in HOSTILE.items()}
  for name in NAMES:
    assert page.count(html.escape(name)) > 3
    # In figures, too, where it is no mathematics.
    assert f'>{html.escape(name, quote=False)}</text>' in page
  assert {x for tag, x in ((tag, attributes.get('dir')) for tag, attributes
                           in read.elements if tag == 'p') if x} == {'auto'}


def _broken(change, trained, folder):
  workdir = _copied(trained, folder)
  change(workdir)
  return run_here('--mode=report', f'--workdir={workdir}')


@pytest.mark.parametrize('name, content, message', [
    ('metrics.jsonl', b'{"epoch": 1}\n', 'has a damaged line'),
    ('metrics.jsonl', b'\xff\0\n', 'metrics.jsonl is damaged'),
    ('metrics.jsonl', b'[' * 100_000 + b'\n', 'metrics.jsonl is damaged'),
    ('metrics.jsonl', b'{"epoch": 1, "step": 7, "train": {"loss": "<b>"}}\n',
     'has a damaged line'),
    ('metrics.jsonl', b'{"epoch": 1, "step": 7, "train": {"accuracy": 1, '
     b'"n": 1, "loss": 1' + b'0' * 400 + b'}}\n', 'has a damaged line'),
    ('summary.json', b'{', 'summary.json is damaged'),
    ('summary.json', b'[]', 'summary.json is damaged'),
    ('summary.json', b'{"step": -1}', 'summary.json is damaged'),
    ('config.json', b'{}', 'config.json')])
def test_a_damaged_file_is_one_line(name, content, message, trained, tmp_path):
  process = _broken(lambda run: (run / name).write_bytes(content),
                    trained, tmp_path)
  assert process.returncode == 2 and not process.stdout
  assert re.fullmatch(f'error: .*{message}.*\n', process.stderr)
  assert not (tmp_path / 'run' / 'report').exists()


def test_a_line_comes_once_and_in_order(trained, tmp_path):
  def twice(run):
    lines = (run / 'metrics.jsonl').read_bytes()
    (run / 'metrics.jsonl').write_bytes(lines * 2)
  assert 'has a damaged line' in _broken(twice, trained, tmp_path).stderr


@pytest.fixture
def no_data(monkeypatch):
  """As if there were no network, and nothing prepared."""
  def prepare(data, announce):
    raise TransientError('cannot download <it>: no network')
  monkeypatch.setattr(findings.sources, 'prepare', prepare)


def test_without_data_it_has_what_the_run_wrote(trained, no_data, tmp_path):
  workdir = _copied(trained, tmp_path)
  output, page = _report(workdir)
  assert 'left out. The data is not at hand: cannot download <it>' in output
  assert page.count('The data is not at hand: cannot download &lt;it&gt;: no '
                    'network.</p>') == 4
  found = {x.stem for x in (workdir / 'report').glob('*.png')}
  assert found == {'loss', 'accuracy', 'confusion', 'reliability', 'rates'}
  summary = json.loads((workdir / 'summary.json').read_text())
  assert f'<dd class="value">{summary["test"]["accuracy"]:.4f}</dd>' in page


def test_an_older_run_does_not_say_where_it_was_trained(
    trained, no_data, tmp_path):
  workdir = _copied(trained, tmp_path)
  summary = json.loads((workdir / 'summary.json').read_text())
  del summary['environment']
  (workdir / 'summary.json').write_text(json.dumps(summary))
  _, page = _report(workdir)
  assert 'of a version that did not write that down.</p>' in page
  assert '<th scope="row">jax</th>' not in page


def test_of_a_run_that_has_only_begun_it_says_so(trained, no_data, tmp_path):
  workdir = _copied(trained, tmp_path)
  (workdir / 'summary.json').unlink()
  (workdir / 'metrics.jsonl').write_bytes(b'')
  for events in workdir.glob('events.*'):
    events.write_bytes(events.read_bytes()[:50] + b'\xff' * 9)
  shutil.rmtree(workdir / 'checkpoints')
  _, page = _report(workdir)
  for said in ('It has not ended yet.', 'no epoch has ended',
               'there is no summary.json', 'The weights cannot be opened:',
               'steps found: []', 'No events for TensorBoard'):
    assert said in page, said
  assert '<svg' not in page and 'None' not in Reader(page).texts


def test_a_last_line_that_is_half_written_is_left_out(
    trained, no_data, tmp_path):
  workdir = _copied(trained, tmp_path)
  content = (workdir / 'metrics.jsonl').read_bytes()
  (workdir / 'metrics.jsonl').write_bytes(content[:-20])
  _, page = _report(workdir)
  assert 'in 1 epoch of' in page


def test_no_test_split_is_a_sentence(trained, tmp_path):
  workdir = _copied(trained, tmp_path)
  config = json.loads((workdir / 'config.json').read_text())
  config['data']['test_split'] = 'tst'
  (workdir / 'config.json').write_text(json.dumps(config))
  (workdir / 'summary.json').unlink()
  output, page = _report(workdir)
  said = 'It could not be evaluated on test: unknown split &#39;tst&#39;'
  assert said in page and "unknown split 'tst'" in output
  assert {x.stem for x in (workdir / 'report').glob('*.png')} == {
      'loss', 'accuracy', 'rates', 'gradient', 'gradient-hidden-state',
      'gradient-cell-state', 'gradient-embedded-input'}


def test_what_is_missing_is_told_before_anything_is_done(monkeypatch, tmp_path):
  with monkeypatch.context() as patch:
    patch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='needs jinja2, matplotlib, scikit-'
                       r"learn: pip install 'flax_imdb\[report\]'"):
      report.report([str(tmp_path)], print)
  with pytest.raises(UserError, match='21 runs are more than the 20'):
    report.report([f'{tmp_path}/{i}' for i in range(21)], print)


@pytest.mark.slow
def test_several_runs_are_compared(trained, tmp_path, monkeypatch):
  """Two seeds are a group, of which the mean and its error are told."""
  workdirs = [_copied(trained, tmp_path)]
  for flags in ('--config.seed=1',), ('--config.model.cell=simple_rnn',):
    workdirs.append(tmp_path / f'other{len(workdirs)}')
    finished(run_here(*TINY, *flags, f'--workdir={workdirs[-1]}'))
  monkeypatch.chdir(tmp_path)
  # The first counts once, whatever it is called.
  _, page = _report(*workdirs, workdirs[0], workdirs[0].relative_to(tmp_path))
  read = _check_nothing_runs(page)
  where = f'<td class="text">{jax.__version__}</td>'
  accuracies = [json.loads((x / 'summary.json').read_text())['test']['accuracy']
                for x in workdirs]
  mean = (accuracies[0] + accuracies[1]) / 2
  error = abs(accuracies[0] - accuracies[1]) / 2
  assert f'<td>{mean:.4f} ±\u00a0{error:.4f}</td>' in page
  assert f'<td>{accuracies[2]:.4f}</td>' in page
  assert 'model.cell=lstm' in page and '--config.seed=1, each' in page
  names = {x.stem for x in (workdirs[0] / 'report').glob('*.png')}
  assert names == FIGURES - {'confusion'} | {
      'confusion-0', 'confusion-1', 'gradient'}
  assert sum(tag == 'details' for tag, _ in read.elements) == 3
  assert f'<th scope="row">jax</th>{2 * where}' in page


AXE = next((pathlib.Path(spec.submodule_search_locations[0])
            for name in ('axe_playwright_python', 'axe_selenium_python',
                         'axe_core_python')
            if (spec := importlib.util.find_spec(name))), None)
SIZES = [(width, scheme) for width in (390, 1200)
         for scheme in ('light', 'dark')]


@pytest.fixture(scope='module')
def browser():
  """Headless Chromium that keeps what pages print and ask for."""
  webdriver = pytest.importorskip('selenium.webdriver')
  if not (program := shutil.which('chromium') or shutil.which('google-chrome')):
    pytest.skip('no Chromium is installed')
  options = webdriver.ChromeOptions()
  options.binary_location = program
  for flag in ('headless=new', 'no-sandbox', 'disable-gpu'):
    options.add_argument(f'--{flag}')
  options.set_capability(
      'goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
  driver = shutil.which('chromedriver')
  found = webdriver.Chrome(options, webdriver.ChromeService(driver))
  yield found
  found.quit()


def _open(browser, workdir, width, scheme):
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {
      'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': True})
  browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [
      {'name': 'prefers-color-scheme', 'value': scheme}]})
  browser.get_log('performance')
  address = (workdir / 'report' / 'index.html').as_uri()
  browser.get(address)
  messages = [json.loads(x['message'])['message']
              for x in browser.get_log('performance')]
  asked = [x['params']['request']['url'] for x in messages
           if x['method'] == 'Network.requestWillBeSent']
  return [x for x in asked if x != address and not x.startswith('data:')]


@pytest.mark.slow
@pytest.mark.parametrize('width, scheme', SIZES)
def test_in_a_browser_nothing_runs_and_nothing_is_asked_for(
    width, scheme, browser, reported):
  assert _open(browser, reported[0], width, scheme) == []
  assert browser.get_log('browser') == []
  def script(text):
    return browser.execute_script(f'return {text}')
  assert script('document.scripts.length') == 0
  # It is as wide as the window, and as dark as was asked for.
  assert script('document.documentElement.scrollWidth') == width
  background = script('getComputedStyle(document.body).backgroundColor')
  assert (background == 'rgb(255, 255, 255)') == (scheme == 'light')
  # The figures' text has the colour of the page's.
  assert script('getComputedStyle(document.body).color') == script(
      "getComputedStyle(document.querySelector('svg text')).fill")


@pytest.mark.slow
@pytest.mark.skipif(not AXE, reason='axe-core is not installed: pip install '
                    'axe-playwright-python')
@pytest.mark.parametrize('width, scheme', SIZES)
def test_axe_finds_nothing(width, scheme, browser, reported):
  _open(browser, reported[0], width, scheme)
  browser.execute_script(next(AXE.rglob('axe.min.js')).read_text('utf-8'))
  found = browser.execute_async_script('''
      document.querySelectorAll('details').forEach(x => x.open = true);
      axe.run().then(arguments[0])''')
  assert found['passes'] and not [
      (x['id'], x['nodes'][0]['html']) for x in found['violations']]


def test_every_colour_of_a_figure_is_a_variable_of_the_page():
  page = pathlib.Path(report.__file__).with_name('report.html').read_text()
  for colour, variable in figures.VARIABLES.items():
    assert page.count(f'{variable}: {colour}') == 1  # light
    assert page.count(f'{variable}: ') == 2  # and dark
  assert page.count('dark)') == page.count('@media screen and (prefers-color-'
                                           'scheme: dark)') == 1  # not printed
