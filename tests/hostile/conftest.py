"""What all hostile tests share."""

import pytest


@pytest.fixture(autouse=True)
def one_step(one_train_step):
  """What is hostile is the files: of a config, one train step will do."""
