"""What is read of a compiled program, in short texts; no compiler is needed."""

import os

import pytest

from flax_imdb.analysis import schedules

TPU = '''HloModule jit__fun

%condition.1 (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(100), metadata={op_name="jit(_fun)"}
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%fused.1 (x: f32[8]) -> f32[8] {
  ROOT %y = f32[8] add(%x, %x), {"estimated_cycles":"5000000"}
}

%branch.1 (x: f32[8]) -> f32[8] {
  ROOT %y.1 = f32[8] add(%x, %x), {"estimated_cycles":"30"}
}

%body.1 (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8] fusion(%x), calls=%fused.1, {"estimated_cycles":"7"}
  %c = f32[8] copy(%a), {"estimated_cycles":"2"}
  ROOT %t = (s32[], f32[8]) tuple(%i, %c)
}

ENTRY %main.1 (x: f32[8]) -> f32[8] {
  %once = f32[8] copy(%x), {"estimated_cycles":"1000"}
  %w = (s32[], f32[8]) while(%t), condition=%condition.1, body=%body.1, LENGTH
  %d = f32[8] call(%once), to_apply=%branch.1
  %lstm_forward_2x11x6.3 = f32[8] custom-call(%d), "tpu_custom_call"
  %jvp_lstm_backward_2x11x12_.7 = f32[8] custom-call(%d), "tpu_custom_call"
}
'''
BUNDLES = {'lstm_forward_2x11x6.2': [20, 100, 400],
           'jvp_lstm_backward_2x11x12_.7': [30, 200, 1000]}
FORWARD = 20 + 2 * 11 * (100 + 6 * 400)
BACKWARD = 30 + 2 * 11 * (200 + 12 * 1000)
ONCE = 1000 + 30

def test_loops_and_kernels_count_as_often_as_they_run():
  found = schedules.estimate(TPU, BUNDLES)
  assert found.kernel_cycles == FORWARD + BACKWARD
  assert found.cycles == ONCE + 100 * (7 + 2) + found.kernel_cycles
  assert found.unread == 0

@pytest.mark.parametrize('shape, bundles, cycles', [
    ('1x1x6', [20, 400], 20 + 6 * 400), ('1x3x1', [20, 400], 20 + 3 * 400),
    ('1x1x1', [20], 20)])
def test_a_loop_of_one_round_is_none(shape, bundles, cycles):
  short = TPU.replace('2x11x6', shape)
  found = schedules.estimate(short, {f'lstm_forward_{shape}.2': bundles})
  assert (found.kernel_cycles, found.unread) == (cycles, 1)  # not the backward


def test_a_length_that_xla_knows_comes_first():
  known = TPU.replace(
      'LENGTH', 'backend_config={"known_trip_count":{"n":"10"}}')
  assert schedules.estimate(known, {}).cycles == ONCE + 10 * (7 + 2)

def test_what_could_not_be_read_is_told():
  unknown = TPU.replace('direction=LT', 'direction=NE')
  assert schedules.estimate(unknown, BUNDLES)[1:] == (FORWARD + BACKWARD, 1)
  other = {'lstm_forward_2x11x7.2': [20, 100, 400]}
  assert schedules.estimate(unknown, other) == (ONCE + 7 + 2, 0, 3)

def test_an_inner_loop_runs_as_often_as_all_around_it():
  nested = TPU.replace('  ROOT %t = ', '  %v = s32[] while(%t), condition='
                       '%condition.1, body=%inner.1\n  ROOT %t = ')
  nested = nested.replace('ENTRY', (
      '%inner.1 (x: f32[8]) -> f32[8] {\n'
      '  %z = f32[8] copy(%x), "estimated_cycles":"3"\n}\n\nENTRY'))
  assert schedules.estimate(nested, {}).cycles == (
      ONCE + 100 * (7 + 2 + 100 * 3))

def test_kernels_of_a_gpu_are_counted_each_time():
  # One outside, two in the loop; two Pallas kernels, and what a call is of.
  assert schedules.gpu_kernels(TPU) == 1 + 100 * 2 + 2

SCHEDULE = '''= control target key start
LH: loop header
= control target key end

     0   :  { %s1 = smov 0 ;;  %s2 = smov 0  }
   0x1   :  { %s3 = smov 0 } /* End region 118 */
   0x2 LB: > { %s26 = sadd.s32 1, %s22 }
   0x3   : > { %p27 = scmp.ge.s32.totalorder %s26, 11 }
   0x4   : >> {}
   0x5 LB: >> { %372 = vst [vmem:[#allocation3 + $0x30] sm:$0xff] %v3464_v0 }
   0x6 PF: >> { %373 = vst [vmem:[#allocation3] sm:$0xff] %v3464_v0 }
'''

def test_bundles_are_counted_by_the_loop_that_they_are_in(tmp_path):
  for name, text in {
      '17-jvp_lstm_forward_2x1x6_.1-01-final_bundles.txt': SCHEDULE,
      '18-lstm_backward_2x1x6.2-01-final_bundles.txt': SCHEDULE,
      '19-lstm_backward_2x1x6.2-01-final_bundles.txt': SCHEDULE + '0x7 : {}\n',
      '19-lstm_backward_2x1x6.2-00-schedule-analysis_final_bundles.txt': '',
      '20-copy.3-01-final_bundles.txt': SCHEDULE}.items():
    (tmp_path / name).write_text(text)
  assert schedules.kernel_bundles(tmp_path) == {
      'jvp_lstm_forward_2x1x6_.1': [2, 2, 3],
      'lstm_backward_2x1x6.2': [3, 2, 3]}
  assert not list(tmp_path.iterdir())  # nothing of one program for the next
  assert schedules.kernel_bundles(None) == {}

@pytest.fixture
def fresh():
  schedules.dump_folder.cache_clear()
  yield
  schedules.dump_folder.cache_clear()

def test_libtpu_is_asked_beside_the_flags_it_has(fresh, monkeypatch):
  monkeypatch.setenv('LIBTPU_INIT_ARGS', '--a=1')
  folder = schedules.dump_folder()
  assert folder.is_dir() and schedules.dump_folder() is folder
  first, where, *_ = os.environ['LIBTPU_INIT_ARGS'].split()
  assert (first, where) == ('--a=1', f'--xla_jf_dump_to={folder}')

def test_a_folder_of_somebody_else_is_left_alone(fresh, monkeypatch):
  monkeypatch.setenv('LIBTPU_INIT_ARGS', given := '--xla_jf_dump_to=/mine')
  assert schedules.dump_folder() is None
  assert os.environ['LIBTPU_INIT_ARGS'] == given
