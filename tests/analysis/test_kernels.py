"""What compilers say of the kernels, for TPUs and GPUs that are not there."""

import importlib.util
import runpy

import pytest
from support.command import ROOT

needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec('libtpu'),
    reason='libtpu is not installed (pip install .[aot])')
needs_cuda_plugin = pytest.mark.skipif(
    not importlib.util.find_spec('jax_cuda12_plugin'),
    reason='the CUDA plugin is not installed '
    '(pip install jax-cuda12-plugin jax-cuda12-pjrt)')
needs_ptxas = pytest.mark.skipif(
    not importlib.util.find_spec('nvidia.cuda_nvcc')
    if importlib.util.find_spec('nvidia') else True,
    reason='ptxas is not installed (pip install nvidia-cuda-nvcc-cu12)')


@pytest.fixture
def benchmark(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  return runpy.run_path(str(ROOT / 'benchmarks/kernels.py'))


@needs_cuda_plugin
@needs_ptxas
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shape', [(500, 128, 35, 32), (100, 192, 32, 64)])
def test_an_h100_takes_it_whole(benchmark, shape, dtype):
  row = benchmark['gpu_row']('gpu', shape, dtype, 1, False)
  assert row['kernels'] <= 10
  assert row['registers'] <= 255 and row['spilled'] == 0
  assert row['shared_kib'] < 228


@needs_cuda_plugin
@needs_ptxas
@pytest.mark.parametrize('shape', [(500, 128, 35, 32), (100, 192, 32, 32)])
def test_it_takes_less_memory_than_the_scan(benchmark, shape):
  kernel, scan = (benchmark['gpu_row'](form, shape, 'float32')
                  for form in ('gpu', 'scan'))
  assert kernel['peak_mib'] < scan['peak_mib']
  assert kernel['kernels'] < 40 < 20 * shape[0] < scan['kernels']
