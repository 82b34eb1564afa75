"""A run that is disturbed: its directory, the process in it, what must hold."""

import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time

import jax
from support.command import ROOT, TINY

from flax_imdb.checkpoint.manager import Checkpoints
from flax_imdb.cluster import devices
from flax_imdb.config import read_config
from flax_imdb.model import classifier
from flax_imdb.train.optimizer import build_optimizer
from flax_imdb.train.step import state_shapes

# All that a run remembers is in use; early stopping ends it before epoch 8.
RUN = (*TINY, '--config.num_epochs=8', '--config.show_examples=0',
       '--config.ema_decay=0.8', '--config.learning_rate=0.02',
       '--config.model.word_dropout=0.2',
       '--config.model.embedding_dropout=0.2',
       '--config.early_stopping.patience=2',
       '--config.early_stopping.min_delta=0.01')
_RESTORED = re.compile(
    r'(?:resuming from|already at) step (\d+) of|each new batch shape compiles')
_DISK = 24 << 20  # bytes


def mount(*argv):
  """True if it could."""
  return not subprocess.run(['mount', *argv], stderr=subprocess.DEVNULL,
                            check=False).returncode


def can_mount(folder):
  """Whether `mount` can do anything, which needs root."""
  if not mount('-t', 'tmpfs', 'tmpfs', folder):
    return False
  subprocess.run(['umount', folder], check=True)
  return True


