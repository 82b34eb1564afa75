"""The linear model beside a run: which it is, and that it is no constant."""

import json

import numpy as np
import pytest

from flax_imdb.analysis import baseline
from flax_imdb.checkpoint import run
from flax_imdb.data.reviews import Reviews, load_splits
from flax_imdb.errors import UserError


def _test(restored):
  reviews = load_splits(restored.config, restored.tokenizer, print, ['test'])
  return restored.ngrams.annotate(reviews['test'])


def test_of_words_it_is_fitted_to_the_training_reviews(
    trained, monkeypatch):
  sklearn_text = pytest.importorskip('sklearn.feature_extraction.text')
  from sklearn.linear_model import LogisticRegression
  workdir, _ = trained
  found = {}
  monkeypatch.setattr(baseline.files, 'write', lambda path, content: (
      found.update({path.name: json.loads(content)})))
  said = []
  restored = run.restore(str(workdir), None)
  returned = baseline.compare(
      str(workdir), restored, _test(restored), said.append)
  assert returned == found['baseline.json']
  splits = load_splits(restored.config, restored.tokenizer, print)
  def texts(split):
    return [' '.join(f'w{i}' for i in split.ids[a:b]) for a, b in zip(
        split.offsets[:-1], split.offsets[1:], strict=True)]
  # The same from texts, by scikit-learn's own reading.
  vectorizer = sklearn_text.TfidfVectorizer(
      token_pattern=r'\S+', sublinear_tf=True)
  model = LogisticRegression(C=3, max_iter=1000).fit(
      vectorizer.fit_transform(texts(splits['train'])), splits['train'].labels)
  for name in 'validation', 'test':
    logits = model.decision_function(vectorizer.transform(texts(splits[name])))
    want = np.mean((logits > 0) == splits[name].labels)
    got = found['baseline.json'][name]['accuracy']
    # A word that the training split lacks has a weight there, and none here.
    assert got == pytest.approx(want, abs=0.05)
  accuracy = found['baseline.json']['test']['accuracy']
  assert said[-1].endswith(f'accuracy {accuracy:.4f} on test')


def test_a_class_that_was_not_learned_from_is_never_chosen():
  pytest.importorskip('sklearn')
  words = np.array([1, 1, 3, 3], np.uint16)  # a word a class, of 0 to 3
  def reviews(ids):
    return Reviews(ids, np.arange(len(ids) + 1), ids.astype(np.int16))
  splits = {'train': reviews(words), 'test': reviews(np.append(words, 2)),
            'one': reviews(words[:2])}
  found = baseline._fitted(splits, ['test'], 5, 4)['test']
  assert found['accuracy'] == 0.8 and 17 < found['loss'] < 18  # of 87 a fifth
  with pytest.raises(UserError, match='are of one class'):
    baseline._fitted(splits | {'train': splits['one']}, ['test'], 5, 4)


def test_of_a_run_with_a_linear_model_it_is_that(
    trained_on_every_input, monkeypatch):
  workdir, _ = trained_on_every_input
  found = {}
  write = baseline.files.write
  def kept(path, content):  # what is not to be changed is not written
    if path == workdir / 'report' / 'baseline.json':
      found.update(json.loads(content))
    else:
      write(path, content)
  monkeypatch.setattr(baseline.files, 'write', kept)
  restored = run.restore(str(workdir), None)
  baseline.compare(
      str(workdir), restored, _test(restored), lambda line: None)
  summary = json.loads((workdir / 'summary.json').read_text())
  assert {k: found[k] for k in ('validation', 'test')} == summary['linear']
