"""How long a step is by what its compiler wrote down: no time was measured.

For a TPU two measures are added up that differ by far. XLA charges each of its
operations some cycles: a small one of a scan some 1,800, where its schedule has
50. A Pallas kernel has no charge, but libtpu can write down its final schedule:
instructions (bundles) of one cycle each, which say nothing of waits for memory.
Compare estimates of one kind with each other, and none with a clock.
"""

import atexit
import collections
from collections.abc import Iterator, Mapping
import functools
import math
import os
import pathlib
import re
import shutil
import tempfile
from typing import NamedTuple

# GHz: a chip's published bfloat16 operations a second over those of a cycle,
# two for each of 4 x 128 x 128 multipliers a core. A v6e has 2 x 256 x 256, but
# libtpu counts on more than these could do, and on no more than twice as many.
CLOCK = {'v4': 1.05, 'v5e': 1.5, 'v5p': 1.75, 'v6e': 1.75}
_VARIABLE, _DUMP = 'LIBTPU_INIT_ARGS', '--xla_jf_dump_to='
_COMPUTATION = re.compile(
    r'^(?:ENTRY )?(%\S+) .*\{\n((?:  .*\n)*)', re.MULTILINE)
_WHILE = re.compile(r' while\(.*condition=(%[\w.-]+), body=(%[\w.-]+)(.*)')
_CALL = re.compile(r' (?:call|async-start|conditional)\([^)]*\)(.*)')
_CHARGE = re.compile(r'"estimated_cycles":"(\d+)')
_GPU_KERNEL = re.compile(r' (?:fusion|dot|convolution|custom-call|copy)\(')
# `model/tpu_kernel.py` names its kernels after their tiles, chunks and loops.
_KERNEL = re.compile(r'%(\S*lstm_\S*?_(\d+)x(\d+)x(\d+)\S*) = ')
FILE = re.compile(r'\d+-(.*)-\d+-final_bundles\.txt')  # when, operation, pass
_BUNDLE = re.compile(
    r'^ *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})? *: *(>*)', re.MULTILINE)

Bundles = Mapping[str, list[int]]


class Estimate(NamedTuple):
  """Of a step on one chip."""
  cycles: int
  kernel_cycles: int  # of them, those of Pallas kernels' schedules
  unread: int  # kernels that are left out, and loops that count once


@functools.cache
def dump_folder() -> pathlib.Path | None:
  """Where libtpu writes schedules down: a folder that is gone at exit.

  To be called before libtpu is loaded, for that is when it reads its flags.
  None if the environment names a folder of somebody's own.
  """
  if _DUMP in (given := os.environ.get(_VARIABLE, '')):
    return None
  folder = pathlib.Path(tempfile.mkdtemp(prefix='flax_imdb_schedules_'))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  os.environ[_VARIABLE] = (
      f'{given} {_DUMP}{folder} --xla_jf_dump_llo_text=true '
      '--xla_jf_dump_llo_pass_label_regex=final_bundles').strip()
  return folder


def kernel_bundles(folder: pathlib.Path | None) -> Bundles:
  """The schedules of LSTM kernels in `folder`, which then is empty.

  Returns by operation the bundles outside of all loops, in one, in two.
  """
  found: dict[str, list[int]] = {}
  for file in sorted(folder.iterdir()) if folder else ():  # oldest first
    match = FILE.fullmatch(file.name)
    if match and 'lstm_' in match[1]:
      depths = bundles_by_depth(file)
      found[match[1]] = [
          depths[d] for d in range(max(depths, default=-1) + 1)]
    file.unlink()
  return found


def bundles_by_depth(file: pathlib.Path) -> collections.Counter[int]:
  """How many bundles of a final schedule lie in so many loops."""
  return collections.Counter(len(arrows) for arrows in _BUNDLE.findall(
      file.read_text('utf-8', 'replace')))


def estimate(hlo: str, bundles: Bundles) -> Estimate:
  """What a TPU's program costs by its compiler; see the head of this file.

  Args:
    hlo: XLA's optimised instructions.
    bundles: of `kernel_bundles`, after they were compiled. Of equal kernels
      libtpu writes one down, so that another's name may lack the number. Where
      two cores share the tiles (v4, v5p), it is as if one did all.
  """
  of_equals = {_unnumbered(name): counts for name, counts in bundles.items()}
  charges = in_kernels = unread = 0
  for line, times in _runs(hlo):
    if match := _CHARGE.search(line):
      charges += times * int(match[1])
    if 'tpu_custom_call' in line:
      name = _KERNEL.search(line)
      counts = name and (bundles.get(name[1])
                         or of_equals.get(_unnumbered(name[1])))
      if name and counts:
        tiles, chunks, loops = map(int, name.groups()[1:])
        # Over the grid, and inside of that over the steps. One round is none.
        rounds = [n for n in (tiles * chunks, loops) if n > 1]
        in_kernels += times * sum(
            count * math.prod(rounds[:depth])
            for depth, count in enumerate(counts))
      else:
        unread += 1
    unread += not times
  return Estimate(charges + in_kernels, in_kernels, unread)


def _unnumbered(name: str) -> str:
  return re.sub(r'\.\d+$', '', name)


def gpu_kernels(hlo: str) -> int:
  """Kernels and copies of a step on one GPU, by XLA's optimised instructions.

  A Triton kernel counts as one.
  """
  return sum(times for line, times in _runs(hlo) if _GPU_KERNEL.search(line))


def _runs(hlo: str) -> Iterator[tuple[str, int]]:
  """Each instruction and how often a step runs it.

  0 stands for a loop whose length is not known: its inside counts once. Of a
  condition all branches count.
  """
  inside = {name: text.splitlines()
            for name, text in _COMPUTATION.findall(hlo)}

  def walk(name: str, times: int) -> Iterator[tuple[str, int]]:
    for line in inside[name]:
      if match := _WHILE.search(line):
        condition, body, rest = match.groups()
        length = _length(rest, inside[condition])
        yield line, times if length else 0
        for part in (condition, body):
          yield from walk(part, times * (length or 1))
        continue
      yield line, times
      if (match := _CALL.search(line)) and not _CHARGE.search(line):
        for called in re.findall(r'%[\w.-]+', match[1]):
          yield from walk(called, times)

  return walk(re.findall(r'^ENTRY (%\S+)', hlo, re.MULTILINE)[0], 1)


def _length(rest: str, condition: list[str]) -> int | None:
  """Rounds of a loop, or None: known to XLA, or what its counter is below."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
    return int(known[1])
  text = '\n'.join(condition)
  limits = re.findall(r' s32\[\]\S* constant\((\d+)\)', text)
  return int(limits[0]) if len(limits) == 1 and 'direction=LT' in text else None
