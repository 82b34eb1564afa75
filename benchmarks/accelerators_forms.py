"""What accelerators_run.py times, behind the same calls as peers_systems.py.

step(batch) trains on a batch of the host; wait() ends all steps and returns the
last one's loss; logits(batch) evaluates with the parameters as they are then;
peak_mib(batch) is the memory of a step, None where nobody tells. All are made
of (form, config, device, state) and begin with the state's parameters.

`Cudnn`, and the peers on a GPU, were never run: there was no GPU. A test
compares the former with jax' own reference of cuDNN's layer, on a CPU.
"""

import importlib.util

import jax
from jax.experimental import rnn
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
import numpy as np
from peers_data import Batch, in_keras_order
import peers_systems

from flax_imdb.cluster.devices import AXIS
from flax_imdb.errors import UserError
from flax_imdb.inference import evaluate
from flax_imdb.model import classifier
from flax_imdb.train.optimizer import build_optimizer
from flax_imdb.train.step import TrainState, make_train_step


class Cudnn(classifier.SentimentClassifier):
  """The classifier with cuDNN's layer in place of ours; the same parameters.

  Weights as `jax.experimental.rnn` packs them: the kernels of all directions,
  transposed, then two biases of each, of which one stays 0; gates in our order.
  States past a review's end are 0, and no mean or maximum reads them.
  """

  def _read(self, layer, x_TSE, lengths_S, keep_states):
    if self.is_initializing():
      return super()._read(layer, x_TSE, lengths_S, keep_states)
    cells = [self.variables['params'][f'{direction}_{layer}']['steps']['cell']
             for direction in self.directions]
    kernels = [cell[name].T.ravel() for cell in cells
               for name in ('kernel', 'recurrent_kernel')]
    biases = [x for cell in cells
              for x in (cell['bias'], jnp.zeros_like(cell['bias']))]
    zeros = jnp.zeros((len(cells), x_TSE.shape[1], self.width))
    h_STF, last, _ = rnn.lstm(
        jnp.swapaxes(x_TSE, 0, 1), zeros, zeros,
        jnp.concatenate([*kernels, *biases]), lengths_S, x_TSE.shape[2],
        self.width, 1, 0.0, self.bidirectional)
    return list(zip(jnp.split(jnp.swapaxes(h_STF, 0, 1), len(cells), axis=-1),
                    last, strict=True))


class Ours:
  """The real train step and evaluation of this package, on one device."""

  def __init__(self, form: str, config: ConfigDict, device: jax.Device,
               state: TrainState):
    config = config.copy_and_resolve_references()
    config.model.recurrence = 'scan' if form == 'cudnn' else form
    model = classifier.for_device(
        config, classifier.build_model(config), device, lambda text: None)
    if form == 'cudnn':
      if 'NVIDIA' not in device.device_kind:
        raise UserError(f'{device.device_kind} is no GPU of NVIDIA')
      model = Cudnn(**{k: getattr(model, k)
                       for k in classifier.SentimentClassifier.__annotations__})
    self._train_step = make_train_step(
        config, model, build_optimizer(config, 1), 1, [device])
    self._forward = evaluate.make_forward(model, [device])
    # As the step returns it, or that would be compiled twice.
    self._state = jax.device_put(state, NamedSharding(
        Mesh(np.array([device]), (AXIS,)), PartitionSpec()))

  def step(self, batch: Batch) -> None:
    self._state, self._metrics = self._train_step(
        self._state, {k: v[None] for k, v in batch.items()})

  def wait(self) -> float:
    jax.block_until_ready(self._state)
    loss, weight = jax.device_get((self._metrics.loss, self._metrics.weight))
    return float(loss / weight)  # one step an epoch: the last one's alone

  def logits(self, batch: Batch) -> np.ndarray:
    return np.ravel(self._forward(self._state.params, {
        k: v[None] for k, v in classifier.inputs(batch).items()}))

  def peak_mib(self, batch: Batch) -> float:
    """By the compiler: what a device tells is the most of all forms so far."""
    memory = self._train_step.lower(self._state, {
        k: v[None] for k, v in batch.items()}).compile().memory_analysis()
    return (memory.argument_size_in_bytes + memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes) / 2**20


class Torch(peers_systems.Torch):
  """PyTorch, eager, with its cuDNN where there is a GPU."""

  def __init__(self, form: str, config: ConfigDict, device: jax.Device,
               state: TrainState):
    import torch
    self._cuda = torch.cuda if torch.cuda.is_available() else None
    if (device.platform == 'gpu') != bool(self._cuda):
      raise UserError(f'this PyTorch does not run on {device.device_kind}')
    super().__init__(device='cuda' if self._cuda else 'cpu')
    weights = jax.tree.map(np.array, in_keras_order(state.params))  # writable
    self.build(config.to_dict(), 'bucketed 64', weights, 1)
    self._optimizer.param_groups[0]['eps'] = config.adam_epsilon

  def wait(self) -> float:
    if self._cuda:
      self._cuda.synchronize()
    return super().wait()

  def logits(self, batch: Batch) -> np.ndarray:
    with self._torch.inference_mode():
      return self._forward(
          self._model, *self._arguments(batch), False).cpu().numpy()

  def peak_mib(self, batch: Batch) -> float | None:
    if not self._cuda:
      return None
    self._cuda.reset_peak_memory_stats()
    self.step(batch)
    self.wait()
    return self._cuda.max_memory_allocated() / 2**20


class Keras(peers_systems.Keras):
  """Keras on JAX, on its default device."""

  def __init__(self, form: str, config: ConfigDict, device: jax.Device,
               state: TrainState):
    super().__init__('jax')
    self.build(config.to_dict(), 'bucketed 64', in_keras_order(state.params), 1)
    self._model.optimizer.epsilon = config.adam_epsilon

  def step(self, batch: Batch) -> None:
    self._model.reset_metrics()  # or the loss would be a running mean
    super().step(batch)

  def logits(self, batch: Batch) -> np.ndarray:
    p = np.asarray(
        self._model.predict_on_batch(batch['ids']), np.float64)[:, 0]
    return np.log(p / (1 - p))

  def peak_mib(self, batch: Batch) -> None:
    """Nobody tells."""


FORMS = dict.fromkeys(('scan', 'joint', 'kernel', 'interpret', 'cudnn'), Ours)
PEERS = {'torch': Torch, 'keras': Keras}


def available(device: jax.Device) -> list[str]:
  """The names that make sense on a device, of what is installed."""
  cudnn = ['cudnn'] if 'NVIDIA' in device.device_kind else []
  return ['scan', 'joint', 'kernel', *cudnn, *filter(
      importlib.util.find_spec, PEERS)]  # which are called as their modules


def make(form: str, config: ConfigDict, device: jax.Device,
         state: TrainState) -> Ours | Torch | Keras:
  """One of `FORMS` or `PEERS`, which begins with a state of the host.

  Raises UserError if the device can't have it, or it is not installed.
  """
  if form in PEERS and not importlib.util.find_spec(form):
    raise UserError(f'{form} is not installed')
  return (FORMS | PEERS)[form](form, config, device, state)
