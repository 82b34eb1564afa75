"""The card follows the run, is read by Hugging Face, and escapes names."""

import html.parser
import json
import os
import re
import shutil
import subprocess
import sys

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
import pytest
from support.command import ROOT, STRICT, finished, run_here
import yaml

from flax_imdb.checkpoint import run
from flax_imdb.config import load_config
from flax_imdb.errors import UserError
from flax_imdb.inference import markdown, model_card

EVIL = ('<script>alert(1)</script>', '](javascript:alert(1))', '`x` | y',
        '``', ' ', '# h', '---', '![i](https://e.example/p.png)',
        'https://e.example', '"q": {a: [1]}', "'", '\\', '&lt;b&gt;', 'null',
        '名前', '\N{GRINNING FACE}', '<img src=x onerror=alert(1)>')


def _card(workdir):
  text = (workdir / model_card.NAME).read_text('utf-8')
  _, header, body = text.split('---\n', 2)
  return yaml.safe_load(header), body


def _summary(workdir):
  return json.loads((workdir / 'summary.json').read_text())


def test_the_header_is_what_hugging_face_reads(trained):
  workdir, _ = trained
  card = ModelCard.load(workdir / model_card.NAME)
  test = _summary(workdir)['test']
  found = {x.metric_type: x for x in card.data.eval_results}
  assert found['accuracy'].metric_value == test['accuracy']
  assert found['f1'].metric_value == test['macro_f1']
  assert found['loss'].dataset_split == 'test[:45]'
  assert found['loss'].dataset_type == 'grammar_reviews'
  assert card.data.model_name == workdir.name
  assert (card.data.license, card.data.language) == ('apache-2.0', ['en'])
  assert card.data.pipeline_tag == 'text-classification'


def test_what_it_says_is_of_the_run(trained):
  workdir, _ = trained
  _, body = _card(workdir)
  summary = _summary(workdir)
  test = summary['test']
  assert f'| test |  | {test["accuracy"]:.4f} ± ' in body
  assert f'error on test is {summary["calibration"]["test"]["ece"]:.4f}' in body
  assert '14 steps of 16 texts' in body and 'from seed 0' in body
  assert f'{summary["parameters"]:,} parameters' in body
  assert '| `config.model.width` | `8` | `32` |' in body
  assert '`config.show_examples`' not in body
  assert 'the first 40 words' in body
  counts = summary['data']
  assert [counts[x]['n'] for x in ('train', 'validation', 'test')] == [
      99, 11, 45]
  for found in counts.values():
    assert sum(found['classes'].values()) == found['n']
  share = counts['test']['classes']['negative'] / 45
  assert f'| test | 45 | `negative` {share:.1%}, ' in body
  found = run.restore(str(workdir), None)
  assert f'knows {found.tokenizer.get_vocab_size() - 4:,} words' in body
  assert f'those of step {found.step}' in body


def test_a_linear_model_stands_beside_and_is_compared(trained_on_every_input):
  workdir, _ = trained_on_every_input
  _, body = _card(workdir)
  linear = _summary(workdir)['linear']['test']
  accuracy = f'{linear["accuracy"]:.4f}'
  assert f'| test | the linear model alone | {accuracy} ± ' in body
  assert f'has an accuracy of {accuracy} on the same test' in body
  assert 'in parts of 20 that know nothing of each other, of which a step of ' \
      'training read 1, drawn anew each time.' in body
  assert 'share no rare names' in body


@pytest.mark.parametrize(('accuracy', 'said'), [
    (0.9, 'to be preferred'), (0.99, 'what this model adds is 0.0900')])
def test_it_says_whether_a_linear_model_would_do(
    accuracy, said, trained_on_every_input):
  summary = _summary(trained_on_every_input[0])
  summary['test'] |= {'accuracy': accuracy, 'n': 1000}
  summary['linear']['test'] |= {'accuracy': 0.9, 'n': 1000}
  assert said in _text(summary=summary)


def _text(labels=('negative', 'positive'), config=None, summary=None,
          name='run'):
  return model_card._text(model_card._Card(
      name, config or load_config('configs/default.py'), tuple(labels), 1000, 7,
      summary or {}, exported=False))


