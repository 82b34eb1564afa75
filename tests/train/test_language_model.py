"""Pretraining: the loss as written down, the run, and a run that begins there.
"""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.command import TINY, finished, run_here
from support.models import default_with

from flax_imdb.checkpoint import run
from flax_imdb.cluster import devices
from flax_imdb.config import load_config, override, read_config
from flax_imdb.data.batches import TrainBatches
from flax_imdb.data.reading import Reading, Share
from flax_imdb.data.reviews import Reviews
from flax_imdb.errors import UserError
from flax_imdb.fields import check_fields
from flax_imdb.model import classifier, word_head
from flax_imdb.train import language_model
from flax_imdb.train.optimizer import build_optimizer
from flax_imdb.train.step import init_state, make_train_step

pytestmark = pytest.mark.usefixtures('one_train_step')

VOCAB = 20
FIELDS = {
    'objective': 'language_model', 'global_batch_size': 8, 'ema_decay': 0,
    'adversarial_norm': 0, 'schedule': 'constant', 'warmup_epochs': 0,
    'data.vocab_size': VOCAB, 'data.max_length': 20, 'data.segment_length': 8,
    'data.train_segments': 0, 'model.inputs': 'words',
    'model.embedding_dim': 3, 'model.width': 4,
    **{f'model.{name}_dropout': 0 for name in ('word', 'embedding', 'pooled')}}


def _config(**fields):
  return default_with(FIELDS | fields)


def _reviews(n=7, longest=20):
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, longest, n)
  lengths[0] = longest  # of several segments
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  ids = rng.integers(2, VOCAB, lengths.sum()).astype(np.uint16)
  ids[offsets[:-1]] = 1
  return Reviews(ids, offsets, np.zeros(n, np.int8))


def _batch(config, reviews, shares=1):
  return TrainBatches(reviews, 0, 8, Reading.of(config.data),
                      Share(shares, slice(0, shares)))(0)


def _states(params, direction, x):
  """Float64 states of an LSTM after each of x [T, E], by a loop."""
  cell = params[f'{direction}_0']['steps']['cell']
  c = h = np.zeros(len(cell['recurrent_kernel']))
  states = []
  for x_E in x:
    i, f, g, o = np.split(
        x_E @ cell['kernel'] + h @ cell['recurrent_kernel'] + cell['bias'], 4)
    c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
    h = _sigmoid(o) * np.tanh(c)
    states.append(h)
  return states


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _reference(params, batch, negatives):
  """(loss, found, words) of a batch, a segment and a word at a time."""
  table, bias = params['embed']['embedding'], params['words']['bias']
  share = np.log(1 + 1 / (np.arange(VOCAB - 2) + 1)) / np.log(VOCAB - 1)
  loss = found = count = 0
  owned = batch.get('segments', np.flatnonzero(batch['weights'])).ravel()
  for s in owned[owned < len(batch['ids'])]:
    ids = batch['ids'][s, :batch['lengths'][s]]
    for direction in ('forward', 'backward'):
      order = ids if direction == 'forward' else ids[::-1]
      states = _states(params, direction, table[order])
      for h, word in zip(states, order[1:], strict=False):
        if word == 1:
          continue
        expected = h @ params['words'][direction]['kernel']
        logits = table @ expected + bias
        others = negatives[negatives != word]
        total = np.exp(logits[word]) + np.sum(
            np.exp(logits[others]) / (len(negatives) * share[others - 2]))
        loss += np.log(total) - logits[word]
        found += logits[word] > logits[others].max()
        count += 1
  return loss, found, count


