"""Each mistake gets one line that names the fix, exit status 2, no loss.

Most are made in this process, which takes milliseconds; of each kind one is
made as a user makes it, and so are those that end before or after `main`.
"""

import errno
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from support.command import (
  ROOT,
  STRICT,
  TINY,
  run_here,
  run_main,
  standard_input,
)

from flax_imdb import main
from flax_imdb.checkpoint.manager import Checkpoints
from flax_imdb.data import grammar, sources
from flax_imdb.errors import TransientError, UserError
from flax_imdb.storage import disk, files
from flax_imdb.train.writers import Writers

QUICK = '--config=configs/quickstart.py'
OWN = ('--config=configs/texts.py', '--config.data.train_file=wrong.csv')
PREPARE = (QUICK, '--mode=prepare')
PREDICT = ('--mode=predict', '--workdir={run}')


def refused(process, message, status=2):
  """Asserts one line on standard error that matches `message`."""
  assert process.returncode == status, process.stdout + process.stderr
  assert re.fullmatch(r'error: [^\n]+\n', process.stderr), process.stderr
  assert re.search(message, process.stderr), process.stderr
  assert 'Traceback' not in process.stdout


def _contents(folder):
  """{path: bytes} of all files below; of others None."""
  return {path: path.read_bytes() if path.is_file() else None
          for path in folder.rglob('*') if not path.is_dir()}


@pytest.fixture
def refuses(tmp_path, trained, monkeypatch, capsys):
  """Call it with words and a pattern to make a mistake in this process.

  {tmp} in a word is the working directory, {run} a finished run's.
  """
  monkeypatch.chdir(tmp_path)

  def refuses(argv, message, stdin=b''):
    argv = [word.replace('{tmp}', str(tmp_path)).replace('{run}', str(
        trained[0])) for word in argv]
    before = [_contents(folder) for folder in (tmp_path, trained[0])]
    with standard_input(stdin):
      assert main.main(argv) == 2
    output, error = capsys.readouterr()
    assert re.fullmatch(r'error: [^\n]{,700}\n', error), error
    assert re.search(message, error), error
    assert 'Traceback' not in output
    after = [_contents(folder) for folder in (tmp_path, trained[0])]
    assert before == after  # nothing is made, and nothing lost
  return refuses


