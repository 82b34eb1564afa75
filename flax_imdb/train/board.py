"""What TensorBoard is shown beside the numbers of each epoch.

The config, as a text and as hyper-parameters, whose scores come at the end;
histograms of parameters and gates; precision and recall on test; and the
commonest words in the projector. What does not come with an epoch is a file of
its own, which a run that is started again writes again.
"""

from collections.abc import Callable, Sequence
from typing import Any

from flax.traverse_util import flatten_dict
import jax
from ml_collections import ConfigDict
import numpy as np
import scipy
from tokenizers import Tokenizer

from flax_imdb.cluster import devices, processes
from flax_imdb.config import differences, packaged
from flax_imdb.data.tokenizer import FIRST_WORD_ID
from flax_imdb.fields import ONLY_SHOWN, validates
from flax_imdb.inference import gates
from flax_imdb.inference.markdown import code_span, printable, table
from flax_imdb.model.classifier import Params
from flax_imdb.storage import files
from flax_imdb.train import events
from flax_imdb.train.task import Task

# Reviews of validation whose gates are looked at, and the most states of these.
_GATE_REVIEWS = 32
_MOST_STATES = 1 << 24  # 256 MiB of gates
_MOST_HISTOGRAMS = 100  # of a run: every epoch, or of more every few
_BINS = 64
_MOST_VALUES = 1 << 18  # of an array; of a larger one every few
_WORDS = 1000  # in the projector
_MOST_CURVES = 20  # classes with a curve of precision and recall
_THRESHOLDS = 127  # of a curve, and the most that tensorboardX has