@pytest.mark.parametrize('segment_length', [8, 0])
def test_the_loss_is_that_of_each_word_alone(segment_length):
  with jax.enable_x64(True):
    config = _config(**{'data.segment_length': segment_length,
                        'data.bucket_width': 0})
    model = classifier.build_model(config).clone(dtype='float64')
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape),
                          classifier.param_shapes(model))
    batch = {k: np.asarray(v, 'float64' if v.dtype.kind == 'f' else v.dtype)
             for k, v in _batch(config, _reviews()).items()}
    assert batch['weights'].sum() == 7  # and a filling
    keys = classifier.dropout_keys(model, 0, 3, batch['places'])
    step = jax.jit(lambda params, batch: language_model.loss_and_gradient(
        config, model, params, batch, keys, jnp.int32(3)))
    *sums, gradient = step(params, batch)
    key = jax.random.fold_in(classifier.step_key(0, 3), 8)
    negatives = np.asarray(word_head.draw(key, VOCAB))
    want = _reference(params, batch, negatives)
    np.testing.assert_allclose(sums, want, rtol=1e-7)
    assert 0 < want[1] < want[2] and want[2] > 90

    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
      direction = rng.normal(size=g.shape)
      def at(distance, path=path, direction=direction):
        return _reference(jax.tree_util.tree_map_with_path(
            lambda p, x: x + distance * direction if p == path else x,
            params), batch, negatives)[0]
      assert np.linalg.norm(g) > 1e-2, path
      np.testing.assert_allclose(
          np.vdot(g, direction), (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-5)

    # Padding neither learns nor teaches: nor do the ids that are no words.
    assert (np.asarray(gradient['embed']['embedding'][0]) == 0).all()
    assert (np.asarray(gradient['words']['bias'][:2]) == 0).all()
    other = np.where(batch['ids'] == 0, 9, batch['ids'])
    *again, changed = step(params, batch | {'ids': other})
    np.testing.assert_allclose(again, sums, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
                 gradient, changed)


def test_two_devices_equal_one():
  """With segments and dropout, and the same words to compare with."""
  config = _config(**{
      'optimizer': 'sgd', 'learning_rate': 1, 'clip_norm': 0,
      'model.word_dropout': 0.2, 'model.embedding_dropout': 0.3,
      'model.pooled_dropout': 0.3})
  model = classifier.build_model(config)
  optimizer = build_optimizer(config, 2)
  before = devices.to_host(init_state(config, model, optimizer))
  before.params['embed']['embedding'] *= 5
  reviews = _reviews()
  whole, split = _batch(config, reviews), _batch(config, reviews, 2)
  assert (whole['ids'] != split['ids'][:len(whole['ids'])]).any()
  loss, correct, count, gradient = jax.jit(
      lambda params, batch: language_model.loss_and_gradient(
          config, model, params, batch, classifier.dropout_keys(
              model, 0, 0, batch['places']), 0))(before.params, whole)
  state, sums = make_train_step(config, model, optimizer, 2)(
      devices.replicate(before), devices.shard(split))
  sums = devices.to_host(sums)
  assert (sums.weight, sums.correct) == (count, correct) and count > 100
  np.testing.assert_allclose(sums.loss, loss, rtol=1e-5)
  # The gradient is that of the mean over all words.
  assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(gradient))
  jax.tree.map(
      lambda a, g, b: np.testing.assert_allclose(a - b, g / count, atol=1e-6),
      before.params, gradient, devices.to_host(state.params))


def test_it_learns_a_text_in_which_each_word_says_the_next():
  """And the one before; the unigram entropy is log 16."""
  config = _config(**{'learning_rate': 0.05, 'model.embedding_dim': 8,
                      'model.width': 16})
  rng = np.random.default_rng(0)
  words = (rng.integers(0, 16, (40, 1)) + np.arange(20)) % 16 + 4
  words[:, 0] = 1
  reviews = Reviews(words.ravel().astype(np.uint16), np.arange(0, 801, 20),
                    np.zeros(40, np.int8))
  model = classifier.build_model(config)
  optimizer = build_optimizer(config, 5)
  state = devices.replicate(init_state(config, model, optimizer))
  step = make_train_step(config, model, optimizer, 5)
  batches = TrainBatches(reviews, 0, 8, Reading.of(config.data),
                         Share(*devices.share()))
  sums = language_model.make_sums(
      config, language_model.make_forward(model))
  before = language_model.score(sums(state.params, reviews))
  for i in range(100):
    state, _ = step(state, devices.shard(batches(i)))
  after = language_model.score(sums(state.params, reviews))
  # 3 segments of 8: of the first the backward state of the first word has but
  # the start before it, and the forward state of that can't know.
  assert after['n'] == before['n'] == 40 * (7 + 6 + 2 * 2 * 7)
  assert before['loss'] > 2.7 and before['accuracy'] < 0.2
  assert after['loss'] < 0.3 and after['accuracy'] > 0.9
  with jax.disable_jit():  # as config.debug does, where no axis is of devices
    found = language_model.make_sums(
        config, language_model.make_forward(model))(
            state.params, reviews[:3])
  np.testing.assert_allclose(found, sums(state.params, reviews[:3]), rtol=1e-5)