FLAGS = {
    'unknown field': (
        ['--config.learning_rat=1'],
        r'config\.learning_rat is not a field; there are .*learning_rate'),
    'field without a value': (['--config.seed'], 'unknown flag --config.seed'),
    'value apart': (['--config.seed', '3'], "unexpected '3': write fields as"),
    'unknown group': (['--config.modle.width=3'], 'is not a field'),
    'a group itself': (['--config.model=3'], 'is not a field'),
    'wrong type': (
        ['--config.num_epochs=many'],
        'config.num_epochs=many: give a whole number, such as'),
    'fraction for a whole number': (
        ['--config.model.width=1.5'], 'give a whole number'),
    'exponent for a whole number': (
        ['--config.num_epochs=1e3'], 'give a whole number'),
    'empty number': (['--config.seed='], 'give a whole number'),
    'wrong bool': (['--config.debug=maybe'], 'give true or false'),
    'out of range': (['--config.model.width=0'], 'must be finite, at least 1'),
    'too wide': (['--config.model.width=99999'], 'must be at most 8,192'),
    'too many epochs': (['--config.num_epochs=1000000'], 'at most 50,000'),
    'warmup for ever': (['--config.warmup_epochs=1e30'], 'at most 50,000'),
    'rate beyond float32': (['--config.learning_rate=1e39'], r'at most 1e\+38'),
    'batch too large': (
        ['--config.global_batch_size=1000000'], 'a batch of this config takes'),
    'model too large': (
        ['--config.data.vocab_size=1000000',
         '--config.model.embedding_dim=1000'],
        '1,200,.* parameters, more than 268,435,456: lower config.data.vocab'),
    'fewer examples than none': (
        ['--config.show_examples=-1'], 'must be finite, at least 0'),
    'seed of 33 bits': ([f'--config.seed={1 << 32}'], 'must be under 42949'),
    'not a number': (
        ['--config.learning_rate=nan'], 'must be finite, at least 0'),
    'dropout of 1': (['--config.model.pooled_dropout=1'], 'under 1'),
    'negative validation': (
        ['--config.data.validation_fraction=-1'], 'at least 0 and under 1'),
    'unknown optimizer': (
        ['--config.optimizer=adm'], 'choose rmsprop, adam, adamw, sgd'),
    'unknown pooling': (
        ['--config.model.pooling=max+min'], 'choose last, mean, max'),
    'unknown data set': (
        ['--config.data.name=imdb'], 'imdb is not in .*tfds build imdb'),
    'files, and none is given': (
        ['--config=configs/texts.py'],
        r'give --config\.data\.train_file=FILE, such as reviews.csv'),
    'a file of another data set': (
        ['--config.data.test_file=test.csv'],
        'test_file is not of config.data.name=imdb_reviews: give --config=con'),
    'files, and nothing to test with': (
        [*OWN, '--config.data.test_fraction=0'],
        'test_fraction=0 leaves nothing to test with: give --config.data.test'),
    'no name of a data set': (
        ['--config.data.name=reviews.csv'], 'give imdb_reviews, grammar_rev'),
    'buckets without a mask': (
        ['--config.model.mask_padding=false',
         '--config.data.segment_length=0'],
        r'give --config\.data\.bucket_width=0'),
    'segments without a mask': (
        ['--config.model.mask_padding=false'],
        r'give --config\.data\.segment_length=0'),
    'a word index and punctuation': (
        ['--config.data.word_index=imdb_word_index.json'],
        r'give --config\.data\.punctuation=false'),
    'inputs that there are not': (
        ['--config.model.inputs=words+trigrams'], 'choose words, or words'),
    'a read of segments without these': (
        ['--config.data.read=spread', '--config.data.segment_length=0'],
        r'give --config\.data\.segment_length=100'),
    'unknown config': (
        ['--config=configs/no.py'],
        'configs/no.py not found; there are .*configs/quickstart.py'),
    'config of a long name': ([f'--config={"x" * 300}.py'], 'not found; there'),
    'config is a directory': (['--config={tmp}'], 'not found; there are'),
    'no config': (['--config='], 'not found; there are'),
    'unknown mode': (['--mode=fly'], r'--mode=fly: choose train, .*see --help'),
    'mode without a value': (['--mode'], 'expected one argument; see --help'),
    'unknown split': (
        ['--mode=eval', '--split=val'], 'choose train, validation, test; see'),
    'unknown format': (
        ['--mode=export', '--format=onnx'], 'choose stablehlo, keras; see'),
    'unknown flag': (['--workdri=x'], 'unknown flag --workdri=x'),
    'short flag': (['-q'], 'unknown flag -q'),
    'words to train': (['hello'], "unexpected 'hello'"),
    'config to eval': (
        ['--mode=eval', '--config.seed=1'],
        'takes the config of the run directory, but for --config.debug'),
    'patience without validation': (
        ['--config.data.validation_fraction=0',
         '--config.early_stopping.patience=2'],
        'no score to stop early by: give --config.early_stopping.patience=0'),
    'step to train': (['--step=3'], 'eval or predict or serve or .*tra'),
    'split to predict': (
        ['--mode=predict', '--split=train'], '--split is for --mode=eval, not'),
    'input to eval': (
        ['--mode=eval', '--input=x'], '--input is for --mode=predict, not'),
    'json to eval': (['--mode=eval', '--json'], '--json is for --mode=predict'),
    'values to train': (
        ['--set', 'model.width=1,2'], '--set is for --mode=sweep, not for'),
    'seeds to tune': (
        ['--mode=tune', '--minutes=1', '--seeds=2'], '--seeds is for .*=sweep'),
    'jobs to eval': (['--mode=eval', '--jobs=2'], '--jobs is for --mode=sweep'),
    'minutes to train': (['--minutes=1'], '--minutes is for --mode=tune, not'),
    'no minutes to tune': (['--mode=tune'], 'tune needs --minutes=N, such as'),
    'minutes of no number': (
        ['--mode=tune', '--minutes=nan'], 'must be finite, and over 0'),
    'no seeds': (['--mode=sweep', '--seeds=0'], '--seeds=0: must be at least'),
    'no jobs': (['--mode=sweep', '--jobs=0'], '--jobs=0: must be at least 1'),
    'more jobs than cores': (
        ['--mode=sweep', '--jobs=99999'], '--jobs=99999: there are .* cores'),
    'values of no field': (
        ['--mode=sweep', '--set', 'model.widht=1'], 'widht is not a field'),
    'no values': (
        ['--mode=sweep', '--set', 'model.width'],
        '--set model.width: write it as --set FIELD=VALUE,VALUE'),
    'a value of the wrong type, the last': (
        ['--mode=sweep', '--set', 'model.width=8,many'],
        r'config\.model\.width=many: give a whole number'),
    'a value out of range, the last': (
        ['--mode=sweep', '--set', 'model.width=8,0'], 'finite, at least 1'),
    'a value twice': (
        ['--mode=sweep', '--set', 'learning_rate=1e-3,0.001'],
        '--set gives learning_rate=0.001 twice'),
    'a field twice': (
        ['--mode=sweep', '--set', 'model.width=1', '--set', 'model.width=2'],
        '--set model.width is given twice: give all values in one'),
    'values for seeds': (
        ['--mode=sweep', '--set', 'seed=1,2'], 'leave it out; --seeds=N takes'),
    'a sweep without validation': (
        ['--mode=sweep', '--set', 'data.validation_fraction=0.1,0'],
        'validation_fraction=0 leaves nothing to choose by'),
    'a sweep of seeds beyond 32 bits': (
        ['--mode=sweep', f'--config.seed={(1 << 32) - 1}'], 'be under 42949'),
    'a sweep in a run directory': (
        ['--mode=sweep', '--workdir={run}'], 'is itself a run directory: give'),
    'a sweep in a bucket': (
        ['--mode=sweep', '--workdir=gs://bucket/sweep'], 'on a disk: give'),
    'some of three': (
        ['--coordinator_address=localhost:8476'],
        'also need --num_processes and --process_id'),
    'address without a port': (
        ['--coordinator_address=localhost', '--num_processes=2',
         '--process_id=0'], 'write it as HOST:PORT'),
    'address with an empty part': (
        ['--coordinator_address=10.0.0..1:8476', '--num_processes=2',
         '--process_id=1'], 'write it as HOST:PORT'),
    'an empty page': (
        [*PREDICT, 'good', '--explain', '--html='], '--html is empty: give a'),
    'an empty workdir': (['--workdir='], '--workdir is empty: give a value'),
    'processes in words': (['--num_processes=two'], "invalid int value: 'two'"),
    'too many processes': (
        ['--coordinator_address=localhost:1', f'--num_processes={10**20}',
         '--process_id=0'], 'must be at least 1, and under 65536'),
    'process out of range': (
        ['--coordinator_address=localhost:1', '--num_processes=2',
         '--process_id=2'], 'must be 0 to 1'),
    'several to predict': (
        ['--mode=predict', '--coordinator_address=localhost:1',
         '--num_processes=2', '--process_id=0'], 'runs in one process'),
    'remote workdir': (
        ['--workdir=s3://bucket/run'], 'remote directories are not supported'),
    'no UTF-8': (['--workdir={tmp}/\udcff'], 'is not UTF-8: rename or convert'),
    'no UTF-8 in a field': (
        ['--config.data.train_split=\udcff'], 'is not UTF-8: rename or'),
}


