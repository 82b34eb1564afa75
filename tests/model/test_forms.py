"""The other forms of a layer against the scan, which is the definition.

The kernels run on a CPU, operation by operation (`interpret`), where nothing
can race: what a chip makes of them is not seen here.
"""

import functools
import types

from hypothesis import HealthCheck, given, settings, strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import default_with, drawn_params

from flax_imdb.cluster.devices import data_parallel
from flax_imdb.errors import UserError
from flax_imdb.model import (
  classifier,
  counted_loop,
  forms,
  gpu_kernel,
  joint,
  tpu_kernel,
)
from flax_imdb.model.recurrent import CELLS, RecurrentLayer

BOTH = (False, True)
FORMS = {
    'joint': functools.partial(joint.recurrence, 'lstm'),
    'loop': functools.partial(counted_loop.recurrence, 'lstm'),
    'tpu': functools.partial(tpu_kernel.lstm, interpret=True),
    'gpu': functools.partial(gpu_kernel.lstm, interpret=True)}


def _inputs(length, rows, features, width, directions=2, seed=0, gates=4):
  """Weights, x, lengths of 0 to `length`, and a gradient of the states."""
  rng = np.random.default_rng(seed)
  def normal(*shape, scale=1.):
    return (scale * rng.normal(size=shape)).astype(np.float32)
  weights = [{
      'kernel': normal(features, gates * width, scale=features**-0.5),
      'recurrent_kernel': normal(width, gates * width, scale=width**-0.5),
      'bias': normal(gates * width, scale=0.5)} for _ in range(directions)]
  lengths = rng.integers(0, length + 1, rows).astype(np.int32)
  lengths[0], lengths[-1] = 0, length
  return (weights, normal(length, rows, features), lengths,
          [normal(length, rows, width) for _ in range(directions)])


def _scan(weights, x, lengths, *, reverse, dtype, cell='lstm'):
  width = weights[0]['recurrent_kernel'].shape[0]
  return [RecurrentLayer(cell, width, dtype, reverse=r).apply(
      {'params': {'steps': {'cell': w}}}, x, lengths)[0]
          for w, r in zip(weights, reverse, strict=True)]


def _run(form, inputs, reverse, dtype=jnp.float32):
  """States, and the gradients by (weights, x), as NumPy arrays."""
  weights, x, lengths, d_states = inputs
  def run(weights, x, d_states):
    states, backward = jax.vjp(lambda weights, x: form(
        weights, x, lengths, reverse=reverse, dtype=dtype), weights, x)
    return states, backward(d_states)
  return jax.tree.map(np.asarray, jax.jit(run)(weights, x, d_states))


def _exact(inputs, reverse):
  """`_run` of the scan in float64."""
  with jax.enable_x64():
    weights, x, lengths, d_states = inputs
    weights, x, d_states = jax.tree.map(
        lambda a: np.asarray(a, np.float64), (weights, x, d_states))
    return _run(_scan, (weights, x, lengths, d_states), reverse, jnp.float64)


