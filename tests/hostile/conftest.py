"""What all hostile tests share."""

import pytest

from flax_imdb.train import loop


@pytest.fixture(scope='session')
def train_steps():
  """The train steps that were made, by config and steps an epoch."""
  return {}


@pytest.fixture(autouse=True)
def one_train_step(train_steps, monkeypatch):
  """Makes the train step of a config once, for what is hostile is the files.

  To trace and to load it takes longer than all else that a resumed run does.
  """
  make = loop.make_train_step
  def made(config, model, optimizer, steps_per_epoch):
    key = config.to_json(sort_keys=True), steps_per_epoch
    if key not in train_steps:
      train_steps[key] = make(config, model, optimizer, steps_per_epoch)
    return train_steps[key]
  monkeypatch.setattr(loop, 'make_train_step', made)
