"""The view of a run that trains: what it says, and that it fits."""

import io
import re
import types

from ml_collections import ConfigDict
import pytest
from rich.console import Console

from flax_imdb.checkpoint.manager import Progress
from flax_imdb.cluster import devices
from flax_imdb.terminal import Rate
from flax_imdb.train import screen
from flax_imdb.train.screen import Screen, curve

CONFIG = ConfigDict({
    'num_epochs': 9, 'early_stopping': {'monitor': 'accuracy', 'patience': 3}})
WHY = ('recurrence: scan on NVIDIA H100, for config.model.width=4096 is more '
       'than the kernel holds')


def _line(epoch, **scores):
  return {'epoch': epoch, 'step': 7 * epoch, **{
      split: {'loss': loss, 'accuracy': accuracy}
      for split, (loss, accuracy) in scores.items()}}


def _screen(step=0, epochs=(), **fields):
  return Screen(
      CONFIG, types.SimpleNamespace(steps_per_epoch=7), step, list(epochs),
      Progress(**fields), '8 x NVIDIA H100', WHY)


def _rate(reviews=100, tokens=10_000):
  rate = Rate()
  rate.reviews, rate.tokens = reviews, tokens
  rate.seconds = lambda: 2.0
  return rate


def _seen(view, width=80, encoding='utf-8'):
  file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
  Console(file=file, width=width).print(view)
  file.seek(0)
  return [line.rstrip() for line in file.read().splitlines()]


RUN = [_line(1, train=(0.7, 0.5), validation=(0.6, 0.6)),
       _line(2, train=(0.5, 0.7), validation=(0.4, 0.9)),
       _line(3, train=(0.3, 0.9), validation=(0.3, 0.8))]


def test_all_that_is_known_is_there(monkeypatch):
  monkeypatch.setattr(devices, 'memory', lambda: (1_200_000_000, 80 * 10**9))
  view = _screen(21, RUN, waited=1)
  view.update(24, {'loss': 0.1, 'accuracy': 0.95, 'n': 48}, _rate())
  lines = _seen(view)
  for line, want in zip(lines, [
      r'epoch 4/9 ━+\S +  43% -:--:-- left', r'run +━+\S +  38% \S+ left',
      r' +loss +accuracy', r'train +0\.1000 █▆▃▁ +0\.9500 +▁▄▇█',
      r'validation 0\.3000 █▃▁ +0\.8000 +▁█▆',
      r'step 24 of 63  50 reviews/s  5,000 tokens/s',
      r'best: epoch 2, validation accuracy 0\.9000  2 of 3 epochs of patience '
      'left',
      r'memory \d\.\d\d GB  device 1\.20 of 80\.00 GB  8 x NVIDIA H100',
      WHY[:77], WHY[78:]], strict=True):
    assert re.fullmatch(want, line), (want, line)


def test_an_epoch_that_is_over_is_not_counted_twice_in_a_curve():
  epochs = RUN[:1]
  view = _screen(7, epochs)
  view.update(14, {'loss': 0.5, 'accuracy': 0.7}, _rate())
  assert 'train      0.5000 █▁  ' in '\n'.join(_seen(view))
  view._epochs.append(RUN[1])
  assert 'train      0.5000 █▁  ' in '\n'.join(_seen(view))


@pytest.mark.parametrize(('step', 'epoch', 'share'), [
    (0, 1, 0), (1, 1, 14), (7, 1, 100), (8, 2, 14), (14, 2, 100), (15, 3, 14)])
def test_epochs_are_counted_from_1(step, epoch, share):
  view = _screen(3)
  view.update(step, {'loss': 0.75, 'accuracy': 0.5, 'n': 4}, _rate())
  assert view.line().startswith(
      f'epoch {epoch}  step {step}/63  loss 0.7500  accuracy 0.5000  '
      '50 reviews/s')
  assert re.match(rf'epoch {epoch}/9 .* {share}% ', _seen(view)[0])


def test_the_time_left_is_of_the_steps_so_far(monkeypatch):
  view, now = _screen(), [100.0]
  view._bars.get_time = lambda: now[0]
  for step in range(1, 5):
    now[0] += 2
    view.update(step, {'loss': 0.75, 'accuracy': 0.5, 'n': 4}, _rate())
  assert view.line().endswith('50 reviews/s  0:01:58 left')  # 59 steps
  epoch, run, *_ = _seen(view)
  assert epoch.endswith(' 57% 0:00:06 left')
  assert run.endswith('  6% 0:01:58 left')


def test_without_validation_there_is_neither_its_row_nor_a_best_epoch():
  text = '\n'.join(_seen(_screen(7, [_line(1, train=(0.7, 0.5))])))
  assert 'train 0.7000' in text
  assert 'validation' not in text and 'best' not in text


@pytest.mark.parametrize('encoding', ['utf-8', 'ascii'])
@pytest.mark.parametrize('width', [40, 60, 80, 200])
def test_no_line_is_longer_than_the_terminal_is_wide(width, encoding):
  epochs = [_line(i, train=(1 / i, 0.5), validation=(1 / i, 1 - 1 / i))
            for i in range(1, 100)]
  view = _screen(7 * 99, epochs, waited=1)
  view._steps_total = 1_234_567
  view.update(7 * 99 + 3, {'loss': 12.5, 'accuracy': 0.5},
              _rate(2_469_134, 987_654_321))
  file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
  Console(file=file, width=width, soft_wrap=True).print(view)
  file.seek(0)
  lines = file.read().splitlines()
  assert max(map(len, lines)) <= width and '…' not in ''.join(lines)
  # Nor is it taken apart: each fact is in one line, if there is room for it.
  for fact in ('1,234,567 reviews/s', '493,827,160 tokens/s',
               'epochs of patience left'):
    assert any(fact in line for line in lines), fact
  assert len(re.search('train +\\S+ (\\S+)', '\n'.join(lines))[1]) == min(
      20, (width - 30) // 2)


@pytest.mark.parametrize(('values', 'want'), [
    ([], ''), ([3], '▅'), ([1, 1], '▅▅'), ([0, 1, 2, 3.5], '▁▃▅█'),
    ([0, float('nan'), float('inf'), -7], '█  ▁')])
def test_a_curve(values, want):
  assert curve(values) == want


def test_without_proc_memory_is_the_most_that_there_was(monkeypatch, tmp_path):
  assert screen._memory()[0].endswith(' GB')
  monkeypatch.setattr(screen, '_STATM', tmp_path / 'none')
  assert screen._memory()[0].endswith(' GB at most')