FLAGS = (*TINY, '--config.objective=language_model', '--config.show_examples=0',
         '--config.schedule=constant', '--config.ema_decay=0.9',
         '--config.model.bidirectional=true', '--config.data.max_length=60',
         '--config.data.segment_length=20',
         '--config.data.unlabelled_split=train[500:540]')
LABELLED = (*TINY, '--config.num_epochs=0', '--config.model.bidirectional=true')


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
  """A finished run directory of two epochs, and what it printed."""
  workdir = tmp_path_factory.mktemp('pretrained') / 'run'
  output = finished(run_here(*FLAGS, f'--workdir={workdir}'))
  return workdir, output


def _summary(workdir):
  return json.loads((workdir / 'summary.json').read_text())


def test_the_summary_is_of_words(pretrained):
  workdir, output = pretrained
  summary = _summary(workdir)
  assert summary['step'] == 18  # two passes over 99 reviews and 40
  assert {'test', 'calibration'}.isdisjoint(summary)
  assert not (workdir / 'calibration.json').exists()
  validation = summary['validation']
  last = [json.loads(line) for line in
          (workdir / 'metrics.jsonl').read_text().splitlines()][-1]
  assert last['validation'] == validation and validation['n'] > 11
  assert last['train'] == summary['train']
  assert summary['train']['n'] > 99 + 40
  assert (f'accuracy {validation["accuracy"]:.4f}  on {validation["n"]:,} words'
          '\n') in output
  assert output.endswith(f'--config.init_from={workdir} '
                         '--config=configs/words.py\n')


def test_it_resumes_to_the_same_bits(pretrained, tmp_path):
  finished(run_here(*FLAGS, '--config.num_epochs=1', f'--workdir={tmp_path}'))
  finished(run_here(*FLAGS, f'--workdir={tmp_path}'))
  workdir, _ = pretrained
  assert _summary(tmp_path) | {'seconds': 0} == _summary(workdir) | {
      'seconds': 0}
  assert ((tmp_path / 'metrics.jsonl').read_bytes()
          == (workdir / 'metrics.jsonl').read_bytes())


@pytest.mark.parametrize('mode', [
    ['eval'], ['predict', 'good'], ['export']])
def test_it_predicts_no_labels(mode, pretrained):
  workdir, _ = pretrained
  process = run_here(f'--mode={mode[0]}', f'--workdir={workdir}', *mode[1:])
  assert process.returncode == 2
  assert process.stderr == (
      f'error: {workdir} predicts words, not labels: it is to begin another '
      f'run with, --config.init_from={workdir}\n')


def test_its_report_has_the_curves_and_says_why_no_more(pretrained, tmp_path):
  shutil.copytree(pretrained[0], tmp_path / 'run')
  finished(run_here('--mode=report', f'--workdir={tmp_path}/run'))
  page = (tmp_path / 'run' / 'report' / 'index.html').read_text('utf-8')
  assert page.count('<svg') == 3  # loss, accuracy and reviews a second
  assert page.count('it predicts no labels.</p>') == 4
  assert 'learned words from their neighbours in' in page


def _parameters(workdir):
  return devices.to_host(run._restore(str(workdir), None).params)


def test_a_run_with_labels_takes_the_words_and_what_both_have(
    pretrained, tmp_path):
  source, _ = pretrained
  finished(run_here(*LABELLED, f'--config.init_from={source}',
                    f'--workdir={tmp_path}'))
  assert ((tmp_path / 'tokenizer.json').read_bytes()
          == (source / 'tokenizer.json').read_bytes())
  learned, found = _parameters(source), _parameters(tmp_path)
  config = read_config(tmp_path / 'config.json')
  config.init_from = ''
  drawn = run.initial_params(config, classifier.build_model(config))
  assert set(learned) == {'embed', 'forward_0', 'backward_0', 'words'}
  assert set(found) == {'embed', 'forward_0', 'backward_0', 'hidden', 'logit'}
  for name, x in found.items():
    same, other = (learned, drawn) if name in learned else (drawn, {})
    jax.tree.map(np.testing.assert_array_equal, x, same[name])
    if other:
      assert classifier.params_sha256(x) != classifier.params_sha256(
          other[name])


