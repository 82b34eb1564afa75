"""A run directory to what other programs read."""

import dataclasses
import json
from typing import Any

import jax
from jax import export
import jax.numpy as jnp
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from flax_imdb.checkpoint import run
from flax_imdb.cluster import devices
from flax_imdb.data import ngrams, segments
from flax_imdb.data.batches import shapes
from flax_imdb.data.reading import Reading
from flax_imdb.data.tokenizer import PADDING_ID, unescapes
from flax_imdb.errors import UserError
from flax_imdb.inference import evaluate, model_card
from flax_imdb.model import classifier, keras_weights
from flax_imdb.storage import files

PLATFORMS = ('cpu', 'cuda', 'tpu')


def export_stablehlo(workdir: str, which: str | None) -> str:
  """Writes a directory that needs neither this package nor Flax.

  In it are model.stablehlo, the bytes of `program`; tokenizer.json, of
  `serving_tokenizer`; ngrams.npz, as of the run, if the model reads these; and
  model.json: labels, and of two the threshold over which a logit means the
  second of them, while of more each has one; rows, the reviews of one call with
  which predict computes on a device of this machine; inputs, the arguments of
  the program; reading, how reviews are cut, and segments, the places for these
  in one call, if they are; order, the words of the longest n-gram; step, of the
  parameters; temperature, by which a logit is divided to become a probability;
  unescape, whether HTML's entities are to be read before the tokenizer.
  And MODEL_CARD.md, of `model_card`. examples/serve_export.py does all that.

  It becomes export/ of the run directory. Returns one line that says what was
  written. `which` and errors as of `run.restore`, and of `files.write`.
  """
  restored = run.restore(workdir, which)
  config, folder = restored.config, files.as_path(workdir) / 'export'
  rows = evaluate.batch_size(config) // jax.local_device_count()
  reading = Reading.of(config.data)
  about = {'labels': restored.labels,
           **({'threshold': 0.0} if len(restored.labels) == 2 else {}),
           'step': restored.step, 'temperature': restored.temperature,
           'rows': rows,
           'inputs': list(classifier.inputs(shapes(config, 1, 1))),
           'reading': dataclasses.asdict(reading),
           'unescape': unescapes(restored.tokenizer)}
  if reading.segment_length:
    about['segments'] = segments.eval_size(rows, reading)
  if config.model.inputs != 'words':
    about['order'] = config.data.log_odds_order
    ngrams.save(restored.ngrams, folder / 'ngrams.npz')
  files.write(folder / 'tokenizer.json',
              serving_tokenizer(restored.tokenizer, config))
  files.write(folder / 'model.json', json.dumps(about, indent=2) + '\n')
  files.write(folder / 'model.stablehlo', program(
      config, restored.model, devices.to_host(restored.params)))
  model_card.write_export(workdir, restored)
  return f'wrote step {restored.step} to {folder}'


def program(config: ConfigDict, model: classifier.SentimentClassifier,
            params: Any) -> bytes:
  """Serialises logits(*inputs), for any numbers of rows and `PLATFORMS`.

  `params` are NumPy arrays, which become part of the program. What this returns
  `jax.export.deserialize` reads: XLA's operations, no pickle. Its `call` takes
  the values of `classifier.inputs`, and returns float32 [B], or [B, C] of C > 2
  classes.
  """
  found = classifier.inputs(shapes(
      config, 1, 1, class_count=model.class_count))

  def logits(*inputs):
    # XLA would work on constants ahead of time, and round otherwise than it
    # does where the parameters are arguments.
    variables = jax.lax.optimization_barrier(jax.tree.map(jnp.asarray, params))
    return classifier.predict(
        model, variables, dict(zip(found, inputs, strict=True)))

  scope = export.SymbolicScope()
  def dims(text):
    return export.symbolic_shape(text, scope=scope)
  axes = {'ids': 'rows, width', 'lengths': 'rows', 'segments': 'reviews, most',
          'linear': 'reviews' if config.data.segment_length else 'rows',
          'bigrams': 'rows, width',
          'log_odds': f'rows, width, {model.log_odds_features}'}
  if model.class_count > 2:
    axes['linear'] += f', {model.class_count}'
  with jax.disable_jit(False):  # config.debug may have turned jit off
    exported = export.export(jax.jit(logits), platforms=PLATFORMS)(
        *(jax.ShapeDtypeStruct(dims(axes[name]), dtype)
          for name, (_, dtype) in found.items()))
  return bytes(exported.serialize())


def serving_tokenizer(tokenizer: Tokenizer, config: ConfigDict) -> str:
  """The tokenizer as JSON, with what `batches` does to ids as part of it.

  `encode_batch` then cuts reviews at data.max_length and pads them to the
  longest, rounded up to data.bucket_width, or to data.max_length without. Not
  where reviews are read in segments, or their last tokens, or where a linear
  model reads all of them.
  """
  copy = Tokenizer.from_str(tokenizer.to_str())
  data = config.data
  if (data.segment_length or data.read == 'last'
      or 'linear' in config.model.inputs.split('+')):
    return copy.to_str(pretty=True)
  copy.enable_truncation(data.max_length)
  copy.enable_padding(
      pad_id=PADDING_ID, pad_token='[PAD]',
      length=None if data.bucket_width else data.max_length,
      pad_to_multiple_of=min(data.bucket_width, data.max_length) or None)
  return copy.to_str(pretty=True)


def export_keras(workdir: str, which: str | None) -> str:
  """Writes keras.npz: what model.set_weights() of the notebook's model takes.

  Arguments and result as of `export_stablehlo`. Raises UserError if the run
  can't be opened, or Keras' model can't be like it.
  """
  restored = run.restore(workdir, which)
  config = restored.config
  if config.model.pooling != 'last' or config.data.segment_length:
    raise UserError(
        'Keras has no place for this model: it needs config.model.pooling=last '
        'and config.data.segment_length=0, as in configs/notebook.py')
  path = files.as_path(workdir) / 'keras.npz'
  keras_weights.write_weights(path, devices.to_host(restored.params))
  masked = '; it needs an Embedding with mask_zero=True'
  return (f'wrote step {restored.step} to {path}'
          + masked * config.model.mask_padding)
