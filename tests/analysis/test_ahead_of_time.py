"""Compiling for TPUs and GPUs that are not there; most of it needs libtpu."""

import importlib.metadata
import importlib.util
import logging
import re
import runpy

import jax
import pytest
from support.command import ROOT, run_main
from support.compilers import needs_cuda_plugin, needs_libtpu

from flax_imdb import main
from flax_imdb.analysis import ahead_of_time, schedules
from flax_imdb.config import load_config
from flax_imdb.errors import UserError


@pytest.fixture
def config():
  config = load_config('configs/debug.py')
  config.global_batch_size = 32
  config.ema_decay = 0.9  # averaged weights are donated, too
  return config


TPUS = [('v4:2x2x1', 4, 'TPU v4'), ('v5e:1x1', 1, 'TPU v5 lite'),
        ('v6e:2x2', 4, 'TPU v6 lite'), ('v5e:4x4', 16, 'TPU v5 lite')]


@needs_libtpu
@pytest.mark.parametrize('topology, devices', [t[:2] for t in TPUS])
def test_a_tpu_compiles_the_real_programs(config, topology, devices):
  _check(config, topology, devices)


@needs_libtpu
def test_the_schedules_of_a_tpus_kernels_are_in_the_estimate(config):
  config.model.update(cell='lstm', recurrence='kernel')
  program = ahead_of_time.compile_program(
      config, ahead_of_time.describe('v5e:1x1'), 8, True)
  (forward,), (backward,) = ([  # of the batch, which is one chunk
      depths for name, depths in program['bundles'].items()
      if re.fullmatch(rf'lstm_{way}_1x1x\d+\.\d+', name)]
      for way in ('forward', 'backward'))
  assert len(forward) == len(backward) == 2
  assert 50 < forward[1] < backward[1] < 2000
  found = schedules.estimate(program['hlo'], program['bundles'])
  assert found.unread == 0
  assert 5 * (forward[1] + backward[1]) <= found.kernel_cycles
  assert found.kernel_cycles < found.cycles / 2


@needs_libtpu
def test_a_tpu_compiles_a_model_of_every_input():
  """The table of pairs is changed in place, and is part of the all-reduce."""
  config = load_config('configs/default.py')
  config.data.update(vocab_size=300, max_length=60, segment_length=20)
  config.model.update(embedding_dim=4, width=4)
  config.adversarial_norm = 0.3
  devices = ahead_of_time.describe('v5e:2x2')
  train, evaluate = (ahead_of_time.compile_program(
      config, devices, 4, training) for training in (True, False))
  assert train['all_reduces'] == 1 and evaluate['all_reduces'] == 0
  assert train['donated_arrays'] == train['state_arrays'] > 30
  table = config.data.bigrams * 4 * 4 / 2**20  # MiB
  assert train['alias_mib'] > 3 * table  # with Adam's two moments


@needs_cuda_plugin
def test_a_gpu_compiles_the_real_programs(config):
  _check(config, 'cuda:h100x2', 2)


@pytest.fixture
def small_memory(monkeypatch):
  """448 MiB a device: the largest batch is found in seconds."""
  monkeypatch.setattr(ahead_of_time, 'MEMORY', dict.fromkeys(
      ahead_of_time.MEMORY, 7 / 16))
  level = logging.getLogger('absl').level
  yield
  logging.getLogger('absl').setLevel(level)  # the command line changes it