def test_pairs_are_its_own(pretrained, tmp_path):
  source, _ = pretrained
  finished(run_here(
      *LABELLED, '--config.model.inputs=words+bigrams',
      '--config.data.bigrams=400', f'--config.init_from={source}',
      f'--workdir={tmp_path}'))
  found = _parameters(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, found['embed'],
               _parameters(source)['embed'])
  assert found['bigrams']['embedding'].shape == (400, 8)


def test_the_command_of_its_card_begins_with_a_config_of_its_words(pretrained):
  command, = re.findall(r'flax_imdb.main (.*)',
                        (pretrained[0] / 'MODEL_CARD.md').read_text())
  config, begins = command.split()[:2]
  assert begins == '--config.init_from=.'
  words = load_config(config.removeprefix('--config='))
  assert words.model.inputs == 'words'
  assert words.data.punctuation == read_config(
      pretrained[0] / 'config.json').data.punctuation


def test_one_direction_is_enough(pretrained):
  config = read_config(pretrained[0] / 'config.json')
  config.update(objective='label', init_from=str(pretrained[0]))
  config.data.unlabelled_split, config.model.bidirectional = '', False
  params = run.initial_params(config, classifier.build_model(config))
  assert set(params) == {'embed', 'forward_0', 'hidden', 'logit'}


@pytest.mark.parametrize(('field', 'value', 'message'), [
    ('model.width', '9', 'has backward_0/.* of shape .*, the config asks for'),
    ('model.inputs', 'words+log_odds', 'has backward_0/.*/kernel of shape'),
    ('data.vocab_size', '1000', 'give --config.data.vocab_size=2000'),
    ('data.punctuation', 'true', 'give --config.data.punctuation=False'),
    ('data.name', 'imdb_reviews', 'give --config.data.name=grammar_reviews')])
def test_what_does_not_fit_is_one_line(field, value, message, pretrained):
  config = read_config(pretrained[0] / 'config.json')
  config.update(objective='label', init_from=str(pretrained[0]))
  config.data.unlabelled_split = ''
  override(config, field, value)
  check_fields(config)
  with pytest.raises(UserError, match=message) as e:
    run.initial_params(config, classifier.build_model(config))
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('flag', [
    'model.inputs=words+bigrams', 'model.members=2', 'show_examples=4',
    'label_smoothing=0.1', 'adversarial_norm=0.3',
    'virtual_adversarial_norm=1.0', 'entropy_weight=1.0',
    'self_training_rounds=1', 'class_weights=balanced'])
def test_what_is_of_labels_is_refused_in_one_line(flag, tmp_path):
  process = run_here(*FLAGS, f'--config.{flag}', f'--workdir={tmp_path}/run')
  field = flag.partition('=')[0]
  assert process.returncode == 2 and process.stderr.count('\n') == 1
  assert f' alone: give --config.{field}=' in process.stderr
  assert not (tmp_path / 'run').exists()


def test_all_that_is_to_be_left_out_is_named_at_once(tmp_path):
  process = run_here('--config.objective=language_model',
                     '--config.adversarial_norm=0.3',
                     f'--workdir={tmp_path}/run')
  assert process.stderr.endswith(
      'alone: give --config.model.inputs=words --config.adversarial_norm=0.0 '
      'as well\n')


def test_words_have_no_classes_to_monitor():
  with pytest.raises(UserError, match=r'give --config\.early_stopping\.moni'):
    _config(**{'early_stopping.monitor': 'macro_f1'})


def test_layers_on_both_directions_would_read_the_word():
  with pytest.raises(UserError, match=r'give --config\.model\.layers=1'):
    _config(**{'model.layers': 2})
  _config(**{'model.layers': 2, 'model.bidirectional': False})
