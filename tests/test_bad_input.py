"""Each mistake gets one line that names the fix, exit status 2, no loss."""

import importlib.util
import json
import re
import shutil

from conftest import TINY
from conftest import finished
from conftest import run_main
import pytest

from flax_imdb import main


def refused(process, message, status=2):
  """Asserts one line on standard error that matches `message`."""
  assert process.returncode == status, process.stdout + process.stderr
  assert re.fullmatch(r'error: [^\n]+\n', process.stderr), process.stderr
  assert re.search(message, process.stderr), process.stderr
  assert 'Traceback' not in process.stdout


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
    'wrong bool': (['--config.debug=maybe'], 'give true or false'),
    'out of range': (['--config.model.width=0'], 'must be finite, at least 1'),
    'not a number': (
        ['--config.learning_rate=nan'], 'must be finite, at least 0'),
    'dropout of 1': (['--config.model.pooled_dropout=1'], 'under 1'),
    'unknown optimizer': (
        ['--config.optimizer=adm'], 'choose rmsprop, adam, adamw, sgd'),
    'unknown pooling': (
        ['--config.model.pooling=max+min'], 'choose last, mean, max'),
    'unknown data set': (
        ['--config.data.name=imdb'], 'choose imdb_reviews, grammar_reviews'),
    'buckets without a mask': (
        ['--config.model.mask_padding=false'],
        r'give --config\.data\.bucket_width=0'),
    'unknown config': (
        ['--config=configs/no.py'],
        'configs/no.py not found; there are .*configs/quickstart.py'),
    'unknown mode': (['--mode=fly'], r"invalid choice: 'fly'.*see --help"),
    'unknown flag': (['--workdri=x'], 'unknown flag --workdri=x'),
    'words to train': (['hello'], "unexpected 'hello'"),
    'config to eval': (
        ['--mode=eval', '--config.seed=1'],
        'takes the config of the run directory'),
}


@pytest.mark.parametrize('name', FLAGS)
def test_bad_flags(name, tmp_path):
  argv, message = FLAGS[name]
  refused(run_main(*argv, f'--workdir={tmp_path}/run'), message)
  assert not (tmp_path / 'run').exists()


def test_remote_workdir(capsys):
  assert main.main(['--workdir=gs://bucket/run']) == 2
  assert 'remote directories are not supported' in capsys.readouterr().err


def test_batch_that_the_devices_cannot_share(tmp_path):
  refused(run_main(*TINY, f'--workdir={tmp_path}/run',
                   JAX_NUM_CPU_DEVICES='3'),
          'global_batch_size=16 is not divisible by the 3 devices: use 15')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('platform', ['gpux', 'tpu'])
def test_platform_that_is_not_there(platform, tmp_path):
  if platform == 'tpu' and importlib.util.find_spec('libtpu'):
    pytest.skip('libtpu is installed')
  refused(run_main(*TINY, f'--workdir={tmp_path}/run', JAX_PLATFORMS=platform),
          f'no devices for JAX_PLATFORMS={platform!r}: install')


def test_unknown_split(tmp_path):
  refused(run_main(*TINY, f'--workdir={tmp_path}',
                   '--config.data.train_split=tran'),
          "unknown split 'tran': grammar_reviews has train, test|test, train")
  # What was wrong can be put right in the same run directory.
  finished(run_main(*TINY, f'--workdir={tmp_path}', '--config.num_epochs=0'))


def test_missing_data_without_network(tmp_path):
  refused(run_main('--mode=prepare', TFDS_DATA_DIR=str(tmp_path),
                   http_proxy='http://127.0.0.1:9',
                   XDG_CACHE_HOME=str(tmp_path)),
          'cannot download .*configs/quickstart.py, which needs no network')


@pytest.mark.parametrize('mode', ['eval', 'predict'])
def test_empty_workdir(mode, tmp_path):
  refused(run_main(f'--mode={mode}', f'--workdir={tmp_path}', stdin=b'good'),
          r'is no run directory, steps found: \[\]')
  assert not list(tmp_path.iterdir())