@pytest.mark.parametrize('name', FLAGS)
def test_bad_flags(name, refuses):
  refuses(*FLAGS[name])


CONFIG = ('from flax_imdb import config as config_lib\n'
          'def get_config():\n'
          '  config = config_lib.own("quickstart")\n  ')
CONFIGS = {
    'syntax': ('def get_config(:', 'c.py: SyntaxError'),
    'no UTF-8': (b'x = "\xff"', 'c.py: SyntaxError'),
    'no get_config': ('x = 1', 'c.py: AttributeError.*get_config'),
    'no function': ('get_config = 3', 'c.py: TypeError'),
    'an argument': ('def get_config(x): pass', 'missing 1 required'),
    'an import': ('import no_such', 'No module named .no_such'),
    'an exit': ('raise SystemExit(0)', 'c.py: SystemExit'),
    'an error': (CONFIG + 'return 1 / 0', 'ZeroDivisionError'),
    'a dict': (CONFIG + 'return {}', 'returns no ConfigDict'),
    'a missing field': (
        CONFIG + 'del config.model["width"]\n  return config',
        'config.model.width is missing: compare with configs/default.py'),
    'a field too many': (
        CONFIG + 'config.x = 1\n  return config', 'config.x is not a field'),
    'no group': (
        CONFIG + 'config.model = None\n  return config', 'config.model is not'),
    'a list': (
        CONFIG + 'config.optimizer = ["adam"]\n  return config', 'TypeError'),
    'out of range': (
        CONFIG + 'config.model.layers = 0\n  return config', 'at least 1'),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_bad_config_files(name, refuses, tmp_path, monkeypatch):
  monkeypatch.setattr(sys, 'dont_write_bytecode', True)
  text, message = CONFIGS[name]
  (tmp_path / 'c.py').write_bytes(
      text if isinstance(text, bytes) else text.encode())
  refuses(['--config={tmp}/c.py'], message)


# What --input or standard input holds; None is no file.
TEXTS = {
    'Latin-1': (b'fine\ncaf\xe9\n', 'is not UTF-8 in line 2: convert it'),
    'UTF-16': ('good'.encode('utf-16'), 'is not UTF-8 in line 1: convert it'),
    'binary': (bytes(range(256)), 'is not UTF-8'),
    'nothing': (b'', 'is empty: give one review a line'),
    'a book in a line': (
        b'good\n' + b'bad ' * (1 << 19),
        'more than 1,048,576 characters in line 2: give one review a line'),
    'a book without an end': (
        b'good\n' + bytes(5 << 20),
        'more than 1,048,576 characters in line 2: give one review a line'),
}


@pytest.mark.parametrize('name', TEXTS)
@pytest.mark.parametrize('piped', [False, True])
def test_bad_texts(name, piped, refuses, tmp_path):
  text, message = TEXTS[name]
  if piped:
    refuses(PREDICT, f'standard input .*{message}|standard input {message}',
            stdin=text)
  else:
    (tmp_path / 'texts').write_bytes(text)
    refuses([*PREDICT, '--input={tmp}/texts'], f'/texts .*{message}|{message}')


INPUTS = {
    'is missing': (['--input={tmp}/no'], 'cannot read .*/no .No such file'),
    'is a directory': (['--input={tmp}'], 'cannot read .*Is a directory'),
    'never ends': (['--input=/dev/zero'],
                   'more than 1,048,576 characters in line 1: give one'),
    'has a long name': ([f'--input={"x" * 300}'], 'File name too long'),
    'and words': (['--input=x', 'good'], 'not both'),
    'is the page': (
        ['--input={tmp}/x', '--explain', '--html={tmp}/./x'],
        'would take the place of what --input is to read'),
    'and a page in no folder': (
        ['good', '--explain', '--html={tmp}/no/page.html'],
        'cannot write .*/no/page.html .No such file.*: give another --html'),
    'and a page of nothing': (
        ['good', '--html={tmp}/page.html'], 'give --explain as well'),
    'words not UTF-8': (['caf\udce9'], 'is not UTF-8'),
}


@pytest.mark.parametrize('name', INPUTS)
def test_bad_inputs(name, refuses):
  argv, message = INPUTS[name]
  refuses([*PREDICT, *argv], message)


def test_closed_input(refuses):
  refuses(PREDICT, 'standard input is empty: give one review a line',
          stdin=None)


# What was done to a copy of a run directory, what is asked, what is answered.
def _json(**changed):
  def change(run):
    path = run / 'config.json'
    config = json.loads(path.read_text())
    config['model'].update(changed)
    path.write_text(json.dumps(config))
  return change


def _write(name, content=b''):
  return lambda run: (run / name).write_bytes(content)


def _without(*names, then=lambda run: None):
  def change(run):
    for name in names:
      path = run / name
      shutil.rmtree(path) if path.is_dir() else path.unlink()
    then(run)
  return change


def _directory(name):
  return _without(name, then=lambda run: (run / name).mkdir())


def _cut(run):
  for file in (run / 'checkpoints' / '14').rglob('d/*'):
    file.write_bytes(file.read_bytes()[:-20])


EVAL, ASK = ('--mode=eval',), ('--mode=predict', 'good')
RUNS = {
    'of other shapes': (
        _json(hidden_dim=9), ASK,
        r'has params/hidden/bias of shape \[16\], the config asks for \[9\]'),
    'of another structure': (
        _json(layers=2), ASK, 'holds other arrays than this version saves'),
    'a damaged checkpoint': (
        _cut, [*ASK, '--step=14'],
        r'checkpoint 14 cannot be restored .* found are \[7, 14\]'),
    'a damaged tokenizer': (
        _write('tokenizer.json', b'{}'), ASK, 'json is not a tokenizer'),
    'no tokenizer': (
        _without('tokenizer.json'), ASK, 'tokenizer.json .No such file.*copy'),
    'half a calibration': (
        _write('calibration.json', b'{"step": 7, '), ASK,
        'json is not a calibration .*copy it again'),
    'no temperature': (
        _write('calibration.json', b'{"step": 7}'), ['--mode=export'],
        'json is not a calibration'),
    'a calibration that is a directory': (
        _directory('calibration.json'), ASK,
        'calibration.json .Is a directory.: copy'),
    'half a config': (
        _write('config.json', b'{"model": '), ASK, 'json is not a config'),
    'a config that is a directory': (
        _directory('config.json'), ASK, 'config.json .Is a directory.: copy'),
    'no config': (
        _without('config.json'), EVAL, r'no run directory, steps found: \[\]'),
    'no checkpoints': (
        _without('checkpoints'), EVAL, r'steps found: \[\]: train first'),
    'a file for checkpoints': (
        _without('checkpoints', then=_write('checkpoints')), EVAL,
        r'steps found: \[\]: train first'),
    'a file for checkpoints to train': (
        _without('checkpoints', then=_write('checkpoints')), TINY,
        'cannot write .*/checkpoints .File exists'),
    'a directory 07': (
        lambda run: (run / 'checkpoints/7').rename(run / 'checkpoints/07'),
        EVAL, '07 is none that a run makes: move it'),
    'a directory for metrics': (
        _directory('metrics.jsonl'), TINY, 'metrics.jsonl .Is a directory'),
    'a damaged line': (
        _write('metrics.jsonl', b'{"step"\n'), TINY, 'has a damaged line'),
    'another config': (
        lambda run: None, [*TINY, '--config.seed=5', '--config.model.width=9'],
        'model.width: 8 there, 9 now, seed: 0 there, 5 now'),
    'step 3': (lambda run: None, [*EVAL, '--step=3'], 'has no 3 step'),
    'step 9999': (
        lambda run: None, [*EVAL, '--step=9999'], r'found: \[7, 14\]: choose'),
    'step -1': (lambda run: None, [*EVAL, '--step=-1'], 'has no -1 step'),
    'the first step': (lambda run: None, [*EVAL, '--step=first'], 'no first'),
    'step ²': (lambda run: None, [*EVAL, '--step=²'], 'has no ² step'),
    'no step': (lambda run: None, [*EVAL, '--step='], 'choose one with --step'),
    'pooling for Keras': (
        lambda run: None, ['--mode=export', '--format=keras'],
        'needs config.model.pooling=last'),
    'a report beside nothing': (
        lambda run: None, ['--mode=report', '{tmp}/no'], 'no run directory'),
}


@pytest.mark.parametrize('name', RUNS)
def test_bad_run_directories(name, refuses, trained, tmp_path):
  change, argv, message = RUNS[name]
  shutil.copytree(trained[0], tmp_path / 'copy')
  change(tmp_path / 'copy')
  refuses([*argv, '--workdir={tmp}/copy'], message)


# A run that is not yet: what can be asked for, and is not there.
NEW = {
    'empty to eval': (EVAL, r'is no run directory, steps found: \[\]'),
    'empty to predict': (ASK, r'is no run directory, steps found: \[\]'),
    'empty to export': (['--mode=export'], 'is no run directory'),
    'below a file': ([*TINY, '--workdir={tmp}/file/run'], 'choose another --w'),
    'a file': ([*TINY, '--workdir={tmp}/file'], 'choose another --workdir'),
    'a file to eval': ([*EVAL, '--workdir={tmp}/file'], 'is no run directory'),
    'a long name': ([*TINY, f'--workdir={"x" * 300}'], 'File name too long'),
    'a long name to predict': (
        [*ASK, f'--workdir={"x" * 300}'], 'File name too long'),
    'unknown split': (
        [*TINY, '--config.data.train_split=tran'],
        "unknown split 'tran': grammar_reviews has train, test"),
    'unknown test split': (
        [*TINY, '--config.data.test_split=tst'], "unknown split 'tst'"),
    'open split': (
        [*TINY, '--config.data.train_split=train[:10%'], "such as 'train.:10%"),
    'empty split': (
        [*TINY, '--config.data.train_split=train[5:3]'], 'selects no reviews'),
    'no split': ([*TINY, '--config.data.train_split='], "unknown split ''"),
    'one review': (
        [*TINY, '--config.data.train_split=train[:1]'],
        'the validation split has no reviews: see'),
    'weights that are missing': (
        [*TINY, '--config.init_from={tmp}/no.npz'], 'no.npz cannot be read'),
    'weights of no kind': (
        [*TINY, '--config.init_from={tmp}/file'], 'is no Keras weights: give'),
    'weights of another model': (
        [*TINY, '--config.init_from={run}', '--config.model.width=9'],
        r'of shape \[32\], the config asks for \[36\]'),
}


@pytest.mark.parametrize('name', NEW)
def test_bad_new_runs(name, refuses, tmp_path):
  argv, message = NEW[name]
  (tmp_path / 'file').write_text('')
  refuses(['--workdir={tmp}/new', *argv], message)


# One of each kind of mistake; tests/data/test_texts.py has many.
WRONG_TEXTS = {
    'no file': (None, r'train_file=wrong\.csv: there is no such file, seen fr'),
    'no rows': (b'text,label\n', 'there are no rows to learn from'),
    'columns of other names': (
        b'a,b,c\n1,2,3\n', r'has the columns a, b, c: say .*data\.text_field'),
    'an open quote': (b'text,label\n"a,b\n', 'line 2: a quote opens here'),
    'one class': (b'text,label\na,b\nc,b\n', 'there is one class, b, and'),
    'Latin 1': ('text,label\nschön,b\n'.encode('latin-1'),
                'line 2: the byte 0xf6 is not UTF-8; CP1252 would fit: iconv'),
    'too few rows': (b'text,label\na,b\nc,d\n', 'none of the 2 rows is in the'),
}


@pytest.mark.parametrize('name', WRONG_TEXTS)
def test_wrong_texts(name, refuses, tmp_path):
  content, message = WRONG_TEXTS[name]
  if content is not None:
    (tmp_path / 'wrong.csv').write_bytes(content)
  refuses([*OWN, '--workdir={tmp}/new'], message)


def test_wrong_texts_as_a_user_gives_them(tmp_path):
  path = tmp_path / 'wrong.csv'
  path.write_bytes(b'text,label\nhello, you,b\n')
  process = run_main(OWN[0], f'--config.data.train_file={path}',
                     f'--workdir={tmp_path}/new', '--mode=prepare')
  refused(process, f'error: {path}, line 2: 3 cells, but line 1 names 2')


@pytest.mark.slow
def test_random_changes_of_right_files(tmp_path):
  process = subprocess.run(
      [sys.executable, ROOT / 'tests/hostile/fuzz_texts.py', '--seconds=10'],
      cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(ROOT)}, timeout=300,
      capture_output=True, check=False)
  assert process.returncode == 0, process.stderr.decode()
  read, refusals = re.search(rb': ([\d,]+) read, ([\d,]+) refused',
                            process.stdout).groups()
  assert read != b'0' and refusals != b'0'


