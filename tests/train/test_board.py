"""What TensorBoard is shown of a run, as its own records say."""

import re
import shutil

import jax
import numpy as np
import pytest
from support.command import TINY, finished, run_here
from support.models import drawn_params, tiny_model
from tensorboardX.proto import (
  event_pb2,
  plugin_hparams_pb2,
  plugin_pr_curve_pb2,
)
from test_writers import events_of

from flax_imdb.checkpoint import run
from flax_imdb.config import load_config
from flax_imdb.data.tokenizer import fit_tokenizer
from flax_imdb.model import classifier
from flax_imdb.train import board


def _values(path):
  return [value for event in events_of(path) for value in event.summary.value]


def _scalars(workdir):
  return {v.tag: v.simple_value
          for v in _values(workdir / 'events.out.tfevents.final')
          if v.HasField('simple_value')}


def _hparams(value):
  return plugin_hparams_pb2.HParamsPluginData.FromString(
      value.metadata.plugin_data.content)


def test_the_config_is_a_text_and_the_hyper_parameters_of_a_session(trained):
  values = {v.tag: v for v in _values(
      trained[0] / 'events.out.tfevents.0.config')}
  text = values['config/text_summary'].tensor.string_val[0].decode()
  assert '| `model.width` | `8` | `32` |' in text.splitlines()
  assert '| `seed` | `0` |  |' in text.splitlines()
  found = _hparams(values['_hparams_/session_start_info']).session_start_info
  assert found.hparams['model.width'].number_value == 8
  assert found.hparams['model.cell'].string_value == 'lstm'
  assert found.hparams['model.bidirectional'].bool_value is False
  assert {'debug', 'loggers', 'profile', 'show_examples'}.isdisjoint(
      found.hparams)
  names = {x.name for x in _hparams(
      values['_hparams_/experiment']).experiment.hparam_infos}
  assert names == set(found.hparams)


def test_each_metric_of_the_session_is_a_number_at_the_end(trained):
  workdir, _ = trained
  experiment, = [v for v in _values(workdir / 'events.out.tfevents.0.config')
                 if v.tag == '_hparams_/experiment']
  tags = {x.name.tag for x in _hparams(experiment).experiment.metric_infos}
  assert tags == set(_scalars(workdir)) and len(tags) == 7
  end, = [v for v in _values(workdir / 'events.out.tfevents.final')
          if v.tag == '_hparams_/session_end_info']
  assert _hparams(end).session_end_info.status == 1  # STATUS_SUCCESS


def test_the_scores_at_the_end_are_those_of_the_summary(trained):
  workdir, output = trained
  step = int(re.search(r'the weights of step (\d+)', output)[1])
  found = _scalars(workdir)
  for split in 'test', 'validation':
    line = (f'{split}: loss {found[f"final/{split}/loss"]:.4f}  accuracy '
            f'{found[f"final/{split}/accuracy"]:.4f}')
    assert line in output
  assert {e.step for e in events_of(workdir / 'events.out.tfevents.final')
          if e.summary.value} == {step}


def test_histograms_of_parameters_and_gates_come_with_each_epoch(trained):
  workdir, _ = trained
  path, = workdir.glob('events.out.tfevents.[1-9]*')
  found = {}
  for event in events_of(path):
    for value in event.summary.value:
      if value.HasField('histo'):
        found.setdefault(event.step, {})[value.tag] = value.histo
  assert list(found) == [7, 14]
  for histograms in found.values():
    assert {f'gates/{x}' for x in ('input', 'forget', 'candidate', 'output')
            } | {'parameters/embed/embedding'} <= set(histograms)
    for gate in 'input', 'forget', 'output':
      assert 0 < histograms[f'gates/{gate}'].min
      assert histograms[f'gates/{gate}'].max < 1
    # A token of a review of 11, at 8 units each.
    assert histograms['gates/input'].num % 8 == 0
  table = run.restore(str(workdir), 'latest').params['embed']['embedding']
  last = found[14]['parameters/embed/embedding']
  assert last.num == table.size and last.max == pytest.approx(
      float(table.max()))
  assert sum(last.bucket) == last.num


def test_a_large_array_is_counted_in_part_and_what_is_infinite_not_at_all():
  params = {'a': np.arange(3 << 18, dtype=np.float32),
            'b': np.array([1, np.inf, np.nan, 2], np.float32),
            'c': np.array([np.nan], np.float32)}
  a, b = board.histograms(params, {})
  assert a.value[0].histo.num == 1 << 18
  assert (b.value[0].tag, b.value[0].histo.num) == ('parameters/b', 2)


@pytest.mark.parametrize(('num_epochs', 'shown'), [
    (1, [1]), (100, [1, 2, 3]), (250, [3, 6])])
def test_of_a_long_run_some_epochs_have_histograms(
    num_epochs, shown, tmp_path, played_task):
  played_task.config.num_epochs = num_epochs
  make = board.make_histograms(played_task)
  params = jax.device_put({'a': np.ones(3, np.float32)})
  assert [epoch for epoch in range(1, min(num_epochs, 6) + 1)
          if make(epoch, params)][:len(shown)] == shown