def _of_classes(names):
  """A summary of a run with these classes."""
  scores = {'accuracy': 0.5, 'macro_f1': 0.5, 'loss': 1.0, 'n': 10, 'classes': {
      name: {'precision': 0.5, 'recall': i / 100, 'f1': 0.5, 'support': 10 + i}
      for i, name in enumerate(names)}}
  return {'step': 7, 'evaluated_step': 7, 'stopped_epoch': None, 'seconds': 1.0,
          'parameters': 9, 'test': scores,
          'data': {'test': {'n': 10, 'classes': dict.fromkeys(names, 1)}}}


def test_more_classes_have_a_table_and_the_worst_is_named():
  names = [f'c{i}' for i in range(120)]
  text = _text(names, summary=_of_classes(names))
  assert '| `c119` | 0.5000 | 1.1900 | 0.5000 | 129 |' in text
  assert 'and 20 rarer classes' in text and '| `c19` |' not in text
  assert 'Of the texts of `c0` it finds the fewest, 0.0% of 10.' in text
  assert '`c0` has 10 texts in test' in text


class _Tags(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.tags, self.links = set(), []
  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self.links += [value for name, value in attrs if name in ('href', 'src')]


def test_names_of_a_stranger_are_shown_and_mean_nothing():
  """As GitHub and Hugging Face read it: CommonMark with tables."""
  config = load_config('configs/default.py')
  config.data.name, config.data.train_file = 'files', f'/home/me/{EVIL[2]}.csv'
  config.data.test_split = 'test"\n- evil: 1'
  text = _text(EVIL, config, _of_classes(EVIL), name=EVIL[0])
  header = yaml.safe_load(text.split('---\n', 2)[1])
  assert set(header) == {'license', 'library_name', 'tags', 'pipeline_tag',
                         'metrics', 'model-index'}
  assert header['model-index'][0]['name'] == EVIL[0]
  body = text.split('\n---\n', 1)[1]
  page = MarkdownIt('commonmark').enable(['table']).render(body)
  found = _Tags()
  found.feed(page)
  assert found.tags == {
      'h1', 'h2', 'p', 'code', 'table', 'thead', 'tbody', 'tr', 'th', 'td',
      'pre', 'ul', 'li'}
  assert not found.links
  spans = {html.unescape(x) for x in re.findall('<code>(.*?)</code>', page)}
  shown = {x for x in EVIL if x.strip()}
  assert shown <= spans | {x.replace('\\|', '|') for x in spans}
  assert '/home/me' not in text  # paths are of somebody's machine


@pytest.mark.parametrize(('text', 'span'), [
    ('a', '`a`'), ('', ''), (' ', ''), ('a`b', '``a`b``'), ('`', '`` ` ``'),
    ('``a', '``` ``a ```'), ('a|b', r'`a\|b`'), ('a\nb', '`a\ufffdb`'),
    ('\u202eabc', '`\ufffdabc`'), (7, '`7`')])
def test_a_code_span_shows_any_text(text, span):
  assert markdown.code_span(text) == span


@pytest.mark.parametrize('name', [
    '\x85', '\u2028', '\ud800', '\x00', '\ufeff', 'a: b', '- a',
    '\N{GRINNING FACE}', '*a', '%', '\u202e'])
def test_any_name_is_one_text_in_the_header(name, tmp_path):
  text = _text(summary=_of_classes(['a', 'b']), name=model_card._name(
      f'{tmp_path}/{name}'))
  header = yaml.safe_load(text.encode().decode().split('---\n', 2)[1])
  assert isinstance(header['model-index'][0]['name'], str)


@pytest.mark.slow
def test_its_commands_are_those_that_work(trained, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained[0], workdir)
  text = (workdir / model_card.NAME).read_text()
  commands, = re.findall('```bash\n(.*?)```', text, flags=re.DOTALL)
  assert len(commands.splitlines()) == 3
  for command in commands.splitlines():
    _run(command, workdir)
  folder = workdir / 'export'
  for name in 'requirements.txt', 'serve_export.py':
    shutil.copy(ROOT / 'examples' / name, folder)
  commands, = re.findall('```bash\n(.*?)```', (
      folder / model_card.NAME).read_text(), flags=re.DOTALL)
  install, serve = commands.splitlines()
  assert install == 'pip install -r requirements.txt'
  assert json.loads(_run(serve, folder))['label'] in ('negative', 'positive')


def _run(command, folder):
  process = subprocess.run(
      command.replace('python ', f'{sys.executable} ').replace(
          ' -m ', f' {" ".join(STRICT[:2])} -m '), shell=True, cwd=folder,
      env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True,
      check=False, timeout=300)
  assert process.returncode == 0, process.stderr.decode()
  return process.stdout


def _exported(trained, tmp_path, *flags):
  workdir = tmp_path / 'run'
  shutil.copytree(trained[0], workdir)
  def export():
    return run_here('--mode=export', f'--workdir={workdir}', *flags)
  return workdir, export


def test_an_export_has_the_scores_of_its_weights_alone(trained, tmp_path):
  workdir, export = _exported(trained, tmp_path)
  finished(export())
  header, body = _card(workdir / 'export')
  test = _summary(workdir)['test']
  assert header['model-index'][0]['results'][0]['metrics'][0]['value'] == (
      test['accuracy'])
  assert f'| test |  | {test["accuracy"]:.4f} ± ' in body
  assert 'python serve_export.py .' in body
  assert '--mode=export' not in body

  finished(run_here('--mode=export', f'--workdir={workdir}', '--step=7'))
  assert _summary(workdir)['evaluated_step'] != 7
  header, body = _card(workdir / 'export')
  assert 'model-index' not in header
  assert 'those of step 7, which were not evaluated' in body

  (workdir / 'summary.json').unlink()  # as of a run that was interrupted
  finished(export())
  assert 'which were not evaluated' in _card(workdir / 'export')[1]


def test_a_summary_of_0_1_is_enough(trained, tmp_path):
  workdir, export = _exported(trained, tmp_path)
  summary = _summary(workdir)
  for key in 'data', 'calibration':
    del summary[key]
  for split in 'validation', 'test':
    summary[split] = {key: summary[split][key] for key in (
        'loss', 'accuracy', 'n')}
  (workdir / 'summary.json').write_text(json.dumps(summary))
  finished(export())
  header, body = _card(workdir / 'export')
  assert header['metrics'] == ['accuracy']
  test = summary['test']
  assert (f' ± {model_card._error(test):.4f} |  | {test["loss"]:.4f} | 45 |'
          ) in body
  assert 'Probabilities are those of the logits as they are' in body


@pytest.mark.parametrize(('damaged', 'message'), [
    *((text, 'summary.json is damaged')
      for text in ('', '[]', '7', '[' * 100_000)),
    *((text, 'summary.json is not a summary') for text in (
        '{}', '{"evaluated_step": 14}', '{"evaluated_step": 14, "test": []}',
        '{"evaluated_step": 14, "test": '
        '{"accuracy": "<b>", "macro_f1": 1, "loss": 1, "n": 1}}'))])
def test_a_stranger_s_summary_is_looked_at(
    damaged, message, trained, tmp_path):
  workdir, _ = _exported(trained, tmp_path)
  (workdir / 'summary.json').write_text(damaged)
  with pytest.raises(UserError, match=message):
    model_card.write_export(str(workdir), run.restore(str(workdir), None))
  assert not (workdir / 'export' / model_card.NAME).exists()


def test_pretraining_says_that_it_predicts_no_labels():
  config = load_config('configs/pretrain.py')
  text = _text(config=config, summary={
      'step': 9, 'evaluated_step': 7, 'stopped_epoch': 2, 'seconds': 3.2,
      'parameters': 8, 'data': {'train': {'n': 99}},
      'train': {'loss': 2.0, 'accuracy': 0.5, 'n': 1234},
      'validation': {'loss': 3.0, 'accuracy': 0.25, 'n': 56}})
  header = yaml.safe_load(text.split('---\n', 2)[1])
  assert 'pretraining' in header['tags']
  assert {'pipeline_tag', 'model-index', 'metrics'}.isdisjoint(header)
  assert 'predicts words from their neighbours, and no labels' in text
  assert '| validation | 3.0000 | 0.2500 | 56 |' in text
  assert '--config.init_from=.' in text and '--mode=predict' not in text
  assert 'when it was stopped early' in text
