"""A trace is of the steps that are asked for, and changes none of them."""

import gzip
import json
import re

import jax.numpy as jnp
import pytest
from support.command import TINY, finished, run_here

from flax_imdb.config import load_config
from flax_imdb.fields import profiled_steps
from flax_imdb.train.profiling import Profile


def _config(profile):
  config = load_config('configs/default.py')
  config.profile = profile
  return config


def _steps_of(workdir):
  """The numbers of the steps in the one trace there is."""
  file, = workdir.glob('plugins/profile/*/*.trace.json.gz')
  assert list(file.parent.glob('*.xplane.pb'))
  events = json.loads(gzip.decompress(file.read_bytes()))['traceEvents']
  return sorted({int(x['args']['step_num']) for x in events
                 if x.get('name') == 'train' and 'step_num' in x.get(
                     'args', {})})


@pytest.mark.parametrize(('profile', 'steps'), [
    ('', []), ('1,1', [1]), ('100,3', [100, 101, 102])])
def test_the_field_names_steps(profile, steps):
  assert list(profiled_steps(_config(profile))) == steps


def test_a_run_traces_these_steps_and_has_the_same_bits(trained, tmp_path):
  output = finished(run_here(
      *TINY, '--config.profile=6,3', f'--workdir={tmp_path}'))
  assert f'traced steps 6 to 8 into {tmp_path}/plugins/profile: ' in output
  assert _steps_of(tmp_path) == [6, 7, 8]
  assert (tmp_path / 'metrics.jsonl').read_bytes() == (
      trained[0] / 'metrics.jsonl').read_bytes()
  shas = {re.search('"params_sha256": ".*"', (
      folder / 'summary.json').read_text())[0]
          for folder in (tmp_path, trained[0])}
  assert len(shas) == 1
  # Nothing is left to trace: it resumes with another, and says so.
  output = finished(run_here(
      *TINY, '--config.profile=14,1', f'--workdir={tmp_path}'))
  assert 'config.profile=14,1: no such step was trained' in output


def _counting(state, batch):
  return state + batch, state


def test_what_is_under_way_when_a_run_stops_is_kept(tmp_path):
  lines = []
  profile = Profile(_config('12,5'), str(tmp_path), lines.append)
  step, state = profile.traced(_counting, 10), jnp.zeros(())
  for _ in range(3):  # 11, 12, 13
    state, _ = step(state, 1)
  profile.stop()
  assert float(state) == 3
  assert _steps_of(tmp_path) == [12, 13]
  assert lines[0].startswith('traced steps 12 to 13 into ')
  for _ in range(3):
    state, _ = step(state, 1)  # and no second trace begins
  profile.stop()
  assert len(lines) == 1 and len(list(
      tmp_path.glob('plugins/profile/*'))) == 1


def test_without_it_the_step_is_the_step(tmp_path):
  profile = Profile(_config(''), str(tmp_path), print)
  assert profile.traced(_counting, 0) is _counting
  profile.stop()
  assert not list(tmp_path.iterdir())
