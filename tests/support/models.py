"""A tiny model that was never trained."""

import jax
import numpy as np

from flax_imdb.cluster import devices
from flax_imdb.config import check_fields, load_config
from flax_imdb.inference import evaluate
from flax_imdb.model import classifier
from flax_imdb.terminal import CompileClock


def tiny_model(**fields):
  """(config, model, replicated parameters) of a tiny untrained model."""
  config = load_config('configs/debug.py')
  config.debug = False
  config.data.max_length, config.data.bucket_width = 12, 5
  config.update_from_flattened_dict(fields)
  check_fields(config)
  model = classifier.build_model(config)
  params = classifier.init_params(model, jax.random.key(1))
  # Embeddings as large as trained ones, so that logits differ visibly.
  params['embed']['embedding'] *= 20
  return config, model, devices.replicate(params)


def logits_of(config, model):
  """`evaluate.make_logits`, of which nobody takes the time."""
  return evaluate.make_logits(config, model, CompileClock())


def one_by_one(model, params, reviews, max_length):
  """The logits, each review alone in a batch and on one device."""
  params, logits = devices.to_host(params), []
  apply = jax.jit(model.apply)
  for i in range(len(reviews)):
    ids = reviews.ids[reviews.offsets[i]:reviews.offsets[i + 1]][:max_length]
    row = np.zeros((1, max_length), np.int32)
    row[0, :len(ids)] = ids
    logits += list(apply({'params': params}, row, np.array([len(ids)])))
  return np.array(logits)