HALF = f'half/{sources.PATHS["imdb_reviews"]}'
ENVIRONMENT = {
    'data are a file': ({'TFDS_DATA_DIR': '{tmp}/file'}, ['--mode=prepare'],
                        'set TFDS_DATA_DIR to a directory that can be written'),
    'data are remote': ({'TFDS_DATA_DIR': 'gs://x'}, ['--mode=prepare'],
                        'which only TensorFlow can read: copy'),
    'data are nobody\'s': (
        {'TFDS_DATA_DIR': '~nobody-here/x'}, ['--mode=prepare'],
        'there is no such home directory: set it to another'),
    'data are half there': ({'TFDS_DATA_DIR': '{tmp}/half'}, ['--mode=prepare'],
                            'has no readable dataset_info.json: delete it'),
    'data are not UTF-8': (
        {'TFDS_DATA_DIR': '/\udcff'}, ['--mode=prepare'], 'is not UTF-8'),
    'cache is a file': ({'XDG_CACHE_HOME': '{tmp}/file'}, PREPARE,
                        'set XDG_CACHE_HOME to a directory that can be writt'),
    'cache is the kernel\'s': ({'XDG_CACHE_HOME': '/proc'}, PREPARE,
                               'set XDG_CACHE_HOME to a directory that can be'),
    'home is the kernel\'s': ({'XDG_CACHE_HOME': '', 'HOME': '/proc'}, PREPARE,
                              'set XDG_CACHE_HOME to a directory that can be'),
    'cache is not UTF-8': (
        {'XDG_CACHE_HOME': '/\udcff'}, PREPARE, 'is not UTF-8'),
    'no devices': ({'JAX_NUM_CPU_DEVICES': '0'}, PREPARE,
                   "'0', not a positive whole number: unset it, or correct it"),
    'devices in words': (
        {'JAX_NUM_CPU_DEVICES': 'two'}, PREPARE, 'not a positive whole number'),
    'no threads': ({'NPROC': '-1'}, PREPARE, 'not a positive whole number'),
    'few threads': ({'NPROC': '1'}, PREPARE, 'NPROC=1 threads are too few'),
}