def _errors(got, want):
  """The largest error of each array, of the largest number in it."""
  return [np.abs(a - b).max() / (np.abs(b).max() + 1e-30) for a, b in zip(
      jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]


def _check_equal(form, inputs, reverse):
  """To 1e-6 the states, to 1e-5 of the largest the gradients."""
  got, want = (_run(f, inputs, reverse) for f in (form, _scan))
  for a, b in zip(got[0], want[0], strict=True):
    assert a.dtype == np.float32 and a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
  assert max(_errors(got[1], want[1])) < 1e-5
  return got, want


# Of length, rows, features, width, reverse.
SHAPES = [
    (11, 5, 35, 8, BOTH), (9, 33, 35, 20, (True,)), (70, 3, 5, 4, BOTH),
    (4, 17, 32, 16, (False,)), (13, 18, 35, 32, BOTH), (6, 3, 32, 64, (True,)),
    (3, 130, 8, 8, BOTH), (1, 1, 1, 1, BOTH)]


@pytest.mark.parametrize('form, length, rows, features, width, reverse', [
    # That of a GPU takes XLA seconds to compile for a CPU.
    pytest.param(form, *shape, marks=[pytest.mark.slow] * (
        form == 'gpu' and shape not in SHAPES[:2]))
    for form in FORMS for shape in SHAPES])
def test_it_equals_the_scan(form, length, rows, features, width, reverse):
  inputs = _inputs(length, rows, features, width, len(reverse))
  got, scan = _check_equal(FORMS[form], inputs, reverse)
  _, (_, dx) = got
  for b, n in enumerate(inputs[2]):
    assert (dx[n:, b] == 0).all() and (dx[:n, b] != 0).any(axis=-1).all()
  # Neither is nearer to the truth.
  exact = _exact(inputs, reverse)
  for a, b in zip(_errors(got, exact), _errors(scan, exact), strict=True):
    assert a < 2 * b + 5e-7


@pytest.mark.slow
@pytest.mark.parametrize('form', FORMS)
@settings(max_examples=6, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.too_slow])
@given(length=strategies.integers(1, 90), rows=strategies.integers(1, 140),
       features=strategies.integers(1, 70), width=strategies.integers(1, 64),
       reverse=strategies.sampled_from([(False,), (True,), BOTH]),
       seed=strategies.integers(0, 99))
def test_it_equals_the_scan_in_any_shape(
    form, length, rows, features, width, reverse, seed):
  _check_equal(FORMS[form], _inputs(
      length, rows, features, width, len(reverse), seed), reverse)


@pytest.mark.slow
@pytest.mark.parametrize('rows, width', [(3, 128), (600, 32), (2, 200)])
def test_the_tpu_kernel_equals_the_scan_in_tiles_and_chunks(rows, width):
  """Wide layers go a direction at a time, many reviews a tile at a time."""
  _check_equal(FORMS['tpu'], _inputs(67, rows, 24, width), BOTH)


@pytest.mark.parametrize('form', FORMS)
def test_bfloat16_is_as_near_to_the_truth_as_the_scans(form):
  inputs = _inputs(11, 17, 35, 20, directions=1)
  got, scan = (_run(f, inputs, (True,), jnp.bfloat16)
               for f in (FORMS[form], _scan))
  # The same operands are rounded: of the states nothing differs but the order
  # of sums, which now and then rounds the next step's operand another way.
  np.testing.assert_allclose(got[0][0], scan[0][0], atol=2e-3)
  exact = _exact(inputs, (True,))
  for a, b in zip(_errors(got, exact), _errors(scan, exact), strict=True):
    assert 1e-4 < a < 1.5 * b and a < 0.02


@pytest.mark.parametrize('form', FORMS)
def test_what_is_at_padding_is_never_read(form):
  weights, x, lengths, d_states = _inputs(6, 3, 5, 4, directions=1)
  spoilt = x.copy()
  for b, n in enumerate(lengths):
    spoilt[n:, b] = 1e6
  jax.tree.map(np.testing.assert_array_equal, *(_run(
      FORMS[form], (weights, x, lengths, d_states), (True,))
                                                for x in (x, spoilt)))


@pytest.mark.parametrize('form', FORMS)
def test_members_learn_side_by_side_in_the_step_of_all_devices(form):
  members = [_inputs(5, 3, 4, 4, directions=1, seed=s)[:3] for s in range(2)]
  weights, x, lengths = jax.tree.map(lambda *a: np.stack(a), *members)
  def gradient(form, weights, x, lengths):
    return jax.grad(lambda weights, x: sum((h**2).sum() for h in form(
        weights, x, lengths, reverse=(True,), dtype=jnp.float32)),
                    argnums=(0, 1))(weights, x)
  def step(weights, batch, sum_over_devices):
    return sum_over_devices(jax.vmap(functools.partial(gradient, FORMS[form]))(
        weights, batch['x'], batch['lengths'])), ()
  n = jax.local_device_count()
  got, _ = data_parallel(step)(weights, {
      'x': np.stack([x] * n), 'lengths': np.stack([lengths] * n)})
  for m, member in enumerate(members):
    want = jax.jit(functools.partial(gradient, _scan))(*member)
    assert max(_errors(jax.tree.map(lambda a, m=m: a[m] / n, got), want)) < 1e-5


