"""A short version of faults.py: most kinds of fault once, in a few runs."""

import faults
import pytest


@pytest.mark.slow
def test_a_disturbed_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path):
  harness = faults.Faults(seed=0, folder=tmp_path)
  harness.deal(short=True)
  dealt = len(harness.deck)
  for _ in range(30):  # what came too late is tried on the next run
    if harness.deck:
      harness.play(most=dealt)
  print(harness.text())
  tried, recovered, lost, differing = map(harness.total, range(4))
  assert lost == differing == 0
  assert tried == recovered == dealt
