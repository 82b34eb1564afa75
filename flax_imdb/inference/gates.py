"""What the gates of an LSTM do on a few reviews: open, closed, or between.

Of the first forward layer. The model is that of the scan, and is only watched:
its gates are computed again, from what its layer is given and returns.
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from flax_imdb.data.batches import eval_batches
from flax_imdb.data.reading import Reading
from flax_imdb.data.reviews import Reviews
from flax_imdb.inference import evaluate
from flax_imdb.model import classifier
from flax_imdb.model.classifier import Params
from flax_imdb.model.recurrent import RecurrentLayer, dense

_LAYER = 'forward_0'

# Activations by gate: float32 [tokens, H].
Gates = Callable[[Params], dict[str, np.ndarray]]


def make_gates(config: ConfigDict, model: classifier.SentimentClassifier,
               reviews: Reviews) -> Gates:
  """Makes gates(params) -> activations by name, at each token of the reviews.

  These have their features. input, forget and output are 0 to 1, candidate is
  -1 to 1; see `LSTMCell`. `params` are on the host, of several members with
  their axis, of which the first is looked at.
  """
  (_, batch), *_ = eval_batches(
      reviews, len(reviews), Reading.of(config.data))
  # A language model compares its words with some; it is not asked how.
  inputs: dict[str, Any] = {
      **evaluate.inputs(batch), 'negatives': np.zeros(1, np.int32)}
  model = model.clone(recurrence='scan')

  @jax.jit
  def activations(
      params: Params, inputs: dict[str, Any]) -> dict[str, jax.Array]:
    seen = []
    def watch(call, args, kwargs, context):
      result = call(*args, **kwargs)
      module = context.module
      if isinstance(module, RecurrentLayer) and module.name == _LAYER:
        seen.append((args[0], result[0]))
      return result
    with nn.intercept_methods(watch):
      model.apply({'params': params}, **inputs)
    (x_TSE, h_TSH), = seen
    cell = params[_LAYER]['steps']['cell']
    before_TSH = jnp.pad(h_TSH[:-1], ((1, 0), (0, 0), (0, 0)))
    z = (dense(x_TSE, cell['kernel'], model.dtype)
         + dense(before_TSH, cell['recurrent_kernel'], model.dtype)
         + cell['bias'])
    i, f, g, o = jnp.split(z, 4, axis=-1)
    return {'input': nn.sigmoid(i), 'forget': nn.sigmoid(f),
            'candidate': jnp.tanh(g), 'output': nn.sigmoid(o)}

  inside_TS = np.arange(batch['ids'].shape[1])[:, None] < batch['lengths']

  def gates(params: Params) -> dict[str, np.ndarray]:
    if model.members > 1:
      params = jax.tree.map(lambda x: x[0], params)
    return {name: np.asarray(x)[inside_TS]
            for name, x in activations(params, inputs).items()}

  return gates
