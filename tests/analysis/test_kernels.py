"""What compilers say of the kernels, for TPUs and GPUs that are not there."""

import runpy

import pytest
from support.command import ROOT
from support.compilers import needs_cuda_plugin, needs_libtpu, needs_ptxas


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


# Bundles a time step of both directions and passes, measured 2026-11-28 with
# libtpu 0.0.50.1, plus 5 %. A kernel that multiplied x and h apart has some 5 %
# more of 512 reviews, one that took a step at a time a tenth.
@needs_libtpu
@pytest.mark.parametrize('topology, shape, bundles', [
    ('v5e:1x1', (100, 128, 32, 32), 600), ('v5e:1x1', (100, 16, 35, 32), 610),
    ('v5e:1x1', (100, 192, 35, 32), 980), ('v4:2x2x1', (100, 128, 32, 32), 740),
    ('v6e:1x1', (100, 128, 32, 32), 520)])
def test_a_tpus_kernel_keeps_to_its_budget(benchmark, topology, shape, bundles):
  row = benchmark['tpu_row']('tpu', shape, topology=topology)
  assert bundles / 2 < row['bundles'] < bundles
  assert row['kernels'] < 40


@needs_libtpu
def test_a_scan_has_more_bundles_and_thousands_of_operations(benchmark):
  kernel, scan = (benchmark['tpu_row'](form, (100, 128, 32, 32))
                  for form in ('tpu', 'scan'))
  assert kernel['bundles'] < scan['bundles'] / 3
  assert scan['kernels'] > 30 * 100 > 40 > kernel['kernels']
