"""The GPU's kernels against the scan, on a CPU; compiled for an H100 besides.

What a GPU computes is not seen here: `interpret` runs the kernels' operations
one by one, where nothing can race.
"""

import functools
import importlib.util
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.command import ROOT

from flax_imdb.cluster.devices import data_parallel
from flax_imdb.model.kernels import gpu
from flax_imdb.model.recurrent import RecurrentLayer

BOTH = (False, True)
needs_cuda_plugin = pytest.mark.skipif(
    not importlib.util.find_spec('jax_cuda12_plugin'),
    reason='the CUDA plugin is not installed '
    '(pip install jax-cuda12-plugin jax-cuda12-pjrt)')
needs_ptxas = pytest.mark.skipif(
    not importlib.util.find_spec('nvidia.cuda_nvcc')
    if importlib.util.find_spec('nvidia') else True,
    reason='ptxas is not installed (pip install nvidia-cuda-nvcc-cu12)')


def _inputs(length, batch, features, width, directions=2, seed=0):
  """Weights, inputs, lengths from 0 to `length`, and a gradient of states."""
  rng = np.random.default_rng(seed)
  def normal(*shape, scale=1.):
    return (scale * rng.normal(size=shape)).astype(np.float32)
  weights = [{
      'kernel': normal(features, 4 * width, scale=features**-0.5),
      'recurrent_kernel': normal(width, 4 * width, scale=width**-0.5),
      'bias': normal(4 * width, scale=0.5)} for _ in range(directions)]
  lengths = rng.integers(0, length + 1, batch).astype(np.int32)
  lengths[0], lengths[-1] = 0, length
  given = [normal(length, batch, width) for _ in range(directions)]
  return weights, normal(length, batch, features), lengths, given


def _scan(weights, x, lengths, reverse, dtype):
  width = weights[0]['recurrent_kernel'].shape[0]
  return [RecurrentLayer('lstm', width, dtype, reverse=r).apply(
      {'params': {'steps': {'cell': w}}}, x, lengths)[0]
          for w, r in zip(weights, reverse, strict=True)]


def _kernel(weights, x, lengths, reverse, dtype):
  return gpu.lstm(weights, x, lengths, reverse=reverse, dtype=dtype,
                  interpret=True)


@functools.cache  # for jit keeps what it compiled for shapes
def _compiled(form, reverse, dtype):
  def run(weights, x, lengths, given):
    states, backward = jax.vjp(
        lambda weights, x: form(weights, x, lengths, reverse, dtype),
        weights, x)
    return states, backward(given)
  # It takes half the time to compile, and runs but once or twice.
  return jax.jit(run, compiler_options={'xla_backend_optimization_level': 0})


def _run(form, inputs, reverse, dtype=jnp.float32):
  """States and the gradients (of weights, of x), as NumPy arrays."""
  return jax.tree.map(np.asarray, _compiled(form, reverse, dtype)(*inputs))


def _exact(inputs, reverse):
  """`_run` of the scan in float64."""
  with jax.enable_x64():
    weights, x, lengths, given = inputs
    weights, x, given = jax.tree.map(
        lambda a: np.asarray(a, np.float64), (weights, x, given))
    return _run(_scan, (weights, x, lengths, given), reverse, jnp.float64)