@pytest.mark.parametrize('name', ENVIRONMENT)
def test_bad_environment(name, refuses, tmp_path, monkeypatch):
  variables, argv, message = ENVIRONMENT[name]
  (tmp_path / 'file').write_text('')
  (tmp_path / HALF).mkdir(parents=True)
  for variable, value in variables.items():
    monkeypatch.setenv(variable, value.replace('{tmp}', str(tmp_path)))
  refuses(argv, message)


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch, capsys):
  (tmp_path / 'gone').mkdir()
  monkeypatch.chdir(tmp_path / 'gone')
  (tmp_path / 'gone').rmdir()
  assert main.main(['--mode=eval']) == 2
  assert 'the working directory is no longer there' in capsys.readouterr().err


# Disks that fail.


def test_a_disk_that_fills_while_reviews_are_written(
    refuses, tmp_path, monkeypatch):
  def full(self, *args, **kwargs):
    raise RuntimeError('Failed to finalize writing of split "train": write() '
                       'failed: No space left on device; writing x; at byte 9')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  builder = grammar.GrammarReviews
  monkeypatch.setattr(builder, 'download_and_prepare', full)
  refuses(PREPARE, 'grammar_reviews .*No space left on device.: set XDG_CACHE')
  def broken(self, *args, **kwargs):
    raise RuntimeError('another')
  monkeypatch.setattr(builder, 'download_and_prepare', broken)
  with pytest.raises(RuntimeError, match='another'):  # our own is not hidden
    main.main([*PREPARE])


