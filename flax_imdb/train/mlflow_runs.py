"""A run at MLflow: https://mlflow.org/docs/latest/ml/tracking.

Its own environment variables say where: MLFLOW_TRACKING_URI, a server or a
file, and MLFLOW_EXPERIMENT_NAME (else flax_imdb).
"""

import logging
import os
import pathlib
import time

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

FIX = 'see MLFLOW_TRACKING_URI'


class Service:
  """One run; see `loggers.Loggers`."""

  def __init__(self, config: ConfigDict, workdir: str, known: str | None):
    """Begins a run, or goes on with the one of a known id, if it is there.

    Raises what MLflow raises. Its parameters are the config that it began with.
    """
    # By itself it would try for four minutes; see `loggers`.
    os.environ.setdefault('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '2')
    import mlflow
    from mlflow import entities

    # They tell of each table that they make, and of each time they try.
    for name in 'mlflow', 'alembic', 'urllib3':
      logging.getLogger(name).setLevel(logging.ERROR)
    self._entities = entities
    self._client = mlflow.MlflowClient()
    if known and self._goes_on(known):
      self.id = known
      return
    name = os.environ.get('MLFLOW_EXPERIMENT_NAME') or 'flax_imdb'
    experiment = self._client.get_experiment_by_name(name)
    self.id = self._client.create_run(
        experiment.experiment_id if experiment else
        self._client.create_experiment(name),
        run_name=pathlib.PurePath(workdir).name).info.run_id
    fields = flatten_dict(config.to_dict(), sep='.')
    self._client.log_batch(self.id, params=[
        entities.Param(field, str(value)) for field, value in fields.items()])

  def _goes_on(self, known: str) -> bool:
    """Whether there is such a run, which then runs again."""
    from mlflow.exceptions import MlflowException
    try:
      self._client.update_run(known, status='RUNNING')
    except MlflowException as e:
      if e.error_code != 'RESOURCE_DOES_NOT_EXIST':
        raise
      return False
    return True

  def log(self, step: int, scalars: dict[str, float]) -> None:
    now = int(time.time() * 1000)
    self._client.log_batch(self.id, metrics=[
        self._entities.Metric(tag, float(value), now, step)
        for tag, value in scalars.items()])

  def log_results(self, step: int, scalars: dict[str, float]) -> None:
    there = self._client.get_run(self.id).data.metrics
    self.log(step, {tag: value for tag, value in scalars.items()
                    if there.get(tag) != value})

  def close(self, done: bool) -> None:
    self._client.set_terminated(self.id, 'FINISHED' if done else 'KILLED')
