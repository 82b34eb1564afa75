"""Who is lost and who is stuck, by what was heard of all."""

from flax_imdb.cluster import watchdog


def _watch(index=1, count=3):
  watch = watchdog.Watchdog(index, count)
  watch.prepare(None, now=0.0)
  return watch


def test_who_is_silent_is_lost():
  watch = _watch()
  watch.report_alive(29)
  for second in range(1, 30):
    beat = [second, second]
    watch.listen({0: beat, 1: beat, 2: [min(second, 5)] * 2}, float(second))
    lost = watch.verdict(float(second))
    assert bool(lost) == (second > 5 + watchdog.SILENT)
  assert lost.startswith('process 2 of 3 is lost at step 29')


def test_who_cannot_be_asked_is_process_0():
  watch = _watch()
  watch.listen({i: [1, 1] for i in range(3)}, 1.0)
  assert not watch.verdict(1 + watchdog.SILENT)
  assert watch.verdict(1.1 + watchdog.SILENT).startswith(
      'process 0 of 3 is lost at step 0')


def test_who_lives_but_does_not_move_is_stuck():
  watch = _watch()
  watch.report_alive(9)
  for second in range(1, int(watchdog.STUCK) + 3):
    watch.listen({i: [second, 8 if i == 2 else 9] for i in range(3)},
                 float(second))
    stuck = watch.verdict(float(second))
    assert bool(stuck) == (second > 1 + watchdog.STUCK)
  assert stuck.startswith('process 2 of 3 is stuck at step 9')