def test_a_disk_that_fails_where_checkpoints_are_opened_or_set_aside(
    tmp_path, monkeypatch):
  with Checkpoints(str(tmp_path)) as checkpoints:
    (tmp_path / 'damaged').write_text('')
    with pytest.raises(UserError, match=r'cannot write .*damaged.*make room'):
      checkpoints._aside(1)
  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr(pathlib.Path, 'mkdir', full)
  with pytest.raises(
      TransientError, match=r'cannot write .*/checkpoints \(No space'):
    Checkpoints(str(tmp_path))


def test_a_disk_that_fails_where_events_are_written(tmp_path, monkeypatch):
  writers = Writers(str(tmp_path), 0)
  append = disk.append
  def full(path, content):
    if path.name.startswith('events'):
      raise OSError(errno.ENOSPC, 'No space left on device')
    append(path, content)
  monkeypatch.setattr(disk, 'append', full)
  with pytest.raises(
      TransientError, match=r'cannot write .*/events\S* \(No space'):
    writers.write({'step': 1, 'loss': 1.0}, {})


def test_a_reader_that_has_seen_enough_is_no_failure():
  with pytest.raises(BrokenPipeError):
    with files.writing('standard output'):
      raise BrokenPipeError


def test_a_text_is_predicted_the_same_in_parts(trained, tmp_path, capsys,
                                               monkeypatch):
  (tmp_path / 'texts').write_text('good film\n\nbad film\n' * 20)
  argv = ['--mode=predict', f'--workdir={trained[0]}',
          f'--input={tmp_path}/texts']
  assert main.main(argv) == 0
  whole = capsys.readouterr().out
  monkeypatch.setattr('flax_imdb.inference.predict._PART_BYTES', 5000)
  assert main.main(argv) == 0
  assert capsys.readouterr().out == whole and whole.count('\n') == 60