def test_workdir_without_checkpoint(trained, tmp_path):
  shutil.copytree(trained[0], tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run' / 'checkpoints')
  refused(run_main('--mode=eval', f'--workdir={tmp_path}/run'),
          r'steps found: \[\]: train first')


@pytest.mark.parametrize('step', ['3', '-1', 'first', '²'])
def test_unknown_step(step, trained):
  refused(run_main('--mode=eval', f'--workdir={trained[0]}', f'--step={step}'),
          rf'has no {step} step, steps found: \[7, 14\]')


def test_workdir_of_another_config(trained, tmp_path):
  shutil.copytree(trained[0], tmp_path / 'run')
  before = (tmp_path / 'run' / 'metrics.jsonl').read_bytes()
  refused(run_main(*TINY, f'--workdir={tmp_path}/run', '--config.seed=5',
                   '--config.model.width=9'),
          'model.width: 8 there, 9 now, seed: 0 there, 5 now')
  assert (tmp_path / 'run' / 'metrics.jsonl').read_bytes() == before


def _with_config(trained, tmp_path, **model):
  shutil.copytree(trained[0], tmp_path / 'run')
  path = tmp_path / 'run' / 'config.json'
  config = json.loads(path.read_text())
  config['model'].update(model)
  path.write_text(json.dumps(config))
  return f'--workdir={tmp_path}/run'


def test_checkpoint_of_other_shapes(trained, tmp_path):
  workdir = _with_config(trained, tmp_path, hidden_dim=9)
  refused(run_main('--mode=predict', workdir, 'good'),
          r'has params/hidden/bias of shape \[16\], the config asks for \[9\]')


def test_damaged_checkpoint(trained, tmp_path):
  workdir = _with_config(trained, tmp_path)
  for file in (tmp_path / 'run' / 'checkpoints' / '14').rglob('d/*'):
    file.write_bytes(file.read_bytes()[:-20])
  refused(run_main('--mode=predict', workdir, '--step=14', 'good'),
          r'checkpoint 14 cannot be restored .* found are \[7, 14\]')


def test_damaged_config_and_tokenizer(trained, tmp_path):
  workdir = _with_config(trained, tmp_path)
  (tmp_path / 'run' / 'tokenizer.json').write_text('{}')
  refused(run_main('--mode=predict', workdir, 'good'),
          'tokenizer.json is not a tokenizer')
  (tmp_path / 'run' / 'config.json').write_text('{"model": ')
  refused(run_main('--mode=predict', workdir, 'good'),
          'config.json is not a config')


def test_input_that_is_not_utf8(trained, tmp_path):
  (tmp_path / 'latin').write_bytes(b'fine\ncaf\xe9\n')
  argv = ['--mode=predict', f'--workdir={trained[0]}']
  refused(run_main(*argv, f'--input={tmp_path}/latin'),
          'latin is not UTF-8 in line 2: convert it')
  refused(run_main(*argv, stdin=b'\xff'), 'standard input is not UTF-8')


def test_no_input(trained, tmp_path):
  argv = ['--mode=predict', f'--workdir={trained[0]}']
  refused(run_main(*argv), 'standard input is empty: give one review a line')
  refused(run_main(*argv, f'--input={tmp_path}/no'), 'cannot read .*/no')
  refused(run_main(*argv, f'--input={tmp_path}/no', 'good'), 'not both')


def test_unwritable_workdir(tmp_path):
  (tmp_path / 'file').write_text('')
  refused(run_main(*TINY, f'--workdir={tmp_path}/file/run'),
          'cannot write to .*: choose another --workdir')


def test_infinite_loss_fails_the_run_and_saves_nothing(tmp_path):
  process = run_main(
      *TINY, f'--workdir={tmp_path}', '--config.learning_rate=1e30',
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