def _errors(got, want):
  """The largest error of each array, of the largest number in it.

  Of one step the recurrent kernel's gradient is 0, and so must the other be.
  """
  return [np.abs(a - b).max() / (np.abs(b).max() or 1e-30) for a, b in zip(
      jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]


@pytest.mark.parametrize('width, features, length, batch, reverse', [
    (8, 35, 11, 5, BOTH), (16, 32, 4, 17, (False,)), (20, 35, 9, 33, (True,)),
    (32, 35, 13, 18, BOTH), (64, 32, 6, 3, (True,))])
def test_kernel_equals_the_scan(width, features, length, batch, reverse):
  inputs = _inputs(length, batch, features, width, len(reverse))
  kernel, scan = (_run(form, inputs, reverse) for form in (_kernel, _scan))
  for got, want in zip(kernel[0], scan[0], strict=True):
    assert got.dtype == np.float32 and got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
  assert max(_errors(kernel[1], scan[1])) < 1e-5
  _, (_, of_x) = kernel
  lengths = inputs[2]
  for b, n in enumerate(lengths):
    assert (of_x[n:, b] == 0).all() and (of_x[:n, b] != 0).any(axis=-1).all()
  # Neither is nearer to the truth.
  exact = _exact(inputs, reverse)
  for a, b in zip(_errors(kernel, exact), _errors(scan, exact), strict=True):
    assert a < 2 * b + 2e-7


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(12))
def test_kernel_equals_the_scan_in_any_shape(seed):
  rng = np.random.default_rng(100 + seed)
  length, batch, features, width = (
      int(rng.integers(1, most)) for most in (20, 40, 70, 65))
  reverse = [(False,), (True,), BOTH][seed % 3]
  inputs = _inputs(length, batch, features, width, len(reverse), seed)
  kernel, scan = (_run(form, inputs, reverse) for form in (_kernel, _scan))
  assert max(_errors(kernel, scan)) < 1e-5


def test_bfloat16_is_as_near_to_the_truth_as_the_scans():
  inputs = _inputs(11, 17, 35, 20, directions=1)
  kernel, scan = (_run(form, inputs, (True,), jnp.bfloat16)
                  for form in (_kernel, _scan))
  # The same operands are rounded: of the states nothing differs but the order
  # of sums, which now and then rounds the next step's operand another way.
  np.testing.assert_allclose(kernel[0][0], scan[0][0], atol=2e-3)
  exact = _exact(inputs, (True,))
  for a, b in zip(_errors(kernel, exact), _errors(scan, exact), strict=True):
    assert 1e-4 < a < 1.5 * b and a < 0.02


def test_what_is_at_padding_is_never_read():
  weights, x, lengths, given = _inputs(4, 17, 32, 16, directions=1)
  spoilt = x.copy()
  for b, n in enumerate(lengths):
    spoilt[n:, b] = np.nan
  read, ignored = (
      _run(_kernel, (weights, x, lengths, given), (False,))
      for x in (x, spoilt))
  jax.tree.map(np.testing.assert_array_equal, read, ignored)


def test_members_learn_side_by_side_in_the_step_of_all_devices():
  members = [_inputs(5, 3, 4, 4, directions=1, seed=s)[:3] for s in range(2)]
  weights, x, lengths = jax.tree.map(lambda *a: np.stack(a), *members)
  def gradient(form, weights, x, lengths):
    return jax.grad(lambda weights, x: sum(
        (h**2).sum() for h in form(weights, x, lengths, (True,), jnp.float32)),
                    argnums=(0, 1))(weights, x)
  def step(weights, batch, sum_over_devices):
    return sum_over_devices(jax.vmap(functools.partial(gradient, _kernel))(
        weights, batch['x'], batch['lengths'])), ()
  n = jax.local_device_count()
  got, _ = data_parallel(step)(weights, {
      'x': np.stack([x] * n), 'lengths': np.stack([lengths] * n)})
  for m, member in enumerate(members):
    want = jax.jit(functools.partial(gradient, _scan))(*member)
    assert max(_errors(jax.tree.map(lambda a, m=m: a[m] / n, got), want)) < 1e-5


def test_a_width_that_the_chip_cannot_hold_is_refused():
  assert gpu.refusal(gpu.MOST_WIDTH, jnp.float32) is None
  inputs = _inputs(2, 2, 3, gpu.MOST_WIDTH + 1)
  with pytest.raises(ValueError, match='at most width 64 .* not of 65 in f'):
    gpu.lstm(*inputs[:3], reverse=BOTH)


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
