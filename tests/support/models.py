"""Models that were never trained."""

import jax
import jax.numpy as jnp
import numpy as np

from flax_imdb.cluster import devices
from flax_imdb.config import load_config, override
from flax_imdb.data.ngrams import NONE
from flax_imdb.fields import check_fields
from flax_imdb.inference import evaluate
from flax_imdb.model import classifier


def drawn_params(model, seed=0):
  """Parameters of the size of initial ones, by NumPy: it compiles nothing."""
  rng = np.random.default_rng(seed)
  def draw(path, shape):
    if path[-1].key == 'bias':
      return np.full(shape.shape, 0.1, np.float32)  # or relu might be all 0
    limit = (6 / max(sum(shape.shape), 1)) ** 0.5  # glorot_uniform's
    return rng.uniform(-limit, limit, shape.shape).astype(np.float32)
  return jax.tree.map(
      jnp.asarray, jax.tree_util.tree_map_with_path(
          draw, classifier.param_shapes(model)))


def default_with(fields):
  """The default config with other fields, checked as the program does."""
  config = load_config('configs/default.py')
  for field, value in fields.items():
    override(config, field, str(value))
  check_fields(config)
  return config


def tiny_model(class_count=2, **fields):
  """(config, model, replicated parameters) of a tiny untrained model."""
  config = load_config('configs/debug.py')
  config.debug = False
  config.data.max_length, config.data.bucket_width = 12, 5
  config.update_from_flattened_dict(fields)
  check_fields(config)
  model = classifier.build_model(config, class_count)
  params = drawn_params(model, seed=1)
  # Embeddings as large as trained ones, so that logits differ visibly.
  params['embed']['embedding'] *= 20
  return config, model, devices.replicate(params)


def logits_of(config, model):
  """`evaluate.make_logits` without n-grams."""
  return evaluate.make_logits(
      config, evaluate.make_forward(model), NONE.annotate)


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