# As a user makes them.


def test_a_bad_flag_as_a_user_gives_it(tmp_path):
  refused(run_main('--config.seed=x', f'--workdir={tmp_path}/run'),
          'give a whole number')
  assert not (tmp_path / 'run').exists()


def test_a_bad_config_file_as_a_user_gives_it(tmp_path):
  (tmp_path / 'c.py').write_text('def get_config(:')
  refused(run_main(f'--config={tmp_path}/c.py'), 'c.py: SyntaxError')


@pytest.mark.slow
def test_a_bad_text_as_a_user_gives_it(trained):
  refused(run_main('--mode=predict', f'--workdir={trained[0]}', stdin=b'\xff'),
          'standard input is not UTF-8')


@pytest.mark.slow
def test_a_bad_workdir_as_a_user_gives_it(tmp_path):
  refused(run_main('--mode=predict', f'--workdir={tmp_path}', stdin=b'good'),
          r'is no run directory, steps found: \[\]')
  assert not list(tmp_path.iterdir())


def test_words_that_are_not_utf8_as_a_user_gives_them(trained):
  refused(run_main('--mode=predict', f'--workdir={trained[0]}',
                   os.fsdecode(b'caf\xe9')), 'is not UTF-8')


@pytest.mark.parametrize(('variable', 'value', 'message'), [
    ('JAX_ENABLE_X64', 'maybe', "jax cannot start .*'JAX_ENABLE_X64'.: corr"),
    ('JAX_PLATFORMS', 'gpux', "no devices for JAX_PLATFORMS='gpux': install"),
    ('JAX_PLATFORMS', 'tpu', "no devices for JAX_PLATFORMS='tpu': install"),
    ('JAX_NUM_CPU_DEVICES', '3',
     'global_batch_size=16 is not divisible by the 3 devices: use 15')])
