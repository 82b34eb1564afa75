"""Checkpoints: what is kept, what comes back, what is refused."""

import asyncio
import functools
import gc
import logging
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_imdb import terminal
from flax_imdb.checkpoint.manager import Checkpoints, Progress
from flax_imdb.cluster import devices
from flax_imdb.config import load_config
from flax_imdb.errors import UserError
from flax_imdb.model import classifier
from flax_imdb.train.optimizer import build_optimizer
from flax_imdb.train.step import TrainState, init_state, state_shapes


@functools.cache
def _first(**model):
  config = load_config('configs/debug.py')
  config.ema_decay = 0.5
  config.model.update(model)
  built = classifier.build_model(config)
  optimizer = build_optimizer(config, 1)
  return (devices.to_host(init_state(config, built, optimizer)),
          state_shapes(config, built, optimizer))


def _state(step, **model):
  state, shapes = _first(**model)
  state = state.replace(
      step=np.asarray(step, np.int32),
      ema=jax.tree.map(lambda x: x + np.float32(step), state.params))
  return devices.replicate(state), shapes.to_items()


def _save(workdir, scores):
  with Checkpoints(str(workdir)) as checkpoints:
    for step, score in scores.items():
      state, _ = _state(step)
      checkpoints.save(step, state.to_items(), Progress(waited=step), score)


def test_best_and_latest_two_are_kept_when_validation_worsens(tmp_path):
  _save(tmp_path, {1: 0.5, 2: 0.9, 3: 0.8, 4: 0.7, 5: 0.6})
  for read_only in (False, True):  # also after reopening
    with Checkpoints(str(tmp_path), read_only) as checkpoints:
      assert checkpoints.steps() == [2, 4, 5]
      assert checkpoints.best() == 2
      assert checkpoints.latest() == 5


def test_of_equal_scores_the_earliest_is_best(tmp_path):
  _save(tmp_path, {1: 0.5, 2: 0.9, 3: 0.9, 4: 0.9, 5: 0.9})
  with Checkpoints(str(tmp_path)) as checkpoints:
    assert checkpoints.best() == 2
    assert checkpoints.steps() == [2, 4, 5]


def test_all_that_was_saved_comes_back_bit_for_bit(tmp_path):
  _save(tmp_path, {7: -1.5})
  state, shapes = _state(7)
  with Checkpoints(str(tmp_path)) as checkpoints:
    items, progress = checkpoints.restore(7, shapes)
    alone, _ = checkpoints.restore(7, {'model': shapes['model']})
  assert progress == Progress(waited=7)
  restored = TrainState.from_items(**items)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored),
                  strict=True):
    assert a.dtype == b.dtype and a.sharding == b.sharding
    np.testing.assert_array_equal(a, b)
  jax.tree.map(np.testing.assert_array_equal, alone['model']['ema'], state.ema)


def test_a_save_is_not_disturbed_by_the_next_step(tmp_path):
  state, shapes = _state(3)
  want = devices.to_host(state)
  with Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(3, state.to_items(), Progress(), 0.0)
    clear = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
    jax.block_until_ready(clear(state))
    checkpoints.wait()
    items, _ = checkpoints.restore(3, shapes)
  restored = TrainState.from_items(**devices.to_host(items))
  jax.tree.map(np.testing.assert_array_equal, restored, want)


def test_other_shapes_are_refused_by_name(tmp_path):
  _save(tmp_path, {1: 0.0})
  _, shapes = _state(1, hidden_dim=5)
  with Checkpoints(str(tmp_path)) as checkpoints:
    for wanted in (shapes, {'model': shapes['model']}):
      with pytest.raises(
          UserError, match=r'hidden/bias of shape \[4\], .* for \[5\]'):
        checkpoints.restore(1, wanted)


def test_another_structure_is_refused(tmp_path):
  _save(tmp_path, {1: 0.0})
  _, shapes = _state(1, layers=2)
  with Checkpoints(str(tmp_path)) as checkpoints:
    with pytest.raises(UserError, match='checkpoint 1 holds other arrays'):
      checkpoints.restore(1, shapes)


def test_a_missing_step_is_refused_and_names_those_found(tmp_path):
  _save(tmp_path, {1: 0.0, 2: 0.0})
  _, shapes = _state(1)
  with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
    with pytest.raises(UserError, match=r'steps found are \[1, 2\]'):
      checkpoints.restore(9, shapes)


def test_a_failed_restore_silences_late_reads_and_nothing_else(
    tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(sys, 'unraisablehook', seen.append)
  terminal.quiet_libraries()
  _, shapes = _state(1)
  with Checkpoints(str(tmp_path)) as checkpoints:
    for _ in range(2):
      with pytest.raises(UserError):
        checkpoints.restore(9, shapes)
  late, other = (types.SimpleNamespace(exc_value=RuntimeError(text))
                 for text in ('Event loop is closed', 'another'))
  sys.unraisablehook(late)
  sys.unraisablehook(other)
  assert seen == [other]


def test_the_errors_of_other_arrays_of_a_failed_save_are_not_logged(
    tmp_path, caplog):
  terminal.quiet_libraries()
  async def fail():
    raise ValueError('another array')
  async def save():
    tasks = [asyncio.ensure_future(fail())]
    await asyncio.sleep(0.01)
    del tasks
  asyncio.run(save())
  gc.collect()
  logging.getLogger('asyncio').error('another error')
  assert [record.message for record in caplog.records] == ['another error']


def test_a_damaged_checkpoint_is_refused(tmp_path):
  _save(tmp_path, {1: 0.0})
  data = [f for f in (tmp_path / 'checkpoints' / '1' / 'model').rglob('*')
          if f.is_file() and f.parent.name == 'd']
  assert data
  for file in data:
    file.write_bytes(file.read_bytes()[:-20])
  _, shapes = _state(1)
  with Checkpoints(str(tmp_path)) as checkpoints:
    with pytest.raises(UserError, match='checkpoint 1 cannot be restored'):
      checkpoints.restore(1, {'model': shapes['model']})