class Run:
  """A run directory, on a small disk of its own where one can be mounted.

  Attributes:
    workdir: the run directory, in `base`.
    env: of the processes.
    damaged: steps whose checkpoint must be set aside.
    status: of the last process.
    process: the one that was started last, or the first of several.
    others: those that take part beside it.
    lost: steps that its start found lost; None if it was ended before.
  """

  def __init__(self, base, rng, last_step, can_mount):
    self.base, self.rng, self._last_step = base, rng, last_step
    self.workdir, self.env = base / 'run', dict(os.environ)
    self.damaged, self.status, self.lost = set(), None, None
    self.process, self.others = None, []
    base.mkdir()
    if can_mount:
      assert mount('-t', 'tmpfs', '-o', f'size={_DISK}', 'tmpfs', str(base))

  def steps(self):
    """The steps on disk, ascending."""
    return sorted(int(x.name) for x in self.workdir.glob('checkpoints/*')
                  if x.name.isdigit())

  def newest_whole(self):
    """Where the next start must go on."""
    return max(set(self.steps()) - self.damaged, default=0)

  def _reached(self):
    """The last step known to be done: saved, or with a line in the metrics."""
    file = self.workdir / 'metrics.jsonl'
    lines = file.read_bytes().split(b'\n')[:-1] if file.exists() else []
    return max([json.loads(line)['step'] for line in lines] + self.steps(),
               default=0)

  def command(self, *program):
    """Its command line; `program` stands for that of a user."""
    return [sys.executable, *(program or ('-m', 'flax_imdb.main')), *RUN,
            f'--workdir={self.workdir}']

  def start(self, command=None, file_limit=None, others=()):
    """Starts the command, and the others that take part beside it.

    It can write no larger file than of these bytes.
    """
    self._expected, self._before = self.newest_whole(), self._reached()
    with open(self.base.with_suffix('.out'), 'w') as out, open(
        self.base.with_suffix('.err'), 'w') as err:
      self.process = subprocess.Popen(
          command or self.command(), cwd=ROOT, env=self.env, stdout=out,
          stderr=err)
    self.others = [subprocess.Popen(
        other, cwd=ROOT, env=self.env, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE) for other in others]
    if file_limit is not None:
      resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE,
                       (file_limit, file_limit))

  def output(self):
    return self.base.with_suffix('.out').read_text()

  def error(self):
    return self.base.with_suffix('.err').read_text()

  def fail(self, reason):
    """Raises, with what the process wrote."""
    raise AssertionError(
        f'{reason}\n{self.output()[-1000:]}\n{self.error()[-2000:]}')

  def wait(self, behind_another=False):
    """Returns the exit status; checks where the process had gone on.

    It may have waited for `behind_another`, and then began where that ended.
    """
    self.status, output = self.process.wait(timeout=300), self.output()
    restored = _RESTORED.search(output)
    if restored:
      step = int(restored[1] or 0)
      if behind_another and step == self.newest_whole():
        self._expected = self._before = step
      if step != self._expected:
        self.fail(f'went on from {step} instead of {self._expected}')
      for damaged in self.damaged:
        if f'checkpoint {damaged} cannot be restored (' not in output:
          self.fail(f'did not say why {damaged} is skipped')
      self.lost = self._before - step
      self.damaged.clear()  # set aside, and perhaps saved again by now
    self.damaged &= set(self.steps())  # the others were set aside
    return self.status

  def must_end(self):
    """Waits for a process that nothing disturbs."""
    if self.wait():
      self.fail('failed by itself')

  def must_refuse(self, reason, row, expected=2):
    """Waits for a process that must say in one line what it can't do."""
    status = self.wait()
    if status == 0:
      return None  # it did not come to that
    if status != expected or not re.fullmatch(
        rf'error: cannot (write|read) .* ?\({reason}\): .*\n', self.error()):
      self.fail(f'status {status}')
    return row

  def wait_for(self, is_there, seconds):
    """Waits, then up to `seconds` longer; False if the process has ended."""
    while not is_there():
      if self.process.poll() is not None:
        return False
      time.sleep(0.0005)
    time.sleep(self.rng.uniform(0, seconds))
    return self.process.poll() is None

  def wait_for_moment(self, moment):
    """Waits for a random time in a part of the run; else as `wait_for`."""
    if moment == 'start':
      return self.wait_for(lambda: True, 2)
    if moment == 'compilation':
      return self.wait_for(self._restored, 0.5)
    if moment == 'evaluation':
      return self.wait_for(
          lambda: self._restored() and self._all_saved(), 0.2)
    if not self.wait_for(lambda: 'first step done' in self.output(), 0.2):
      return False
    return moment == 'steps' or self.wait_for(self._saving, 0.06)

  def _restored(self):
    return re.search(r'^(0: )?parameters ', self.output(), re.M)

  def _all_saved(self):
    return self.steps()[-1:] == [self._last_step]

  def _saving(self):
    return any(self.workdir.glob('checkpoints/*.orbax-checkpoint-tmp'))

  def where(self):
    """Which part of the run the process, stopped or dead, is in."""
    output = self.output()
    if not self._restored():
      return 'start'
    if self._saving():
      return 'save'
    if self._all_saved():
      return 'evaluation'
    return 'steps' if 'first step done' in output else 'compilation'

  def difference(self, undisturbed):
    """How a finished run differs from another one; '' if it does not."""
    for name in ('metrics.jsonl', 'config.json', 'tokenizer.json',
                 'calibration.json'):
      if ((self.workdir / name).read_bytes()
          != (undisturbed.workdir / name).read_bytes()):
        return f'{name} differs'
    a, b = (json.loads((x.workdir / 'summary.json').read_text())
            for x in (self, undisturbed))
    if a | {'seconds': 0} != b | {'seconds': 0}:
      return 'summary.json differs'
    # A stopped run may have saved within an epoch, and keep that.
    steps = self.steps()
    if not {a['best_step'], a['step']} <= set(steps) or len(steps) > 3:
      return f'it keeps the steps {steps}'
    names = {x.name for x in self.workdir.glob('checkpoints/*')}
    if names != {str(step) for step in steps} or [
        *self.workdir.glob('*.tmp'), *self.workdir.glob('.writable')]:
      return f'something is left over: {names}'
    for step in sorted({*steps} & {*undisturbed.steps()}):
      if not _same(self.arrays(step), undisturbed.arrays(step)):
        return f'checkpoint {step} differs'
    return ''

  def arrays(self, step):
    """A checkpoint: (all arrays by name, the progress but for the time)."""
    with Checkpoints(str(self.workdir), read_only=True) as checkpoints:
      items, progress = checkpoints.restore(step, shapes_of(self.workdir))
    return ({jax.tree_util.keystr(path): x for path, x in
             jax.tree_util.tree_leaves_with_path(devices.to_host(items))},
            dataclasses.replace(progress, seconds=0))

  def close(self):
    for process in (self.process, *self.others):
      if process.poll() is None:
        process.kill()
        process.communicate()
    subprocess.run(['umount', '--recursive', str(self.base)],
                   stderr=subprocess.DEVNULL, check=False)
    shutil.rmtree(self.base)


def shapes_of(workdir):
  """The shapes of what the checkpoints of a run directory hold."""
  config = read_config(workdir / 'config.json')
  model = classifier.build_model(config)
  return state_shapes(config, model, build_optimizer(config, 1)).to_items()


def _same(a, b):
  return a[1] == b[1] and a[0].keys() == b[0].keys() and all(
      x.dtype == b[0][name].dtype and x.tobytes() == b[0][name].tobytes()
      for name, x in a[0].items())