def test_a_bad_environment_as_a_user_sets_it(
    variable, value, message, tmp_path):
  if value == 'tpu' and importlib.util.find_spec('libtpu'):
    pytest.skip('libtpu is installed')
  refused(run_main(*TINY, f'--workdir={tmp_path}/run', **{variable: value}),
          message)
  assert not (tmp_path / 'run').exists()


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
@pytest.mark.parametrize('mode', [
    pytest.param('eval', marks=pytest.mark.slow), 'predict'])
def test_standard_output_that_is_full(mode, trained, capfd):
  # Not run_main, which reads it.
  descriptor = os.open('/dev/full', os.O_WRONLY)
  program = [sys.executable, *STRICT, '-m', 'flax_imdb.main',
             f'--mode={mode}', f'--workdir={trained[0]}']
  process = subprocess.run(
      program + ['good'] * (mode == 'predict'), cwd=ROOT, stdout=descriptor,
      env=os.environ | {'PYTHONUNBUFFERED': ''}, stderr=subprocess.PIPE,
      check=False, timeout=300)
  os.close(descriptor)
  assert process.returncode == 69  # a disk that is full may soon not be
  assert re.fullmatch(rb'error: cannot write standard output \(No space left '
                      rb'[^\n]+\n', process.stderr), process.stderr


def test_standard_output_that_is_closed():
  process = subprocess.run(
      f'{shlex.quote(sys.executable)} -m flax_imdb.main --mode=eval >&-',
      shell=True, cwd=ROOT, stderr=subprocess.PIPE, check=False, timeout=300)
  assert process.returncode == 2
  assert process.stderr == (
      b'error: standard output is closed: add > /dev/null\n')


def test_missing_data_without_network(tmp_path):
  refused(run_main('--mode=prepare', TFDS_DATA_DIR=str(tmp_path),
                   http_proxy='http://127.0.0.1:9',
                   XDG_CACHE_HOME=str(tmp_path)),
          'cannot download .*configs/quickstart.py, which needs no network',
          status=69)


@pytest.mark.parametrize('field', [
    'data.train_split=tran', 'data.test_split=tst', 'init_from=no.npz'])
def test_what_was_wrong_can_be_put_right_in_the_same_directory(
    field, tmp_path, capsys):
  argv = [*TINY, f'--workdir={tmp_path}', '--config.num_epochs=0']
  assert main.main([*argv, f'--config.{field}']) == 2
  capsys.readouterr()
  assert main.main(argv) == 0


def test_infinite_loss_fails_the_run_and_saves_nothing(tmp_path):
  process = run_here(
      *TINY, f'--workdir={tmp_path}', '--config.data.max_length=20',
      '--config.learning_rate=1e30',
      '--config.clip_norm=0', '--config.optimizer=sgd')
  refused(process, 'not finite', status=1)
  assert not (tmp_path / 'checkpoints' / '7').exists()


def test_debug_shows_the_traceback(tmp_path):
  process = run_main(*TINY, '--config.debug=true', f'--workdir={tmp_path}',
                     '--config.data.train_split=tran')
  assert process.returncode == 1
  assert 'Traceback' in process.stderr and 'UserError' in process.stderr


def test_a_message_of_several_lines_becomes_one(capsys):
  assert main._fail('one\ntwo\n  three', 1) == 1
  assert capsys.readouterr() == ('', 'error: one two three\n')
