"""Test accuracy of the configs over several seeds, and of linear models.

  pip install -e '.[bench]'
  python benchmarks/accuracy.py --config=default --config=words --seeds=5
  python benchmarks/accuracy.py --config=semi --workdir=runs/accuracy
  python benchmarks/accuracy.py --linear --json=accuracy.json
  python benchmarks/accuracy.py --linear --config.data.train_split='train[:99]'

trains each config from its own command line, once for each seed, and reads what
the run says of itself: a row is the mean over the seeds on the official 25,000
test reviews, its standard error, the lowest and the highest, the mean on
validation and of the expected calibration error on test, and the median of the
seconds of training, that of teachers and validation included. In a workdir the
runs are kept, and those that have finished are not run again. Linear models are
logistic regression on the presence of 1- and 2-grams, weighted by their
log-count ratio (Wang & Manning 2012), and on their tf-idf, trained on the same
reviews, with the strength chosen on the same validation part. IMDB is read from
TFDS_DATA_DIR. The hyper-parameters of the configs were chosen on validation;
nothing is chosen by what is printed here.
"""

import argparse
from collections.abc import Iterator
import itertools
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from flax_imdb.config import load_config, override

ROOT = pathlib.Path(__file__).parents[1]
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # C of scikit-learn


def changed(name: str, flags: list[str]) -> ConfigDict:
  """A config of configs/ with the fields that flags of the program change."""
  config = load_config(f'configs/{name}.py')
  for flag in flags:
    override(config, *flag.removeprefix('--config.').split('=', 1))
  return config


def run(config: str, seed: int, folder: pathlib.Path,
        others: list[str]) -> dict[str, Any]:
  """The summary of one training run below a folder, with all its seconds."""
  workdir = folder / f'{config}_{seed}'
  fields = [f'--config.seed={seed}', *others]
  path = workdir / 'summary.json'
  if not path.exists() or json.loads(path.read_text())['config'] != (
      changed(config, fields).to_dict()):  # the program refuses that directory
    subprocess.run(
        [sys.executable, '-m', 'flax_imdb.main',
         f'--config=configs/{config}.py', f'--workdir={workdir}', *fields],
        check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
  summary = json.loads(path.read_text())
  summary['seconds'] = sum(  # teachers are inside
      json.loads(path.read_text())['seconds']
      for path in workdir.rglob('summary.json'))
  return summary


def row(name: str, summaries: list[dict[str, Any]]) -> dict[str, Any]:
  """What is printed of the runs of a config."""
  accuracies = [summary['test']['accuracy'] for summary in summaries]
  spread = statistics.stdev(accuracies) if len(accuracies) > 1 else math.nan
  return {
      'name': name, 'test': statistics.mean(accuracies), 'each': accuracies,
      'standard_error': spread / math.sqrt(len(accuracies)),
      'validation': statistics.mean(
          summary.get('validation', summary['test'])['accuracy']
          for summary in summaries),
      'calibration_error': statistics.mean(
          summary['calibration']['test']['ece'] if 'calibration' in summary
          else math.nan for summary in summaries),
      'seconds': statistics.median(
          summary['seconds'] for summary in summaries)}


def linear(others: list[str]) -> Iterator[dict[str, Any]]:
  """The rows of the linear models, on the default config's splits.

  `others` are flags that change fields of the config.
  """
  from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
  from sklearn.linear_model import LogisticRegression

  from flax_imdb.data.reviews import load_splits, training_tokenizer
  config = changed('default', others)
  tokenizer = training_tokenizer(config, print)
  splits = load_splits(config, tokenizer, print)
  vectorizer = CountVectorizer(
      min_df=2, analyzer=lambda ids: [
          *zip(ids, strict=True), *itertools.pairwise(ids)])
  rows = {name: [row.tolist() for row in np.split(
      split.ids, split.offsets[1:-1])] for name, split in splits.items()}
  vectorizer.fit(rows['train'])
  counts = {name: vectorizer.transform(x) for name, x in rows.items()}
  labels = {name: split.labels for name, split in splits.items()}
  present = {name: (x > 0).astype(np.float32) for name, x in counts.items()}
  positive = 1 + present['train'][labels['train'] == 1].sum(axis=0).A1
  negative = 1 + present['train'][labels['train'] == 0].sum(axis=0).A1
  ratio = np.log((positive / positive.sum()) / (negative / negative.sum()))
  tfidf = TfidfTransformer(sublinear_tf=True).fit(counts['train'])
  for name, weigh in (
      ('log-count ratios of 1- and 2-grams', lambda name: present[
          name].multiply(ratio).tocsr()),
      ('tf-idf of 1- and 2-grams', lambda name: tfidf.transform(
          counts[name]))):
    models = [LogisticRegression(C=c, max_iter=1000).fit(
        weigh('train'), labels['train']) for c in STRENGTHS]
    scores = [model.score(weigh('validation'), labels['validation'])
              for model in models]
    best = scores.index(max(scores))
    accuracy = models[best].score(weigh('test'), labels['test'])
    yield {'name': ' '.join([f'{name}, C = {STRENGTHS[best]:g}', *others]),
           'test': accuracy, 'each': [accuracy], 'standard_error': math.nan,
           'validation': scores[best], 'calibration_error': math.nan,
           'seconds': math.nan}


def main() -> None:
  """Prints a row as soon as it is known; the rest of the line is for main."""
  parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False)
  parser.add_argument('--config', action='append', default=[],
                      help='a name, as in configs/; may be given again')
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--linear', action='store_true')
  parser.add_argument('--json', help='a file for all numbers')
  parser.add_argument('--workdir', type=pathlib.Path, help='keeps the runs')
  args, others = parser.parse_known_args()
  rows = []
  temporary = tempfile.TemporaryDirectory(prefix='accuracy_')
  folder = (args.workdir or pathlib.Path(temporary.name)).absolute()
  def rows_found() -> Iterator[dict[str, Any]]:
    yield from linear(others) if args.linear else ()
    for config in args.config:
      yield row(' '.join([config, *others]), [
          run(config, seed, folder, others) for seed in range(args.seeds)])
  print('| | test | standard error | lowest, highest | validation '
        '| calibration error | seconds |')
  print('|---|---|---|---|---|---|---|')
  for found in rows_found():
    rows.append(found)
    print('| {name} | {test:.4f} | {standard_error:.4f} | '.format(**found)
          + f'{min(found["each"]):.4f}, {max(found["each"]):.4f} | '
          + '{validation:.4f} | {calibration_error:.4f} | '
          '{seconds:.0f} |'.format(**found), flush=True)
    if args.json:
      pathlib.Path(args.json).write_text(json.dumps(rows, indent=2) + '\n')


if __name__ == '__main__':
  main()