@pytest.fixture
def played_task(tmp_path):
  """A task with nothing to look at but its config."""
  import types
  return types.SimpleNamespace(
      config=load_config('configs/default.py'), workdir=str(tmp_path),
      splits={})


def test_precision_and_recall_are_of_the_probability(trained):
  workdir, _ = trained
  value, = [v for v in _values(workdir / 'events.out.tfevents.final')
            if v.metadata.plugin_data.plugin_name == 'pr_curves']
  assert value.tag == 'test/positive'
  plugin = plugin_pr_curve_pb2.PrCurvePluginData.FromString(
      value.metadata.plugin_data.content)
  assert plugin.num_thresholds == 127
  shape = [x.size for x in value.tensor.tensor_shape.dim]
  right, wrong = np.reshape(value.tensor.float_val, shape)[:2]
  assert shape == [6, 127] and right[0] + wrong[0] == 45  # all of test


def test_each_of_many_classes_has_a_curve_up_to_twenty():
  logits = np.zeros((4, 30))
  logits[:, 3] = [9, 9, -9, -9]
  curves = board.pr_curves(
      logits, np.array([3, 3, 0, 1]), [f'c{i}' for i in range(30)], 1.0)
  tags = [x.value[0].tag for x in curves]
  assert tags == [f'test/c{i}' for i in range(20)]
  values = np.reshape(curves[3].value[0].tensor.float_val, (6, 127))
  assert values[4, 64] == values[5, 64] == 1  # both right at one half


def test_a_temperature_moves_a_curve_s_thresholds():
  logits, labels = np.array([2.0, -2.0]), np.array([1, 0])
  for temperature, found in (1.0, 1), (10.0, 0):
    curve, = board.pr_curves(logits, labels, ['a', 'b'], temperature)
    values = np.reshape(curve.value[0].tensor.float_val, (6, 127))
    assert values[0, 100] == found  # of a probability of 0.79 and more


def test_the_projector_has_the_commonest_words_and_their_rows(trained):
  workdir, _ = trained
  config = (workdir / 'projector_config.pbtxt').read_text()
  paths = dict(re.findall(r'(\w+)_path: "(.*)"', config))
  words = (workdir / paths['metadata']).read_text().splitlines()
  rows = np.loadtxt(workdir / paths['tensor'], delimiter='\t')
  found = run.restore(str(workdir), None)
  table = np.asarray(found.params['embed']['embedding'])
  assert len(words) == len(rows) == found.tokenizer.get_vocab_size() - 4
  for i in 0, 7, -1:
    np.testing.assert_allclose(
        rows[i], table[found.tokenizer.token_to_id(words[i])], rtol=1e-5)


def test_no_more_than_a_thousand_words_are_projected(tmp_path):
  config, model, params = tiny_model(**{'data.vocab_size': 2000})
  tokenizer = fit_tokenizer([' '.join(f'w{i}' for i in range(1500))], 2000)
  board.write_projector(str(tmp_path), jax.device_get(params), tokenizer)
  words = (tmp_path / 'projector' / 'metadata.tsv').read_text().splitlines()
  assert len(words) == 1000 and words[0] == tokenizer.id_to_token(4)


def test_the_first_of_several_members_is_projected(tmp_path):
  config = load_config('configs/best.py')
  config.data.vocab_size = 50
  params = drawn_params(classifier.build_model(config))
  tokenizer = fit_tokenizer(['some words'], 50)
  board.write_projector(str(tmp_path), params, tokenizer)
  rows = np.loadtxt(tmp_path / 'projector' / 'tensors.tsv', delimiter='\t')
  np.testing.assert_allclose(
      rows, params['embed']['embedding'][0, 4:6], rtol=1e-5)


def test_a_word_of_a_stranger_can_not_begin_a_line(tmp_path):
  _, _, params = tiny_model()
  class Words:
    def get_vocab_size(self):
      return 7
    def id_to_token(self, i):
      return ['a\tb', 'c\nd', '\u202e'][i - 4]
  board.write_projector(str(tmp_path), jax.device_get(params), Words())
  assert (tmp_path / 'projector' / 'metadata.tsv').read_text() == (
      'a\ufffdb\nc\ufffdd\n\ufffd\n')


def test_a_finished_run_that_starts_again_shows_the_same(trained, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained[0], workdir)
  def shown(folder):
    found = []
    for path in sorted(folder.glob('events.out.*')):
      for event in events_of(path):
        for value in event.summary.value:
          said = None
          if value.metadata.plugin_data.plugin_name == 'hparams':
            said = _hparams(value)  # whose bytes are in any order
            value.metadata.plugin_data.content = b''
          found.append((path.name, event.step, value, said))
    return found
  finished(run_here(*TINY, f'--workdir={workdir}'))
  assert shown(workdir) == shown(trained[0])
  assert not list(workdir.glob('*.tmp'))


def test_events_are_what_tensorboard_calls_a_file(trained):
  first = events_of(trained[0] / 'events.out.tfevents.final')[0]
  assert isinstance(first, event_pb2.Event)
  assert first.file_version == 'brain.Event:2'