def _command_line(capsys, topology, devices, kind):
  """Runs the command line in this process; checks what it prints."""
  assert main.main(
      ['--mode=compile', f'--topology={topology}', '--config=configs/debug.py',
       '--config.debug=false', '--config.data.max_length=100',
       '--config.model.width=32',
       '--config.global_batch_size=32']) == 0
  printed = capsys.readouterr().out
  first, train, evaluate, largest = re.fullmatch(
      r'(.*\n.*\n)(train: (?:.*\n){4})(evaluate: (?:.*\n){3})'
      r'the largest batch, .*:\n((?:.*\n)*)', printed).groups()
  assert first.startswith(f'{topology}: {devices} x {kind} of 0.4375 GiB each')
  assert f'with {"libtpu" if "TPU" in kind else "jax-cuda12-plugin"} ' in first
  arrays, = re.findall(r'; (\d+) of \1 arrays of the state are donated', train)
  assert int(arrays) > 20 and 'nothing to donate' in evaluate
  for program, all_reduces in ((train, int(devices > 1)), (evaluate, 0)):
    assert re.match(rf'\w+: {32 // devices} reviews a device, 100 tokens each, '
                    r'compiled in \d+\.\d s\n  \d+\.\d MiB a device: ', program)
    assert f'all-reduces: {all_reduces};' in program
  estimate = train.splitlines()[-1].removeprefix('  estimate: ')
  assert re.fullmatch(
      r'\d\.\d\d M cycles, \d\.\d\d ms at 1\.\d+ GHz, by the compiler; not .*'
      if 'TPU' in kind else r'[\d,]{5,} kernels a step', estimate)
  *tried, last = largest.splitlines()
  sizes = {int(rows.replace(',', '')): int(mib.replace(',', ''))
           for rows, mib in re.findall(
               r'  ([\d,]+) reviews a device: ([\d,]+) MiB$', largest,
               re.MULTILINE)}
  most = int(re.search(r'with: ([\d,]+) reviews', last)[1].replace(',', ''))
  assert most == max(sizes) * devices and max(sizes.values()) <= 448
  assert len(tried) >= 2 and sizes[most // devices] > 224


@needs_libtpu
@pytest.mark.parametrize('topology, devices, kind', [
    pytest.param(*tpu, marks=[pytest.mark.slow] * (i > 1))
    for i, tpu in enumerate(TPUS)])
def test_the_command_line_for_a_tpu(
    capsys, small_memory, topology, devices, kind):
  _command_line(capsys, topology, devices, kind)


@needs_cuda_plugin
def test_the_command_line_for_a_gpu(capsys, small_memory):
  _command_line(capsys, 'cuda:h100x2', 2, 'NVIDIA H100 80GB HBM3')


def _check(config, topology, n):
  devices = ahead_of_time.describe(topology)
  assert len(devices) == n
  count = runpy.run_path(str(ROOT / 'benchmarks/accelerators.py'))['count']
  train, evaluate = (ahead_of_time.compile_program(
      config, devices, config.global_batch_size // n, training)
      for training in (True, False))
  train, evaluate = (x | count(x['hlo']) for x in (train, evaluate))
  assert train['all_reduces'] == (n > 1)
  assert train['loops'] == 2  # forward and backward
  assert train['donated_arrays'] == train['state_arrays'] > 0
  assert train['alias_mib'] == pytest.approx(train['output_mib'], rel=0.2)
  assert 0 < train['peak_mib'] < 100
  assert train['loop_kernels'] > 0 and train['loop_mib'] > 0
  assert (train['loop_cycles'] > 0) == (topology[0] == 'v')
  assert evaluate['all_reduces'] == evaluate['donated_arrays'] == 0
  assert evaluate['loops'] == 1
  assert 0 < evaluate['peak_mib'] < 100


@pytest.mark.parametrize('refuses', [True, False])
@pytest.mark.parametrize('mib_a_review, on_chip', [
    (0.001, 0), (0.5, 100), (0.5, 2000), (20, 0), (500, 0), (20_000, 0)])
def test_the_largest_batch_fits_and_one_much_larger_does_not(
    config, monkeypatch, mib_a_review, on_chip, refuses):
  compiled = {}
  def compile_program(config, devices, rows, training, class_count):
    assert training
    mib = 10 + max(0, mib_a_review * rows - on_chip)  # MiB
    compiled[rows] = {} if refuses and mib > 16_384 else {'peak_mib': mib}
    return compiled[rows]

  monkeypatch.setattr(ahead_of_time, 'compile_program', compile_program)
  largest = ahead_of_time.largest_batch(config, [None] * 4, 16, print)
  most = (16_374 + on_chip) / mib_a_review
  assert most * 0.8 - 1 <= largest / 4 <= most
  assert largest == 0 or compiled[largest // 4]['peak_mib'] <= 16_384
  assert len(compiled) < 14


def test_what_no_longer_fits_on_the_chip_is_found_from_above(
    config, monkeypatch):
  """1,100 reviews need nothing, 1,101 need 9 MiB each: the trend misleads."""
  tried = []
  def compile_program(config, devices, rows, training, class_count):
    tried.append(rows)
    mib = 10 + (9 * rows if rows > 1100 else 0)
    return {'peak_mib': mib}

  monkeypatch.setattr(ahead_of_time, 'compile_program', compile_program)
  largest = ahead_of_time.largest_batch(config, [None], 16, print)
  assert 1536 <= largest <= 1819  # of 1,819 that fit
  assert len(tried) <= 5, tried


@needs_libtpu
def test_nothing_is_left_in_the_cache_of_compiled_programs(config):
  # Warnings are errors here: a second time jax would fail to read it.
  devices = ahead_of_time.describe('v5e:2x2')
  cache_from = jax.config.jax_persistent_cache_min_compile_time_secs
  for _ in range(2):
    assert ahead_of_time.compile_program(config, devices, 8, False)
  assert jax.config.jax_persistent_cache_min_compile_time_secs == cache_from


@needs_libtpu
def test_a_tpu_multiplies_float32_in_bfloat16(config):
  """So the default needs no other model.dtype there."""
  devices = ahead_of_time.describe('v5e:1x1')
  def compiled(precision):
    with jax.default_matmul_precision(precision):
      program = ahead_of_time.compile_program(config, devices, 8, True)
    return re.findall(
        r'^ .* = .*', re.sub(r'metadata=\{.*?\}', '', program['hlo']),
        re.MULTILINE)
  default = compiled(None)
  assert default == compiled('bfloat16') != compiled('highest')
  assert len(default) > 100


@needs_libtpu
def test_an_arrangement_that_cannot_be_is_refused():
  with pytest.raises(UserError, match=r"'v5e:3x3': give one such as .*\("):
    ahead_of_time.describe('v5e:3x3')


@pytest.mark.parametrize(
    'topology', ['', 'v5e', 'v5e:2', 'v9:2x2', 'cuda:a100', 'v5e:2x2x2',
                 'v4:2x2', 'v6e:2x2\n', 'cuda:h100x2x', 'v5e:2x2 '])
def test_an_unknown_topology_is_refused(topology):
  with pytest.raises(UserError, match='give one such .*v5e:2x2.*cuda:h100'):
    ahead_of_time.describe(topology)


@pytest.mark.parametrize('topology, fix', [
    ('v5e:2x2', r"pip install 'flax_imdb\[aot\]'$"),
    ('cuda:h100', 'pip install jax-cuda12-plugin jax-cuda12-pjrt$')])
def test_a_compiler_that_is_missing_is_named(topology, fix, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=fix):
    ahead_of_time.describe(topology)


@pytest.mark.parametrize('argv', [
    ['--mode=compile'], ['--topology=v5e:2x2'],
    ['--mode=eval', '--topology=v5e:2x2']])
def test_a_topology_and_the_mode_go_together(argv, capsys):
  assert main.main(argv) == 2
  assert capsys.readouterr().err == (
      'error: --mode=compile and --topology=NAME, such as v5e:2x2, go '
      'together: give both or neither\n')


def _refused(topology, *argv):
  """What the command line says in its one line on standard error."""
  process = run_main('--mode=compile', f'--topology={topology}', *argv,
                     JAX_PLATFORMS=None)
  assert process.returncode == 2, process.stderr
  *noise, error = process.stderr.splitlines()
  # Without a driver the CUDA plugin logs so when it is loaded, whoever asks.
  assert not noise or 'Could not find cuda drivers' in noise[-1]
  assert error.startswith('error: ')
  return error


def test_the_command_line_refuses_an_unknown_topology():
  assert "no topology 'v9:2x2': give one such as" in _refused('v9:2x2')


@needs_libtpu
def test_the_command_line_refuses_what_libtpu_refuses():
  assert "no topology 'v5e:3x3': give one such as" in _refused('v5e:3x3')
  assert _refused('v5e:4x4', '--config.global_batch_size=24').endswith(
      'by the 16 devices of v5e:4x4: use 16')


def test_a_batch_that_does_not_divide_is_refused(config, monkeypatch):
  monkeypatch.setattr(ahead_of_time, 'describe', lambda topology: [None] * 5)
  with pytest.raises(UserError, match='by the 5 devices of v5e:1x5: use 30'):
    ahead_of_time.compile_for(config, 'v5e:1x5', print)


def test_a_batch_that_does_not_fit_is_refused(config, monkeypatch):
  monkeypatch.setattr(
      ahead_of_time, 'describe', lambda topology: 4 * jax.devices()[:1])
  monkeypatch.setattr(importlib.metadata, 'version', lambda name: '1.0')
  monkeypatch.setattr(ahead_of_time, 'compile_program', lambda *args: {})
  with pytest.raises(UserError, match='=32 does not fit into v5e:2x2: use a s'):
    ahead_of_time.compile_for(config, 'v5e:2x2', print)
