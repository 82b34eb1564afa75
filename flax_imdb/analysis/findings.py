"""What is known of a run: what it wrote, and what its weights say on test.

Runs whose configs differ in the seed alone are a group.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import json
import operator
import pathlib
import statistics
import time
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from flax_imdb.analysis import assessment, baseline
from flax_imdb.analysis.assessment import Curve
from flax_imdb.analysis.gradients import Quartiles, measure
from flax_imdb.analysis.history import History, Scores
from flax_imdb.analysis.mistakes import Mistake, explained
from flax_imdb.checkpoint import run
from flax_imdb.config import differences
from flax_imdb.data import sources
from flax_imdb.data.reviews import Reviews, load_splits
from flax_imdb.errors import TransientError, UserError
from flax_imdb.inference import evaluate
from flax_imdb.inference.markdown import printable
from flax_imdb.model import classifier

Announce = Callable[[str], None]


@dataclasses.dataclass(eq=False)
class Findings:
  """What is known of a run; of what is missing, why, in a sentence."""
  history: History
  name: str  # of its directory, as short as no other has it
  missing: dict[str, str] = dataclasses.field(default_factory=dict)
  step: int | None = None  # of the weights that were evaluated
  parameters: int | None = None
  test: assessment.Assessment | None = None
  test_seconds: float | None = None
  mistakes: list[Mistake] = dataclasses.field(default_factory=list)
  baseline: dict[str, Any] = dataclasses.field(default_factory=dict)
  # As of `gradients.measure`.
  gradients: dict[str, Quartiles] = dataclasses.field(default_factory=dict)

  @property
  def config(self) -> ConfigDict:
    """Of the run."""
    return self.history.config

  @property
  def scores(self) -> Scores:
    """Those on test: computed now, else what the run wrote; {} without."""
    if self.test:
      return self.test.scores
    return self._summary('scores', {}).get('test', {})

  @property
  def confusion(self) -> np.ndarray | None:
    """The same of the confusion matrix."""
    return self.test.confusion if self.test else self._summary('confusion')

  @property
  def ece(self) -> float | None:
    """The same of the expected calibration error."""
    return self.test.ece if self.test else self._summary('ece')

  @property
  def reliability(self) -> list[dict[str, Any]]:
    """The same of accuracy by confidence."""
    return (self.test.reliability if self.test
            else self._summary('reliability', []))

  @property
  def linear(self) -> Scores:
    """The same of a linear model."""
    return (self.baseline or self._summary('linear', {})).get('test', {})

  @property
  def best_step(self) -> int | None:
    """The step of the best epoch, if the run chose one."""
    if not run.evaluates_best(self.config):
      return None
    return self._summary('best_step', self.step)

  @property
  def stopped_epoch(self) -> int | None:
    """The epoch after which it was stopped early, if it was."""
    return self._summary('stopped_epoch')

  @property
  def rate(self) -> float | None:
    """Reviews a second in training, the mean of its epochs, if known."""
    rates = self.history.rates
    return statistics.mean(x for _, x in rates) if rates else None

  def curves(self, name: str) -> list[Curve]:
    """Those called 'roc' or 'precision-recall'; [] where test is missing."""
    return getattr(self.test, name.replace('-', '_')) if self.test else []

  def _summary(self, name: str, otherwise: Any = None) -> Any:
    summary = self.history.summary
    return getattr(summary, name) if summary else otherwise


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
  """Runs whose configs differ in the seed alone."""
  name: str
  series: int  # its colour
  runs: list[Findings]

  @property
  def first(self) -> Findings:
    """The run that stands for all where one must."""
    return self.runs[0]

  @property
  def confusion(self) -> np.ndarray | None:
    """The sum of the runs' matrices."""
    found = [x.confusion for x in self.runs if x.confusion is not None]
    return sum(found[1:], found[0]) if found else None