@pytest.mark.parametrize('longest', [0, 1, 5])
@pytest.mark.parametrize('cell, gates', [('lstm', 4), ('simple_rnn', 1)])
def test_a_loop_ends_with_the_longest_review(cell, gates, longest):
  weights, x, lengths, d_states = _inputs(9, 6, 5, 8, gates=gates)
  lengths = np.minimum(lengths, longest)
  form = functools.partial(counted_loop.recurrence, cell)
  got, want = (_run(f, (weights, x, lengths, d_states), BOTH)
               for f in (form, functools.partial(_scan, cell=cell)))
  assert max(_errors(got, want)) < 1e-5
  # A step that is computed would make the gradients of the weights NaN.
  x[longest:] = np.nan
  jax.tree.map(np.testing.assert_array_equal, got, _run(
      form, (weights, x, lengths, d_states), BOTH))


@pytest.mark.parametrize('remat', [True, False])
@pytest.mark.parametrize('reverse', [BOTH, (True,)])
def test_a_simple_rnn_is_joint_too(reverse, remat):
  inputs = _inputs(9, 4, 3, 5, len(reverse), gates=1)
  got, want = (_run(form, inputs, reverse) for form in (
      functools.partial(joint.recurrence, 'simple_rnn', remat=remat),
      functools.partial(_scan, cell='simple_rnn')))
  assert max(_errors(got, want)) < 1e-5


def test_recomputing_the_gates_stores_less():
  weights, x, lengths, _ = _inputs(7, 3, 5, 4)
  def stored(remat):
    _, backward = jax.vjp(lambda weights: joint.recurrence(
        'lstm', weights, x, lengths, reverse=BOTH, remat=remat), weights)
    return sum(array.size for array in jax.tree.leaves(backward))
  assert stored(True) < 0.7 * stored(False)  # the rest is the projected input


# The whole model, where a form reads the parameters that the scan drew.


@pytest.mark.parametrize('fields', [
    {}, {'model.layers': 2}, {'model.bidirectional': False},
    {'model.pooling': 'last'}, {'data.segment_length': 0,
                                'model.mask_padding': False,
                                'data.bucket_width': 0}], ids=str)
@pytest.mark.parametrize('form', ['joint', 'loop', 'interpret', 'simple_rnn'])
def test_a_model_of_another_form_gives_the_same_logits(form, fields):
  cell = 'simple_rnn' if form == 'simple_rnn' else 'lstm'
  config = default_with({
      'data.vocab_size': 50, 'model.width': 5, 'model.embedding_dim': 4,
      'model.inputs': 'words', 'model.cell': cell, **fields})
  model = classifier.build_model(config)
  params = drawn_params(model)
  params['embed']['embedding'] *= 4
  other = model.clone(
      recurrence='joint' if form == 'simple_rnn' else form)
  rng = np.random.default_rng(0)
  ids = rng.integers(4, 50, (6, 8)).astype(np.int32)
  lengths = np.array([8, 3, 1, 7, 8, 2], np.int32)
  if config.data.segment_length:
    segments = np.array([[0, 1], [2, 6], [3, 4], [5, 6]], np.int32)
  else:
    segments = None
  scan, got = (jax.jit(m.apply)({'params': params}, ids, lengths, segments)
               for m in (model, other))
  np.testing.assert_allclose(got, scan, atol=2e-6)
  assert np.ptp(scan) > 1e-2
  initial = [jax.tree.map(np.asarray, classifier.init_params(
      m, jax.random.key(0))) for m in (model, other)]
  jax.tree.map(np.testing.assert_array_equal, *initial)


# Which form a device gets.


def _device(platform, kind):
  return types.SimpleNamespace(platform=platform, device_kind=kind)


V5E, CPU = _device('tpu', 'TPU v5 lite'), _device('cpu', 'cpu')
H100 = _device('gpu', 'NVIDIA H100 80GB HBM3')
LAYER = forms.Layer('lstm', 32, 35, 'float32')


@pytest.fixture
def compiler(monkeypatch):
  """What the compiler answers, for devices that are not there."""
  answer = {'failure': ''}
  monkeypatch.setattr(forms, '_failure', lambda *_: answer['failure'])
  monkeypatch.setattr(forms, '_kernel', forms._kernel.__wrapped__)
  return answer


