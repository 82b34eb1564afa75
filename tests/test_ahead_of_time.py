"""Compiling for TPUs and GPUs that are not there; most of it needs libtpu."""

import importlib.util

import jax
import pytest

from flax_imdb import ahead_of_time
from flax_imdb import config as config_lib
from flax_imdb.errors import UserError

needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec('libtpu'),
    reason='libtpu is not installed (pip install .[aot])')
needs_cuda_plugin = pytest.mark.skipif(
    not importlib.util.find_spec('jax_cuda12_plugin'),
    reason='the CUDA plugin is not installed '
    '(pip install jax-cuda12-plugin jax-cuda12-pjrt)')


@pytest.fixture
def config():
  config = config_lib.load('configs/debug.py')
  config.global_batch_size = 32
  config.ema_decay = 0.9  # averaged weights are donated, too
  return config


@needs_libtpu
@pytest.mark.parametrize('topology, devices', [
    ('v4:2x2x1', 4), ('v5e:1x1', 1), ('v5e:4x4', 16), ('v6e:2x2', 4)])
def test_a_tpu_compiles_the_real_programs(config, topology, devices):
  report = ahead_of_time.compile_for(config, topology, search=False)
  assert report['devices'] == devices
  _check(report)


@needs_cuda_plugin
def test_a_gpu_compiles_the_real_programs(config):
  report = ahead_of_time.compile_for(config, 'cuda:h100x2', search=False)
  assert report['devices'] == 2
  _check(report)


def _check(report):
  train, evaluate = report['train'], report['evaluate']
  assert train['all_reduces'] == (report['devices'] > 1)
  assert train['loops'] == 2  # forward and backward
  assert train['donated_arrays'] == train['state_arrays'] > 0
  assert train['alias_mib'] == pytest.approx(train['output_mib'], rel=0.2)
  assert 0 < train['peak_mib'] < 100
  assert train['loop_kernels'] > 0 and train['loop_mib'] > 0
  assert evaluate['all_reduces'] == evaluate['donated_arrays'] == 0
  assert evaluate['loops'] == 1
  assert 0 < evaluate['peak_mib'] < 100


@pytest.mark.parametrize('refuses', [True, False])
@pytest.mark.parametrize('mib_a_review, on_chip', [
    (0.001, 0), (0.5, 100), (0.5, 2000), (20, 0), (500, 0), (20_000, 0)])
def test_the_largest_batch_fits_and_one_much_larger_does_not(
    config, monkeypatch, mib_a_review, on_chip, refuses):
  compiled = {}
  def compile_program(config, devices, rows, training):
    assert training
    mib = 10 + max(0, mib_a_review * rows - on_chip)  # MiB
    compiled[rows] = {} if refuses and mib > 16_384 else {'peak_mib': mib}
    return compiled[rows]

  monkeypatch.setattr(ahead_of_time, 'compile_program', compile_program)
  largest = ahead_of_time.largest_batch(config, [None] * 4, 16)
  most = (16_374 + on_chip) / mib_a_review
  assert most * 0.8 - 1 <= largest / 4 <= most
  assert largest == 0 or compiled[largest // 4]['peak_mib'] <= 16_384
  assert len(compiled) < 14


@needs_libtpu
def test_nothing_is_left_in_the_cache_of_compiled_programs(config):
  # Warnings are errors here: a second time jax would fail to read it.
  devices = ahead_of_time.describe('v5e:2x2')
  cache_from = jax.config.jax_persistent_cache_min_compile_time_secs
  for _ in range(2):
    assert ahead_of_time.compile_program(config, devices, 8, False)
  assert jax.config.jax_persistent_cache_min_compile_time_secs == cache_from


@needs_libtpu
def test_an_arrangement_that_cannot_be_is_refused():
  with pytest.raises(UserError, match=r"'v5e:3x3': give one such as .*\("):
    ahead_of_time.describe('v5e:3x3')


@pytest.mark.parametrize(
    'topology', ['', 'v5e', 'v5e:2', 'v9:2x2', 'cuda:a100'])
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


def test_a_batch_that_does_not_divide_is_refused(config, monkeypatch):
  monkeypatch.setattr(ahead_of_time, 'describe', lambda topology: [None] * 5)
  with pytest.raises(UserError, match='by the 5 devices of v5e:1x5: use 30'):
    ahead_of_time.compile_for(config, 'v5e:1x5')


def test_a_batch_that_does_not_fit_is_refused(config, monkeypatch):
  monkeypatch.setattr(ahead_of_time, 'describe', lambda topology: [None] * 4)
  monkeypatch.setattr(ahead_of_time, 'compile_program', lambda *args: {})
  with pytest.raises(UserError, match='=32 does not fit into v5e:2x2: use a s'):
    ahead_of_time.compile_for(config, 'v5e:2x2')
