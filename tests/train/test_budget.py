"""What the compiled train step may cost: kernels, operations, bytes, memory.

Timings are noisy and belong in benchmarks; these figures are the compiler's,
equal on every machine with the same CPU instructions, and change only when the
program or the compiler does. Raise a budget only with a reason in RESULTS.md.
"""

import re
from typing import NamedTuple

import jax
import numpy as np
import pytest

from flax_imdb.cluster import devices
from flax_imdb.config import load_config
from flax_imdb.model import classifier
from flax_imdb.train.optimizer import build_optimizer
from flax_imdb.train.step import init_state, make_train_step

# Instructions that are no work of their own on a CPU.
_FREE = {'parameter', 'tuple', 'get-tuple-element', 'constant', 'bitcast'}


class Cost(NamedTuple):
  """What a step was measured to cost, of 64 reviews of 500 tokens a device."""
  kernels: list[int]  # in an iteration of the largest loops
  operations: float  # millions, a loop counted once: 64 reviews, one token each
  bytes: float  # millions, counted so
  scratch: float  # MiB


# Measured 2026-11-29, by the minor version of jax, whose XLA chooses the
# kernels: 0.12 slices the embedded input in a kernel of its own, before it is
# joined to the state. A cell that multiplies input and state apart has four
# more. Storing the gates takes twice the bytes and three times the memory, all
# states where the last one does a fifth more of both.
_COSTS = {
    '0.10': {
        'configs/notebook.py': Cost([25, 10], 10.894, 65.055, 17.135),
        'configs/words.py': Cost([26, 26], 78.736, 297.649, 47.037)},
    '0.11': {
        'configs/notebook.py': Cost([25, 10], 10.892, 65.060, 17.135),
        'configs/words.py': Cost([26, 26], 78.554, 289.312, 47.030)},
    '0.12': {
        'configs/notebook.py': Cost([27, 11], 10.892, 65.109, 17.135),
        'configs/words.py': Cost([28, 28], 78.554, 289.410, 47.030)},
}
_MARGIN = 1.01  # for what patch versions and other CPUs may change


@pytest.fixture(scope='module', params=[
    'configs/notebook.py',
    pytest.param('configs/words.py', marks=pytest.mark.slow)])
def compiled(request):
  """(config file, its step compiled for 64 reviews of 500 tokens a device)."""
  config = load_config(request.param)
  model = classifier.for_device(
      config, classifier.build_model(config), jax.devices()[0])
  optimizer = build_optimizer(config, 137)
  state = devices.replicate(init_state(config, model, optimizer))
  rows, width = 128, config.data.max_length
  batch = devices.shard({
      'ids': np.ones((rows, width), np.int32),
      'lengths': np.full(rows, width, np.int32),
      'labels': np.ones(rows, np.float32),
      'weights': np.ones(rows, np.float32),
      'places': np.arange(rows, dtype=np.int32)})
  step = make_train_step(config, model, optimizer, 137, jax.devices())
  return request.param, step.lower(state, batch).compile(), state


def _loops(hlo: str) -> list[int]:
  """Kernels an iteration of each loop, the most first."""
  counts = []
  for name in set(re.findall(r'\bbody=%?([\w.-]+)', hlo)):
    body = re.search(rf'^%?{re.escape(name)} .*?\{{\n(.*?)^\}}', hlo,
                     re.MULTILINE | re.DOTALL)
    operations = re.findall(r'^ +(?:ROOT )?%?[\w.-]+ = .*?\s([\w-]+)\(',
                            body[1], re.MULTILINE)
    counts.append(sum(operation not in _FREE for operation in operations))
  return sorted(counts, reverse=True)


def test_the_step_keeps_to_its_budget(compiled):
  name, step, _ = compiled
  version = '.'.join(jax.__version__.split('.')[:2])
  assert version in _COSTS, f'measure with jax {version}, and add its line'
  budget = _COSTS[version][name]
  cost = step.cost_analysis()
  loops = _loops(step.as_text())[:len(budget.kernels)]
  got = Cost(loops, cost['flops'] / 1e6, cost['bytes accessed'] / 1e6,
             step.memory_analysis().temp_size_in_bytes / 2**20)
  assert len(loops) == len(budget.kernels), got
  assert all(a <= b for a, b in zip(loops, budget.kernels, strict=True)), got
  assert got.operations < _MARGIN * budget.operations, got
  assert got.bytes < _MARGIN * budget.bytes, got
  assert got.scratch < _MARGIN * budget.scratch, got


def test_one_all_reduce_and_the_state_in_place(compiled):
  _, step, state = compiled
  assert len(re.findall(r' all-reduce(?:-start)?\(', step.as_text())) == 1
  state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
  assert step.memory_analysis().alias_size_in_bytes >= 0.99 * state_bytes