@pytest.mark.parametrize('device, recurrence, form', [
    (V5E, 'scan', 'scan'), (CPU, 'joint', 'joint'), (V5E, 'kernel', 'tpu'),
    (V5E, 'auto', 'tpu'), (H100, 'kernel', 'gpu'), (H100, 'auto', 'gpu'),
    (CPU, 'loop', 'loop'), (V5E, 'loop', 'scan'), (H100, 'loop', 'scan'),
    (CPU, 'auto', 'scan'), (_device('gpu', 'AMD Instinct'), 'auto', 'scan')])
def test_a_device_gets_what_it_has(compiler, device, recurrence, form):
  said = []
  assert forms.choose(recurrence, LAYER, device, said.append) == form
  assert forms.choose(recurrence, LAYER, device) == form
  assert [line.startswith(f'recurrence: {form} on ') for line in said] == (
      [True] if recurrence != 'scan' else [])


@pytest.mark.parametrize('device, debug, why', [
    (V5E, False, 'is for a CPU'), (CPU, True, 'runs without jit')])
def test_why_there_is_no_loop_is_said(monkeypatch, device, debug, why):
  monkeypatch.setattr(forms.devices, 'debugging', lambda: debug)
  said = []
  assert forms.choose('loop', LAYER, device, said.append) == 'scan'
  assert said[0].startswith('recurrence: scan on ') and why in said[0]


@pytest.mark.parametrize('device, form, predicting', [
    (CPU, 'scan', 'loop'), (CPU, 'loop', 'loop'), (CPU, 'joint', 'joint'),
    (V5E, 'scan', 'scan'), (V5E, 'tpu', 'tpu'), (H100, 'scan', 'scan')])
def test_what_a_scan_learned_a_cpu_predicts_in_the_loop(
    monkeypatch, device, form, predicting):
  assert forms.to_predict(form, device) == predicting
  monkeypatch.setattr(forms.devices, 'debugging', lambda: True)
  assert forms.to_predict(form, device) == form


@pytest.mark.parametrize('device, layer, failure, why', [
    (CPU, LAYER, '', 'cpu is no TPU and no GPU of NVIDIA'),
    (V5E, LAYER._replace(cell='simple_rnn'), '', 'none of simple_rnn'),
    (V5E, LAYER._replace(width=4096), '', 'use a smaller one'),
    (_device('tpu', 'TPU v4'), LAYER._replace(width=512), '', 'of the 16 that'),
    (H100, LAYER._replace(width=4096), '', 'width'),
    (V5E, LAYER, 'no room', 'no room')])
def test_what_it_does_not_have_is_refused_or_scanned(
    compiler, device, layer, failure, why):
  compiler['failure'] = failure
  said = []
  with pytest.raises(UserError, match=f'recurrence=kernel: .*{why}'):
    forms.choose('kernel', layer, device, said.append)
  assert not said
  assert forms.choose('auto', layer, device, said.append) == 'scan'
  assert 'scan' in said[0] and why in said[0]
  # A run of a TPU can be evaluated on a laptop.
  assert forms.choose('kernel', layer, device) == 'scan'


def test_a_kernel_that_does_not_compile_says_why():
  # A CPU has no compiler of it: the real failure of one that is there.
  why = forms._failure('tpu', LAYER, jax.devices()[0])
  assert why.startswith('it does not compile: ') and '\n' not in why


def test_a_gpu_kernel_that_is_too_wide_raises():
  inputs = _inputs(2, 2, 3, gpu_kernel.MOST_WIDTH + 1)
  with pytest.raises(ValueError, match='at most width 64 .* not of 65 in f'):
    gpu_kernel.lstm(*inputs[:3], reverse=BOTH)


def test_interpreting_is_for_training_alone():
  assert forms.choose('interpret', LAYER, CPU, print) == 'interpret'
  assert forms.choose('interpret', LAYER, CPU) == 'scan'


def test_forms_has_each_cell():
  assert {'lstm', 'simple_rnn'} == set(CELLS)
