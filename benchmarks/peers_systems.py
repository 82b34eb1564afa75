"""Our trainer, Keras and PyTorch behind the same four calls, for peers.py.

build(recipe, padding, weights, steps_per_epoch) makes the model and its
optimizer; step(batch) trains on a batch; wait() ends all steps and returns the
last one's loss; probabilities(reviews, size) evaluates in batches of so many.
The recipe is configs/notebook.py or, in two directions, configs/words.py; how a
batch is padded is told as in peers_process.PADDING.

Nothing heavy is imported before a system needs it, so that no one's start and
memory are charged with another's libraries.
"""

import functools
import os

import numpy as np
from peers_data import Batch, bucket_width, eval_batches
from peers_process import OURS


class FlaxImdb:
  """This package."""

  def build(self, recipe: dict, padding: str, weights: list,
            steps_per_epoch: int) -> None:
    """Makes a model and what trains it; config.seed alone gives the weights."""
    del weights  # the weights are those that `prepare` wrote
    import jax
    from ml_collections import ConfigDict

    from flax_imdb.cluster import devices
    from flax_imdb.data.ngrams import NONE
    from flax_imdb.inference import evaluate
    from flax_imdb.model import classifier
    from flax_imdb.train.optimizer import build_optimizer
    from flax_imdb.train.step import init_state, make_train_step
    config = ConfigDict(recipe)
    config.model.mask_padding = padding != 'plain'
    model = classifier.for_device(
        config, classifier.build_model(config), jax.local_devices()[0],
        lambda text: None)
    optimizer = build_optimizer(config, steps_per_epoch)
    self._devices = devices
    self._state = devices.replicate(
        init_state(config, model, optimizer))
    # One step an epoch: the sums are those of the last step alone.
    self._train_step = make_train_step(config, model, optimizer, 1)
    config.data.bucket_width = bucket_width(recipe, padding)
    self._logits = evaluate.make_logits(
        config, evaluate.make_forward(model), NONE.annotate)

  def step(self, batch: Batch) -> None:
    self._state, self._sums = self._train_step(
        self._state, self._devices.shard(batch))

  def wait(self) -> float:
    """The loss of the last step, once all steps are done."""
    import jax
    jax.block_until_ready(self._state)
    sums = self._devices.to_host(self._sums)
    return float(sums.loss / sums.weight)

  def probabilities(self, reviews, size: int) -> np.ndarray:
    del size  # the config's
    logits = self._logits(self._state.eval_params(), reviews)
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


