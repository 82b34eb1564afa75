"""The real programs, compiled for TPUs and GPUs that are not there.

The compilers in libtpu and the CUDA plugin work from a description of it. They
tell that a program fits and how it is put together, not how fast it runs.
"""

from collections.abc import Callable, Sequence
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import time
from typing import Any

import jax
from jax import sharding
from jax.experimental import topologies
from ml_collections import ConfigDict
import numpy as np

from flax_imdb.analysis import schedules
from flax_imdb.cluster.devices import AXIS
from flax_imdb.data import sources
from flax_imdb.data.batches import shapes
from flax_imdb.errors import UserError
from flax_imdb.inference import evaluate
from flax_imdb.model import classifier
from flax_imdb.train import language_model
from flax_imdb.train.optimizer import build_optimizer
from flax_imdb.train.step import make_train_step, state_shapes

_EXAMPLES = 'v4:2x2x1, v5e:1x1, v5e:2x2, v5p:2x2x1, v6e:4x4, cuda:h100x8'
# GiB a device. Of a GPU's, jax takes three quarters unless told otherwise.
MEMORY = {'v4': 32, 'v5e': 16, 'v5p': 95, 'v6e': 32, 'cuda': 0.75 * 80}
_NAME = re.compile(  # libtpu also describes pods that nobody has built
    r'(?:(v5e|v6e)(?=:\d+x\d+$)|(v4|v5p)(?=:\d+x\d+x\d+$)):(\d+)x(\d+).*'
    r'|cuda:h100(?:x(\d+))?', re.ASCII)
# Any will do: it is but a number in the program.
_STEPS_PER_EPOCH = 100
_CACHE_FROM = 'jax_persistent_cache_min_compile_time_secs'
# Without these libtpu asks the network for a TPU and admits one process only.
_LIBTPU = {'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_SKIP_MDS_QUERY': '1',
           'TPU_ACCELERATOR_TYPE': 'v5e-1', 'TPU_WORKER_HOSTNAMES': 'localhost'}


def describe(topology: str) -> Sequence[jax.Device]:
  """The devices of a topology such as `_EXAMPLES`; nothing runs on them.

  Raises UserError if there is none of this name, or no compiler installed.
  """
  if not (match := _NAME.fullmatch(topology)):
    raise UserError(f'no topology {topology!r}: give one such as {_EXAMPLES}')
  flat, cubic, x, y, gpus = match.groups()
  chip = flat or cubic
  module, fix = ('libtpu', "'flax_imdb[aot]'") if chip else (
      'jax_cuda12_plugin', 'jax-cuda12-plugin jax-cuda12-pjrt')
  if not importlib.util.find_spec(module):  # loading it looks for hardware
    raise UserError(f'{module}, which compiles for {topology} without the '
                    f'hardware, is not installed: pip install {fix}')
  options: dict[str, Any] = {}
  if chip:
    os.environ.update(_LIBTPU | os.environ)
    schedules.dump_folder()
    options['chips_per_host_bounds'] = [min(int(x), 2), min(int(y), 2), 1]
    if chip == 'v4':  # both cores of a chip are one device, as on real ones
      options['chip_config_name'] = 'megacore'
  else:
    target = pathlib.Path(__file__).with_name('h100_target_config.txt')
    options['topology'] = f'1x1x{gpus or 1}'
    options['target_config'] = target.read_text('utf-8')
  try:
    return topologies.get_topology_desc(
        topology, 'tpu' if chip else 'cuda', **options).devices
  except jax.errors.JaxRuntimeError as e:
    raise UserError(
        f'no topology {topology!r}: give one such as {_EXAMPLES} ({e})') from e


