"""What the tests of sweep and tune share: runs that are only played."""

import sys

import pytest
from support.command import ROOT


@pytest.fixture
def played(tmp_path, monkeypatch):
  """Lets the processes that this one starts play a run; see played_run.py."""
  program = tmp_path / 'python'
  program.write_text(
      f'#!/bin/sh\nexec {sys.executable} '
      f'{ROOT}/tests/support/played_run.py "$@"\n')
  program.chmod(0o755)
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  monkeypatch.setattr(sys, 'executable', str(program))