class Keras:
  """Keras 3 on one of its backends; step and predict on a batch, compiled."""

  def __init__(self, backend: str, setting: str = ''):
    os.environ['KERAS_BACKEND'] = backend
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    self._jit = setting == 'jit' or 'auto'
    if setting == 'parallel':
      import keras
      keras.distribution.set_distribution(keras.distribution.DataParallel())

  def build(self, recipe: dict, padding: str, weights: list,
            steps_per_epoch: int) -> None:
    """Makes the model of a recipe, compiled, with the given weights."""
    import keras
    data, m = recipe['data'], recipe['model']
    self._padding, self._recipe = padding, recipe
    layers, ops = keras.layers, keras.ops
    ids = keras.Input(
        (data['max_length'] if padding == 'plain' else None,), dtype='int32')
    x = layers.Embedding(data['vocab_size'], m['embedding_dim'],
                         mask_zero=padding != 'plain')(ids)
    # A layer that might be cuDNN's keeps TensorFlow from compiling by XLA.
    lstm = functools.partial(
        layers.LSTM, m['width'],
        use_cudnn=False if self._jit is True else 'auto')
    if m['bidirectional']:
      x = layers.SpatialDropout1D(m['embedding_dropout'])(x)
      x = layers.Bidirectional(
          lstm(return_sequences=True))(x)
      inside = ops.expand_dims(ops.not_equal(ids, 0), -1)
      x = ops.concatenate([
          ops.max(ops.where(inside, x, -1.0), axis=1),
          ops.sum(ops.where(inside, x, 0.0), axis=1)
          / ops.sum(ops.cast(inside, 'float32'), axis=1)], axis=-1)
      x = layers.Dropout(m['pooled_dropout'])(x)
    else:
      x = lstm()(x)
    x = layers.Dense(m['hidden_dim'], activation='relu')(x)
    self._model = keras.Model(ids, layers.Dense(1, activation='sigmoid')(x))
    self._model.set_weights(weights)
    rate, self._averages = recipe['learning_rate'], None
    if m['bidirectional']:
      warmup = round(recipe['warmup_epochs'] * steps_per_epoch)
      optimizer = keras.optimizers.Adam(
          keras.optimizers.schedules.CosineDecay(
              0.0, recipe['num_epochs'] * steps_per_epoch - warmup,
              warmup_target=rate, warmup_steps=warmup),
          global_clipnorm=recipe['clip_norm'], use_ema=True,
          ema_momentum=recipe['ema_decay'])
      self._averages = keras.callbacks.SwapEMAWeights()
    else:
      optimizer = keras.optimizers.RMSprop(rate)
    self._model.compile(optimizer, keras.losses.BinaryCrossentropy(),
                        jit_compile=self._jit)
    if self._averages:
      self._averages.set_model(self._model)

  def step(self, batch: Batch) -> None:
    self._loss = self._model.train_on_batch(
        batch['ids'], batch['labels'][:, None])

  def wait(self) -> float:
    return float(self._loss)

  def probabilities(self, reviews, size: int) -> np.ndarray:
    """The averaged weights' answers, where there are any and a step is done."""
    averaged = self._averages and int(self._model.optimizer.iterations)
    if averaged:
      self._averages.on_predict_begin()
    result = np.empty(len(reviews))
    if self._padding == 'padded':
      rows, ids = [], []
      for some, batch in eval_batches(
          self._recipe, self._padding, reviews, size):
        rows.append(some)
        ids.append(batch['ids'][:len(some)])
      result[np.concatenate(rows)] = self._model.predict(
          np.concatenate(ids), batch_size=size, verbose=0)[:, 0]
    else:
      for rows, batch in eval_batches(
          self._recipe, self._padding, reviews, size):
        p = self._model.predict_on_batch(batch['ids'])
        result[rows] = np.asarray(p)[:len(rows), 0]
    if averaged:
      self._averages.on_predict_end()
    return result