def compile_for(config: ConfigDict, topology: str,
                announce: Callable[[str], None]) -> None:
  """Compiles train step and evaluation, then the largest batch's: minutes.

  `announce` is told each result at once, in a line or more. Raises UserError as
  `describe` and `sources.class_names`, or if the devices can't share or can't
  hold a batch of the config.
  """
  devices = describe(topology)
  size, n = config.global_batch_size, len(devices)
  if size % n:
    raise UserError(f'config.global_batch_size={size} is not divisible by the '
                    f'{n} devices of {topology}: use {max(1, size // n) * n}')
  chip = topology.partition(':')[0]
  compiler = 'jax-cuda12-plugin' if chip == 'cuda' else 'libtpu'
  version = importlib.metadata.version(compiler)
  announce(f'{topology}: {n} x {devices[0].device_kind} of {MEMORY[chip]:g} GiB'
           ' each, described; nothing runs on them')
  announce(f'compiled by jax {jax.__version__} with {compiler} {version}')
  class_count = len(sources.class_names(config.data))
  classifier.for_device(
      config, classifier.build_model(config, class_count), devices[0], announce)
  for name, field in (
      ('train', 'global_batch_size'), ('evaluate', 'eval_batch_size')):
    rows = -(-(config[field] or size) // n)
    program = compile_program(
        config, devices, rows, name == 'train', class_count)
    if not program:
      raise UserError(f'config.{field}={config[field] or size} does not fit '
                      f'into {topology}: use a smaller one')
    announce(f'{name}: {rows} reviews a device, '
             f'{config.data.max_length} tokens each, {_program_text(program)}')
    if name == 'train':
      announce(f'  estimate: {_estimate_text(program, chip)}')
  announce('the largest batch, looked for by compiling the train step:')
  largest = largest_batch(
      config, devices, MEMORY[chip], announce, class_count)
  announce(f'largest batch to train with: {largest:,} reviews, '
           f'{largest // n:,} a device, to about a tenth or 128 a device')


def _program_text(program: dict[str, Any]) -> str:
  """A few lines about what `compile_program` returned."""
  donated = (f'{program["donated_arrays"]} of {program["state_arrays"]} arrays '
             'of the state are donated' if program['state_arrays'] else
             'nothing to donate')
  return (f'compiled in {program["compile_seconds"]:.1f} s\n'
          '  {peak_mib:.1f} MiB a device: arguments {argument_mib:.1f}, '
          'temporary {temp_mib:.1f}, output {output_mib:.1f}, of that '
          '{alias_mib:.1f} in place of arguments\n'.format(**program)
          + f'  all-reduces: {program["all_reduces"]}; {donated}')


def _estimate_text(program: dict[str, Any], chip: str) -> str:
  """A line about how long a step is, as far as the compiler knows."""
  if chip == 'cuda':
    return f'{schedules.gpu_kernels(program["hlo"]):,} kernels a step'
  found = schedules.estimate(program['hlo'], program['bundles'])
  clock = schedules.CLOCK[chip]
  return (f'{found.cycles / 1e6:.2f} M cycles, '
          f'{found.cycles / clock / 1e6:.2f} ms at {clock} GHz, by the '
          'compiler; '
          + (f'of them {found.kernel_cycles / 1e6:.2f} M scheduled in kernels; '
             if found.kernel_cycles else '')
          + (f'{found.unread} kernels or loops of unknown length left out; '
             if found.unread else '')
          + 'not a time')


def largest_batch(config: ConfigDict, devices: Sequence[jax.Device],
                  memory: float, announce: Callable[[str], None],
                  class_count: int = 2) -> int:
  """The most reviews a train step can take; that step was compiled.

  Memory is linear but for what a TPU keeps on its chip: two sizes tell a third,
  which is compiled in turn, until a tenth more, or 128 a device, is too large.

  `memory` is in GiB a device, `devices` are of `describe`; `announce` is told
  the memory of each size. Returns reviews over all devices, 0 if none fits.
  """
  limit = memory * 1024
  fits, peak, rows, refused = 0, 0.0, 1024, 1 << 30
  while rows > 1.1 * fits:
    program = compile_program(config, devices, rows, True, class_count)
    needs = program.get('peak_mib', float('inf'))
    announce(f'  {rows:,} reviews a device: '
             + (f'{needs:,.0f} MiB' if program else 'refused')
             + (', too large' if needs > limit else ''))
    if needs <= limit:
      slope = max(needs - peak, 1e-9) / (rows - fits)
      fits, peak = rows, needs
      rows = min(rows + int((limit - peak) / slope), 8 * rows,
                 refused * 9 // 10)
    else:
      refused = rows
      guess = int(rows * limit / needs)  # 0 if the compiler gave no figure
      between = guess if guess > 1.1 * fits else (fits + rows) // 2
      rows = min(between, rows * 9 // 10) if fits else (
          rows // 8 or int(rows > 1))
    rows -= rows % 128 if rows > 128 else 0  # a TPU computes on whole 128s
  return fits * len(devices)


def compile_program(config: ConfigDict, devices: Sequence[jax.Device],
                    rows: int, training: bool,
                    class_count: int = 2) -> dict[str, Any]:
  """Compiles the train step, or the evaluation, of `rows` reviews a device.

  They are as wide as can be; the config's global_batch_size does not count.

  Returns {} if it does not fit the memory. Else compile_seconds; MiB a device,
  peak_mib = argument_mib + temp_mib (less what a TPU keeps on its chip) +
  output_mib - alias_mib (donated); state_arrays, of them donated_arrays;
  all_reduces; hlo, XLA's optimised instructions as text; bundles of a TPU's
  kernels, see `schedules.py`.
  """
  mesh = sharding.Mesh(np.array(devices), (AXIS,))
  whole, split = (sharding.NamedSharding(mesh, sharding.PartitionSpec(*axes))
                  for axes in ((), (AXIS,)))
  batch = {name: jax.ShapeDtypeStruct(
      (len(devices), *shape), dtype, sharding=split)
           for name, (shape, dtype) in shapes(
               config, rows, len(devices), class_count=class_count,
               training=training).items()}
  words = config.objective == 'language_model'
  if not training and not words:
    batch = classifier.inputs(batch)
  model = classifier.for_device(
      config, classifier.build_model(config, class_count), devices[0])
  optimizer = build_optimizer(config, _STEPS_PER_EPOCH)
  with jax.disable_jit(False):  # config.debug may have turned jit off
    state = jax.tree.map(lambda x: x.update(sharding=whole),
                         state_shapes(config, model, optimizer))
    function: Any = (
        make_train_step(
            config, model, optimizer, _STEPS_PER_EPOCH, devices,
            # How much a class counts is but a number in the program, too.
            None if config.class_weights == 'none' else np.ones(class_count))
        if training else
        (language_model if words else evaluate).make_forward(model, devices))
    lowered = function.lower(state if training else state.eval_params(), batch)
  start = time.perf_counter()
  # What is compiled for other machines can be written to jax' cache, not read.
  cache_from = getattr(jax.config, _CACHE_FROM)
  jax.config.update(_CACHE_FROM, float('inf'))
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    return {}
  finally:
    jax.config.update(_CACHE_FROM, cache_from)
  seconds = time.perf_counter() - start
  hlo, memory = compiled.as_text(), compiled.memory_analysis()
  bundles = schedules.kernel_bundles(
      schedules.dump_folder() if devices[0].platform == 'tpu' else None)
  mib = {f'{k}_mib': getattr(memory, f'{k}_size_in_bytes') / 2**20
         for k in ('argument', 'temp', 'output', 'alias')}
  return {
      'compile_seconds': seconds,
      'peak_mib': sum(mib.values()) - 2 * mib['alias_mib'], **mib,
      'state_arrays': len(jax.tree.leaves(state)) if training else 0,
      'donated_arrays': hlo.count('-alias)'), 'hlo': hlo,
      'bundles': bundles,
      'all_reduces': len(re.findall(r' all-reduce(?:-start)?\(', hlo))}