def make_histograms(task: Task) -> Callable[[int, Params], list[Any]]:
  """Makes histograms(epoch, params) -> summaries.

  The first call writes the config. The parameters are replicated ones to
  evaluate with, after an epoch counted from 1; gates are those of the first 32
  reviews that validate, fewer of large models. For the first process: others
  write nothing and return none. Raises as `files.write`.
  """
  if processes.index() > 0:
    return lambda epoch, params: []
  is_config_written = False
  validation = task.splits.get('validation')
  look: gates.Gates | None = None
  if validation and task.config.model.cell == 'lstm':
    most = _MOST_STATES // (
        task.config.data.max_length * task.config.model.width)
    look = gates.make_gates(task.config, task.model, task.annotate(
        validation[:max(1, min(most, _GATE_REVIEWS))]))
  # 100 of a run at most.
  every = max(1, -(-task.config.num_epochs // _MOST_HISTOGRAMS))

  def make(epoch: int, params: Params) -> list[Any]:
    nonlocal is_config_written
    if not is_config_written:  # not before: its library takes a second
      write_config(task.workdir, task.config)
      is_config_written = True
    if epoch % every:
      return []
    params = devices.to_host(params)
    return histograms(params, look(params) if look else {})
  return make


def write_config(workdir: str, config: ConfigDict) -> None:
  """Writes the config for the tabs Text and HParams; raises as `files.write`.

  Into a file that TensorBoard reads before the others of the run.
  """
  from tensorboardX import summary

  fields = flatten_dict(config.to_dict(), sep='.')
  changed = differences(packaged('default'), config)
  rows = [(code_span(name), code_span(value),
           code_span(changed[name][0]) if name in changed else '')
          for name, value in sorted(fields.items())]
  experiment, begin, end = summary.hparams(
      {name: x for name, x in fields.items() if name not in ONLY_SHOWN},
      dict.fromkeys(_final_tags(config)))
  del end  # the run has not ended
  _write(workdir, '0.config', 0, [
      summary.text('config', table(('field', 'value', 'default'), rows)),
      experiment, begin])


def _final_tags(config: ConfigDict) -> list[str]:
  """The tags of `final_scalars` that a run with this config will have."""
  of_labels = config.objective == 'label'
  keys = ['accuracy', 'loss', *(['macro_f1'] if of_labels else [])]
  splits = [*(['test'] if of_labels else []),
            *(['validation'] if validates(config.data) else [])]
  tags = [f'final/{split}/{key}' for split in splits for key in keys]
  if of_labels and validates(config.data):
    tags.append('final/test/calibration_error')
  return tags


def final_scalars(summary: dict[str, Any]) -> dict[str, float]:
  """The scores of summary.json by tag, such as final/test/accuracy.

  They are those of the weights that the run evaluates, which need not be the
  last ones, as of which the curves end.
  """
  found = {f'final/{split}/{key}': summary[split][key]
           for split in ('test', 'validation') if split in summary
           for key in ('accuracy', 'loss', 'macro_f1')
           if key in summary[split]}
  if 'calibration' in summary:
    found['final/test/calibration_error'] = summary['calibration']['test'][
        'ece']
  return found


def histograms(
    params: Params, activations: dict[str, np.ndarray]) -> list[Any]:
  """Summaries of the parameters, on the host, and of what gates do.

  Of arrays with more than 262,144 values every second, third, ... is counted,
  and of any those that are finite.
  """
  from tensorboardX import summary

  arrays = {
      'parameters/' + jax.tree_util.keystr(path, simple=True, separator='/'): x
      for path, x in jax.tree_util.tree_leaves_with_path(params)}
  arrays |= {f'gates/{name}': x for name, x in activations.items()}
  found = []
  for tag, x in arrays.items():
    values = np.ravel(x)[::-(-x.size // _MOST_VALUES)].astype(np.float64)
    values = values[np.isfinite(values)]
    if len(values):
      found.append(summary.histogram(tag, values, bins=_BINS))
  return found


def write_results(
    task: Task, params: Params, summary: dict[str, Any],
    outputs: dict[str, np.ndarray]) -> None:
  """Writes what is known at the end, if this is the first process.

  The scores of `summary`, which is that of summary.json, curves of what
  `Task.outputs` said of test, and the words of the evaluated, replicated
  `params`. The file is one that TensorBoard reads after the others. Raises as
  `files.write`.
  """
  if processes.index() > 0:
    return
  from tensorboardX import summary as summaries

  curves = []
  if task.config.objective == 'label':
    curves = pr_curves(
        outputs['test'], task.splits['test'].labels, task.labels,
        summary.get('calibration', {}).get('temperature', 1.0))
  _, _, end = summaries.hparams({}, {})
  _write(task.workdir, 'final', summary['evaluated_step'], [
      events.scalars(final_scalars(summary)), *curves, end])
  write_projector(task.workdir, devices.to_host(params), task.tokenizer)


def pr_curves(logits: np.ndarray, labels: np.ndarray, names: Sequence[str],
              temperature: float) -> list[Any]:
  """Precision and recall of test at 127 thresholds of the probability.

  Logits and labels are as of `evaluate.score`. Of two classes the curve is that
  of the second, of more each has one, but no more than the first 20.
  """
  from tensorboardX import summary

  z = logits.astype(np.float64) / temperature
  if z.ndim == 1:
    chosen = {1: scipy.special.expit(z)}
  else:
    p_NK = scipy.special.softmax(z, axis=1)
    chosen = {k: p_NK[:, k] for k in range(min(len(names), _MOST_CURVES))}
  return [summary.pr_curve(f'test/{names[k]}', labels == k, p, _THRESHOLDS)
          for k, p in chosen.items()]


def write_projector(
    workdir: str, params: Params, tokenizer: Tokenizer) -> None:
  """Writes the embedding of the 1,000 commonest words; as `files.write`.

  projector_config.pbtxt, where TensorBoard looks, and what it names. `params`
  are on the host; of several members the first one's.
  """
  table_VE = params['embed']['embedding']
  table_VE = table_VE[0] if table_VE.ndim == 3 else table_VE
  ids = range(FIRST_WORD_ID, min(
      FIRST_WORD_ID + _WORDS, tokenizer.get_vocab_size(), len(table_VE)))
  if len(ids) < 2:  # TensorBoard would take one word for a heading
    return
  words = [printable(tokenizer.id_to_token(i) or '') for i in ids]
  folder = files.as_path(workdir)
  files.write(folder / 'projector' / 'metadata.tsv', '\n'.join(words) + '\n')
  files.write(folder / 'projector' / 'tensors.tsv', ''.join(
      '\t'.join(f'{x:.6g}' for x in table_VE[i]) + '\n' for i in ids))
  files.write(folder / 'projector_config.pbtxt', """\
embeddings {
  tensor_name: "words"
  tensor_path: "projector/tensors.tsv"
  metadata_path: "projector/metadata.tsv"
}
""")


def _write(workdir: str, name: str, step: int, summaries: list[Any]) -> None:
  files.write(
      f'{workdir}/events.out.tfevents.{name}', events.records([
          events.VERSION, *({'step': step, 'summary': summary}
                            for summary in summaries)]))
