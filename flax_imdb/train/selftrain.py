"""Self-training: a teacher's labels for reviews that have none.

A student learns from the labels of the training reviews, and from what a run
that knows these says of the others. That run, the teacher, may be a student
itself: one round less, in a directory inside the student's.
"""

from typing import Any

from ml_collections import ConfigDict
import numpy as np
import scipy

from flax_imdb.checkpoint import run
from flax_imdb.cluster import devices, preemption, processes
from flax_imdb.data import pseudo_labels, sources
from flax_imdb.data.pseudo_labels import PseudoLabels
from flax_imdb.data.reviews import load_splits
from flax_imdb.errors import UserError
from flax_imdb.inference import evaluate
from flax_imdb.model import classifier
from flax_imdb.storage import files
from flax_imdb.terminal import CompileClock, Terminal
from flax_imdb.train import loop

# What teacher and student must agree in: else the teacher has seen reviews that
# validate the student, or that test it.
_SHARED = ('name', 'train_file', 'validation_file', 'test_file',
           'test_fraction', 'train_split', 'test_split', 'validation_split',
           'validation_fraction', 'validation_by', 'text_field', 'label_field')


def train(config: ConfigDict, workdir: str,
          terminal: Terminal) -> dict[str, Any]:
  """As `loop.train`, after config.self_training_rounds of teachers.

  Each is a run directory, in which a run that was killed goes on; what they say
  is kept in the student's as `pseudo_labels.npz`. Raises UserError also for
  fields of these that would have no use, or another than they seem to.
  """
  if not run.is_run(workdir):  # older ones may be so
    _check_use(config)
  if config.self_training_rounds:
    with run.locked(workdir, terminal.announce):
      run.check_directory(workdir, config)
    # As the first process sees it: another may look when it has just written.
    # What lies in a directory that is no run yet may be for another config.
    taught = run.is_run(workdir) and files.exists(
        files.as_path(workdir) / 'pseudo_labels.npz')
    if processes.gather(str(taught))[0] == str(False):
      _teach(config, workdir, terminal)
  return loop.train(config, workdir, terminal)


def _check_use(config: ConfigDict) -> None:
  split = config.data.unlabelled_split
  if split and split == config.data.train_split:
    raise UserError(
        f'config.data.unlabelled_split={split} is what config.data.train_split '
        'reads with its labels: give another split')
  if config.teachers and not config.self_training_rounds:
    raise UserError(f'config.teachers={config.teachers} has no use: give '
                    '--config.self_training_rounds=1 as well')


def teacher_config(config: ConfigDict) -> ConfigDict:
  """The config of the teacher of a student: the same with a round less."""
  teacher = config.copy_and_resolve_references()
  teacher.self_training_rounds -= 1
  if not teacher.self_training_rounds:
    teacher.teachers = ''
    if not (config.virtual_adversarial_norm or config.entropy_weight):
      teacher.data.unlabelled_split = ''  # labels alone
  return teacher


def _teach(config: ConfigDict, workdir: str, terminal: Terminal) -> None:
  """Writes what the teachers say, which are trained before if need be."""
  rounds = config.self_training_rounds
  with processes.one_at_a_time():  # what is misspelt is told before one trains
    sources.prepare(config.data, terminal.announce, terminal.progress)
    sources.count_texts(config.data, config.data.unlabelled_split)
  if config.teachers:
    teachers = config.teachers.split(',')
  else:
    teachers = [f'{workdir}/teacher']
    terminal.announce(f'self-training, {rounds} more round(s): the teacher '
                      f'comes first, in {teachers[0]}')
    train(teacher_config(config), teachers[0], terminal)
    preemption.leave_if_unheeded()
  probabilities, about = [], []
  for teacher in teachers:
    labels, what = _labels(config, teacher, terminal)
    probabilities.append(labels)
    about.append(what)
  if processes.index() == 0:
    pseudo_labels.save(
        PseudoLabels(np.mean(probabilities, axis=0, dtype=np.float32),
                     pseudo_labels.source(config), about),
        files.as_path(workdir) / 'pseudo_labels.npz')
  processes.report_alive('save')
  processes.gather('saved')  # none reads before it is


def _labels(config: ConfigDict, teacher: str, terminal: Terminal) -> tuple[
    np.ndarray, dict[str, Any]]:
  """What a run directory says of the reviews without labels; what it was.

  float32 [n] probabilities of the second of two classes, or [n, C] of each of
  more. Raises UserError if it was trained on other reviews or classes, or can't
  be opened.
  """
  processes.report_alive('restore')
  found = run.restore(teacher, None)
  for field in _SHARED:
    there, here = found.config.data[field], config.data[field]
    if there != here:
      raise UserError(
          f'the teacher {teacher} has config.data.{field}={there}, this run '
          f'{here}: it may know reviews that validate or test this one, or '
          'have read others; train another, or leave config.teachers empty')
  processes.report_alive('load')
  teaching = found.config.copy_and_resolve_references()
  teaching.data.unlabelled_split = config.data.unlabelled_split
  unlabelled = load_splits(
      teaching, found.tokenizer, terminal.announce, ['unlabelled'],
      len(found.labels), terminal.progress)['unlabelled']
  if found.labels != sources.class_names(config.data):
    raise UserError(f'the teacher {teacher} knows other classes than this run '
                    'is to learn: train another, or leave config.teachers '
                    'empty')
  compiled = CompileClock(
      lambda: processes.report_alive('compile'), terminal.progress)
  logits = evaluate.make_logits(
      found.config, compiled.wrap(evaluate.forward_of(found)),
      found.ngrams.annotate, terminal.progress)(found.params, unlabelled)
  share = np.bincount(evaluate.predicted(logits), minlength=len(found.labels)
                      ) / len(logits)
  most = int(share.argmax()) if len(share) > 2 else 1
  terminal.announce(f'{teacher} labels {len(logits):,} reviews, '
                    f'{share[most]:.1%} of them {found.labels[most]}')
  divided = logits / found.temperature
  return (1 / (1 + np.exp(-divided)) if logits.ndim == 1
          else scipy.special.softmax(divided, axis=1)), {
      'run': teacher, 'step': found.step, 'temperature': found.temperature,
      'params_sha256': classifier.params_sha256(
          devices.to_host(found.params))}