def names(workdirs: Sequence[str]) -> dict[str, str]:
  """The end of each directory's name that no other has, printable."""
  parts = {workdir: pathlib.PurePath(workdir).parts for workdir in workdirs}
  found = {}
  for workdir, own in parts.items():
    length = next((n for n in range(1, len(own) + 1) if sum(
        other[-n:] == own[-n:] for other in parts.values()) == 1), len(own))
    found[workdir] = printable('/'.join(own[-length:]))
  return found


def grouped(found: Sequence[Findings]) -> list[Group]:
  """Groups of runs in the order of their first ones.

  One of several runs is called by the fields in which the groups differ.
  """
  by_config: dict[str, list[Findings]] = {}
  for one in found:
    config = one.config.to_dict() | {'seed': 0}
    by_config.setdefault(json.dumps(config, sort_keys=True), []).append(one)
  groups = list(by_config.values())
  fields = differing([runs[0].config for runs in groups])
  def name(runs: list[Findings]) -> str:
    if len(runs) == 1:
      return runs[0].name
    if 1 <= len(fields) <= 3:
      return ', '.join(f'{field}={value(runs[0].config, field)}'
                       for field in fields)
    return f'{runs[0].name}…{runs[-1].name}'
  return [Group(name(runs), i, runs) for i, runs in enumerate(groups)]


def differing(configs: Sequence[ConfigDict]) -> list[str]:
  """The fields, but for the seed, in which one differs from the first."""
  return sorted({field for config in configs for field in differences(
      configs[0], config)} - {'seed'})


def value(config: ConfigDict, field: str) -> Any:
  """Of a field such as 'model.width'."""
  return operator.attrgetter(field)(config)


def gather(one: Findings, explains: bool, announce: Announce) -> None:
  """Adds to what is known of a run all that its weights and the data tell.

  Mistakes are explained only if it `explains`. `announce` is told what takes
  time, and what is left out and why.
  """
  parts = ('test', 'mistakes', 'baseline', 'gradients')
  workdir = one.history.workdir
  @contextlib.contextmanager
  def part(what: str, *names: str) -> Iterator[None]:
    try:
      yield
    except (UserError, TransientError) as e:
      for name in names:
        one.missing.setdefault(name, f'{what}: {e}.')
      announce(f'{workdir}: {", ".join(names)} left out. {what}: {e}')
  if one.config.objective == 'language_model':
    one.missing = dict.fromkeys(
        parts, 'This run learned words from their neighbours, to begin others '
        'with: it predicts no labels.')
    return
  with part('The weights cannot be opened', *parts):
    restored = run.restore(workdir, None)
    one.step = restored.step
    one.parameters = classifier.parameter_count(restored.params)
  if one.missing:
    return
  with part('The data is not at hand', *parts):
    sources.prepare(one.config.data, announce)
  if one.missing:
    return
  with part('It could not be evaluated on test', *parts[:3]):
    test = _evaluate(one, restored, explains, announce)
  if one.test:
    with part('No linear model could be fitted', 'baseline'):
      one.baseline = baseline.compare(workdir, restored, test, announce)
  with part('They could not be measured', 'gradients'):
    one.gradients = measure(restored, announce)


def _evaluate(one: Findings, restored: run.Run, explains: bool,
              announce: Announce) -> Reviews:
  """Adds the assessment of test, and its mistakes; returns the reviews.

  With their features, which take longer to look up than the model to run.
  """
  reviews = load_splits(one.config, restored.tokenizer, announce, ['test'],
                        len(restored.labels))['test']
  logits = evaluate.make_logits(
      one.config, evaluate.forward_of(restored), restored.ngrams.annotate)
  start = time.perf_counter()
  reviews = restored.ngrams.annotate(reviews)
  found = logits(restored.params, reviews)
  one.test_seconds = time.perf_counter() - start
  one.test = assessment.assess(
      found, reviews.labels, np.diff(reviews.offsets) - 1,  # without the start
      restored.temperature, restored.labels)
  announce(f'{one.name}: ' + evaluate.score_text('test', one.test.scores))
  if explains:
    one.mistakes = explained(
        restored, logits, one.test.mistakes, reviews.labels)
  return reviews