class Torch:
  """PyTorch, its fused nn.LSTM, time first."""

  def __init__(self, setting: str = '', device: str = 'cpu'):
    self._setting, self._device = setting, device

  def build(self, recipe: dict, padding: str, weights: list,
            steps_per_epoch: int) -> None:
    """Makes the model of a recipe, its optimizer, and sets the weights."""
    import torch
    from torch import nn
    torch.manual_seed(recipe['seed'])
    self._torch, self._padding, self._recipe = torch, padding, recipe
    m, both = recipe['model'], recipe['model']['bidirectional']
    lstms = [nn.LSTM(m['embedding_dim'], m['width'])
             for _ in range(2 if both else 1)]
    self._model = nn.ModuleDict({
        'embed': nn.Embedding(recipe['data']['vocab_size'], m['embedding_dim']),
        'lstms': nn.ModuleList(lstms),
        'hidden': nn.Linear(m['width'] * (4 if both else 1), m['hidden_dim']),
        'logit': nn.Linear(m['hidden_dim'], 1)})
    for lstm in lstms:  # Keras has one bias a gate; its twin stays 0
      lstm.bias_hh_l0.requires_grad_(False).zero_()
    trained = [p for p in self._model.parameters() if p.requires_grad]
    with torch.no_grad():  # Keras' order is that of our modules
      for parameter, weight in zip(trained, weights, strict=True):
        dense = weight.ndim == 2 and parameter is not trained[0]
        parameter.copy_(torch.from_numpy(weight.T if dense else weight))
    self._model.to(self._device)  # the parameters stay the same objects
    rate, self._average = recipe['learning_rate'], None
    self._logits = (torch.compile(self._forward, dynamic=padding != 'plain')
                    if self._setting == 'compiled' else self._forward)
    if not both:
      self._optimizer = torch.optim.RMSprop(  # there is no fused one
          trained, rate, alpha=0.9, eps=1e-7, foreach=True)
      return
    warmup = round(recipe['warmup_epochs'] * steps_per_epoch)
    rest = recipe['num_epochs'] * steps_per_epoch - warmup
    self._optimizer = torch.optim.Adam(trained, rate, eps=1e-7, fused=True)
    self._schedule = torch.optim.lr_scheduler.LambdaLR(
        self._optimizer, lambda step: step / warmup if step < warmup
        else (1 + np.cos(np.pi * (step - warmup) / rest)) / 2)
    swa = torch.optim.swa_utils
    self._average = swa.AveragedModel(
        self._model, multi_avg_fn=swa.get_ema_multi_avg_fn(recipe['ema_decay']))

  def _arguments(self, batch: Batch):
    torch = self._torch
    ids_BT, lengths_B = (torch.from_numpy(batch[name]).to(self._device).long()
                         for name in ('ids', 'lengths'))
    return ids_BT.T, lengths_B

  def _forward(self, model, ids, lengths, train: bool):
    torch, functional = self._torch, self._torch.nn.functional
    m, lstms = self._recipe['model'], model['lstms']
    x = model['embed'](ids)
    if m['bidirectional']:
      # Two directions over turned ids are many times as fast as one packed
      # bidirectional LSTM; neither mean nor maximum asks for the order.
      t = torch.arange(len(ids), device=self._device)[:, None]
      turned = torch.where(t < lengths, lengths - 1 - t, t)
      keep = functional.dropout(
          torch.ones_like(x[0]), m['embedding_dropout'], train)
      x = x * keep, model['embed'](ids.gather(0, turned)) * keep
      h = torch.cat([f(y)[0] for f, y in zip(lstms, x, strict=True)], -1)
      inside = (t < lengths)[..., None]
      pooled = functional.dropout(torch.cat([
          torch.where(inside, h, -1.0).amax(0),
          torch.where(inside, h, 0.0).sum(0) / lengths[:, None]], -1),
          m['pooled_dropout'], train)
    elif self._padding == 'plain':
      pooled = lstms[0](x)[0][-1]
    elif self._padding == 'packed':
      packed = torch.nn.utils.rnn.pack_padded_sequence(
          x, lengths.cpu(), enforce_sorted=False)
      pooled = lstms[0](packed)[1][0][-1]
    else:
      pooled = lstms[0](x)[0][
          lengths - 1, torch.arange(len(lengths), device=self._device)]
    return model['logit'](torch.relu(model['hidden'](pooled)))[:, 0]

  def step(self, batch: Batch) -> None:
    self._optimizer.zero_grad()
    loss = self._torch.nn.functional.binary_cross_entropy_with_logits(
        self._logits(self._model, *self._arguments(batch), True),
        self._torch.from_numpy(batch['labels']).to(self._device))
    loss.backward()
    if self._average:
      self._torch.nn.utils.clip_grad_norm_(
          self._model.parameters(), self._recipe['clip_norm'])
    self._optimizer.step()
    if self._average:
      self._schedule.step()
      self._average.update_parameters(self._model)
    self._loss = loss

  def wait(self) -> float:
    return float(self._loss.detach())

  def probabilities(self, reviews, size: int) -> np.ndarray:
    result = np.empty(len(reviews))
    averaged = self._average and int(self._average.n_averaged)
    model = self._average.module if averaged else self._model
    with self._torch.inference_mode():
      for rows, batch in eval_batches(
          self._recipe, self._padding, reviews, size):
        p = self._torch.sigmoid(
            self._logits(model, *self._arguments(batch), False))
        result[rows] = p.cpu().numpy()[:len(rows)]
    return result


def make(system: str, setting: str) -> FlaxImdb | Keras | Torch:
  """A system with a setting, as in peers_process.SETTINGS."""
  if system == OURS:
    return FlaxImdb()
  return Torch(setting) if system == 'torch' else Keras(
      system.removeprefix('keras_'), setting)
