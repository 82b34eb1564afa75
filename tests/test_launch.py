"""The scripts of launch/: what they print, check and do, with fake clouds."""

import os
import re
import shlex
import shutil
import subprocess
import threading

import pytest
from support.command import ROOT, needs_proc
import yaml

from flax_imdb import cli, errors

SCRIPTS = sorted(path for path in (ROOT / 'launch').iterdir()
                 if path.suffix in ('.sh', '.sbatch'))
ACCOUNT = {'PROJECT': 'p', 'ZONE': 'z', 'WORKDIR': 'gs://b/run'}
BASH = shutil.which('bash')
WORKER = 'bash flax_imdb/launch/tpu_worker.sh'


def run(script, *argv, path='', **env):
  """Runs launch/`script` with programs of the directory `path` in front.

  The environment is otherwise bare: no setting of whoever tests gets in.
  """
  env = {'PATH': f'{path}:/usr/bin:/bin', 'HOME': '/nonexistent', **env}
  return subprocess.run(
      [BASH, f'launch/{script}', *argv], cwd=ROOT, env=env, timeout=30,
      capture_output=True, text=True, check=False)


def program(directory, name, text):
  """Writes a bash program."""
  directory.mkdir(exist_ok=True)
  (directory / name).write_text(f'#!/bin/bash\n{text}')
  (directory / name).chmod(0o755)
  return directory


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script):
  result = subprocess.run([BASH, '-n', script], capture_output=True,
                          check=False)
  assert (result.returncode, result.stderr) == (0, b'')
  assert os.access(script, os.X_OK) == (script.suffix == '.sh')


@pytest.mark.skipif(not shutil.which('shellcheck'), reason='needs shellcheck')
def test_shellcheck_finds_nothing():
  result = subprocess.run(['shellcheck', *SCRIPTS], capture_output=True,
                          text=True, check=False)
  assert (result.returncode, result.stdout) == (0, '')


# tpu_vm.sh: what it would do


def gcloud(command, *words):
  return shlex.join(['gcloud', 'compute', 'tpus', 'tpu-vm', command, *words,
                     '--project=PROJECT', '--zone=ZONE'])


def ssh(command):
  return gcloud('ssh', 'flax-imdb', '--worker=all', f'--command={command}')


CREATE = gcloud('create', 'flax-imdb', '--accelerator-type=v5litepod-8',
                '--version=v2-alpha-tpuv5-lite')
SETUP = [
    'tar -czf /tmp/flax-imdb.tar.gz -C launch/.. --exclude=__pycache__ '
    'flax_imdb configs launch pyproject.toml README.md LICENSE',
    gcloud('scp', '/tmp/flax-imdb.tar.gz', 'flax-imdb:flax_imdb.tar.gz',
           '--worker=all'),
    ssh('mkdir -p flax_imdb && { flock -n flax_imdb/run.lock true || '
        '{ echo error: a run is going on >&2; exit 2; }; } && '
        f'tar -xzf flax_imdb.tar.gz -C flax_imdb && {WORKER} setup')]
ARGS = '--workdir=gs://BUCKET/flax-imdb --config.seed=1'
LINES = {
    'create': [CREATE],
    'setup': SETUP,
    'run': [ssh(f'{WORKER} start {ARGS}')],
    'logs': [ssh(f'{WORKER} follow')],
    'eval': [ssh(f'{WORKER} eval {ARGS}')],
    'delete': [gcloud('delete', 'flax-imdb')],
    'babysit': [
        gcloud('describe', 'flax-imdb', '--format=value(state)'),
        gcloud('delete', 'flax-imdb', '--quiet'),
        CREATE,
        ssh(f'{WORKER} is_set_up'),
        *SETUP,
        ssh(f'{WORKER} start {ARGS} && {WORKER} follow')],
}


@pytest.mark.parametrize('command', LINES)
def test_a_dry_run_prints_every_line_and_runs_none(command, tmp_path):
  for name in ('gcloud', 'tar', 'sleep'):
    program(tmp_path, name, f'touch {tmp_path}/ran')
  result = run('tpu_vm.sh', '--dry-run', command, '--', '--config.seed=1',
               path=tmp_path)
  assert (result.returncode, result.stderr) == (0, '')
  assert ([shlex.split(line) for line in result.stdout.splitlines()]
          == [shlex.split(line) for line in LINES[command]])
  assert not (tmp_path / 'ran').exists()


def test_settings_and_spot_are_in_the_lines():
  result = run('tpu_vm.sh', '--spot', '--dry-run', 'create', NAME='n',
               PROJECT='p', ZONE='z', ACCELERATOR='v6e-16', VERSION='v')
  assert result.stdout == (
      'gcloud compute tpus tpu-vm create n --accelerator-type=v6e-16 '
      '--version=v --spot --project=p --zone=z\n')


@pytest.mark.parametrize(('argv', 'env', 'message'), [
    (['create'], {'PROJECT': ''}, 'set PROJECT to'),
    (['create'], {'ZONE': ''}, 'set ZONE to'),
    (['create'], {'PATH': '/nonexistent'}, 'gcloud is not installed'),
    (['--dry-run', 'babysit'], {'WORKDIR': 'runs/x'}, 'set WORKDIR to gs://'),
    (['--dry-run', 'babysit'], {'WORKDIR': 'gs://'}, 'set WORKDIR to gs://'),
    (['--dry-run', 'run'], {'WORKDIR': 'runs/x', 'ACCELERATOR': 'v4-16'},
     'v4-16 has several workers'),
    (['--dry-run', 'eval'], {'WORKDIR': '/mnt', 'ACCELERATOR': 'v4-16'},
     'v4-16 has several workers'),
    (['--dry-run', 'run'], {'ACCELERATOR': 'v5e'}, 'ACCELERATOR=v5e: write'),
    (['--dry-run', 'run', '--', '--workdir=x'], {}, 'set WORKDIR instead'),
    (['--dry-run', 'run', '--config.seed=1'], {}, 'ARGS stand after --'),
    (['--dri-run', 'run'], {}, 'unknown flag --dri-run'),
    (['start'], {}, 'give one of create,'),
    ([], {}, 'give one of create,')])
def test_a_mistake_is_one_line_before_anything_runs(argv, env, message):
  result = run('tpu_vm.sh', *argv, **ACCOUNT | env)
  assert (result.returncode, result.stdout) == (2, '')
  assert result.stderr.startswith('error: ') and message in result.stderr
  assert result.stderr.count('\n') == 1


def test_one_worker_may_keep_its_run_on_the_vm():
  result = run('tpu_vm.sh', '--dry-run', 'run', WORKDIR='runs/x')
  assert '--workdir=runs/x' in result.stdout


# tpu_vm.sh: babysit, in scenes that a fake gcloud plays


def babysit(tmp_path, *scenes, **env):
  """Plays (call, exit status, output)... to babysit; returns the process.

  A call is a part of the line that gcloud is expected to get; each line must
  be the next one, and none may be missing.
  """
  scene = tmp_path / 'scene'
  scene.write_text(''.join(f'{status} {output}\n'
                           for _, status, output in scenes))
  program(tmp_path, 'sleep', f'echo "$1" >> {tmp_path}/sleeps')
  program(tmp_path, 'gcloud', f'''
echo "$*" >> {tmp_path}/calls
read -r status output < {scene} || exit 99
sed -i 1d {scene}
if [[ $output == Ctrl-C ]]; then kill -INT $PPID; fi
echo "$output"
exit "$status"
''')
  result = run('tpu_vm.sh', '--spot', 'babysit', '--', '--config.seed=1',
               path=tmp_path, TMPDIR=str(tmp_path), **ACCOUNT | env)
  calls = (tmp_path / 'calls').read_text().splitlines()
  wanted = [call for call, _, _ in scenes]
  assert len(calls) == len(wanted), calls
  for call, part in zip(calls, wanted, strict=True):
    assert part in call
    if ' ssh ' in call or ' scp ' in call:
      assert '--worker=all' in call
  return result


def sleeps(tmp_path):
  return [int(s) for s in (tmp_path / 'sleeps').read_text().split()]


def state(name):
  return ('tpu-vm describe', 0, name)


GONE = ('tpu-vm describe', 1, '')
DELETED = ('tpu-vm delete flax-imdb --quiet', 0, '')
CREATED = ('tpu-vm create', 0, '')
IS_SET_UP, IS_BARE = (
    ('is_set_up', 0, ''), ('is_set_up', 1, ''))
SET_UP = [('tpu-vm scp', 0, ''), ('tpu_worker.sh setup', 0, '')]


def ends(status):
  return (f'{WORKER} start --workdir=gs://b/run --config.seed=1 && '
          f'{WORKER} follow', status, '')


def test_babysit_makes_a_vm_again_after_preemption_until_the_end(tmp_path):
  result = babysit(
      tmp_path, GONE, CREATED, IS_BARE, *SET_UP, ends(255),
      state('PREEMPTED'), DELETED, CREATED, IS_BARE, *SET_UP, ends(75),
      state('READY'), IS_SET_UP, ends(0))
  assert result.returncode == 0
  assert result.stderr.splitlines()[-1] == (
      'tpu_vm: finished; to end the costs: launch/tpu_vm.sh delete')


def test_babysit_comes_back_to_a_run(tmp_path):
  assert babysit(tmp_path, state('READY'), IS_SET_UP, ends(0)).returncode == 0


def test_babysit_stops_at_a_mistake(tmp_path):
  result = babysit(tmp_path, state('READY'), IS_SET_UP, ends(2))
  assert result.returncode == 2


def test_babysit_waits_longer_and_longer_for_what_may_go_away(tmp_path):
  held = [state('READY'), IS_SET_UP, ends(69)]
  result = babysit(tmp_path, *5 * held, state('READY'), IS_SET_UP, ends(75),
                   *held, state('READY'), IS_SET_UP, ends(0), RETRIES='1')
  assert result.returncode == 0
  assert sleeps(tmp_path) == [30, 60, 120, 240, 480, 30, 60]


def test_babysit_gives_up_what_does_not_go_away(tmp_path):
  held = [state('READY'), IS_SET_UP, ends(69)]
  result = babysit(tmp_path, *4 * held, OUTSIDE='4')
  assert result.returncode == 1
  assert 'gives up after 4 failed runs' in result.stderr


def test_babysit_ends_with_ctrl_c_where_gcloud_handles_it(tmp_path):
  started = ends(1)[:2] + ('Ctrl-C',)
  result = babysit(tmp_path, state('READY'), IS_SET_UP, started)
  assert result.returncode == 130
  assert not (tmp_path / 'sleeps').exists()


def test_babysit_waits_for_capacity_longer_and_longer(tmp_path):
  no_vm = [GONE, ('tpu-vm create', 1, '')]
  result = babysit(tmp_path, *8 * no_vm, GONE, CREATED, IS_SET_UP, ends(0))
  assert result.returncode == 0
  assert sleeps(tmp_path) == [30, 60, 120, 240, 480, 600, 600, 600]


def test_babysit_waits_anew_after_it_had_a_vm(tmp_path):
  no_vm = [GONE, ('tpu-vm create', 1, '')]
  result = babysit(tmp_path, *2 * no_vm, state('READY'), IS_SET_UP, ends(75),
                   *2 * no_vm, state('READY'), IS_SET_UP, ends(0), WAITS='3')
  assert result.returncode == 0
  assert sleeps(tmp_path) == [30, 60, 30, 60, 120]


def test_babysit_gives_up_where_it_gets_no_vm(tmp_path):
  no_vm = [GONE, ('tpu-vm create', 1, '')]
  result = babysit(tmp_path, *4 * no_vm, WAITS='4')
  assert result.returncode == 1
  assert 'gives up after 0 failed runs and 4 attempts' in result.stderr


def test_babysit_leaves_a_vm_alone_that_is_on_its_way(tmp_path):
  result = babysit(tmp_path, state('CREATING'), state('REPAIRING'),
                   state('READY'), IS_SET_UP, ends(0))
  assert result.returncode == 0


def test_babysit_sets_up_again_what_was_left_half_done(tmp_path):
  scp_fails = ('tpu-vm scp', 1, '')
  result = babysit(tmp_path, state('READY'), IS_BARE, scp_fails,
                   state('READY'), IS_BARE, *SET_UP, ends(0))
  assert result.returncode == 0


def test_babysit_gives_up_a_run_that_fails_by_itself(tmp_path):
  failure = [state('READY'), IS_SET_UP, ends(1)]
  result = babysit(tmp_path, *3 * failure)
  assert result.returncode == 1
  assert 'gives up after 3 failed runs' in result.stderr


@pytest.mark.parametrize('between', [
    [state('READY'), IS_SET_UP, ends(75)],
    [state('PREEMPTED'), DELETED, CREATED, IS_SET_UP, ends(1)]])
def test_babysit_counts_anew_after_progress_or_preemption(between, tmp_path):
  failure = [state('READY'), IS_SET_UP, ends(1)]
  result = babysit(tmp_path, *2 * failure, *between, *failure,
                   state('READY'), IS_SET_UP, ends(0))
  assert result.returncode == 0


# tpu_vm.sh and tpu_worker.sh: the lines themselves, with this machine as worker


@pytest.fixture
def cloud(tmp_path):
  """A function that runs tpu_vm.sh; gcloud works on one directory as worker.

  Python there prints its platforms and arguments, waits as long as there is a
  file named hold, and exits with $STATUS.
  """
  home = tmp_path / 'home'
  home.mkdir()
  programs = program(tmp_path / 'bin', 'gcloud', '''
case $4 in
  scp) cp "$5" "$HOME/${6#*:}" ;;
  ssh) cd && exec bash -c "${7#--command=}" ;;
esac
''')
  program(programs, 'python3', r'''
if [[ "$2 $3" != 'uv venv' ]]; then echo "python3 $*"; exit; fi
mkdir -p venv/bin
cat > venv/bin/python <<'END'
#!/bin/bash
printf '<%s>\n' "$JAX_PLATFORMS" "$@"
if [[ $* != *--mode=eval* && $(cut -d' ' -f6 /proc/$$/stat) != $PPID ]]; then
  echo 'the run would end with the connection'
fi
if [[ $STATUS == killed ]]; then kill -9 $PPID $$; fi
while [[ -e $HOME/hold ]]; do sleep 0.05; done
exit $STATUS
END
chmod +x venv/bin/python
''')

  def call(*argv, status=0, **env):
    return run('tpu_vm.sh', *argv, path=programs, HOME=str(home),
               TMPDIR=str(tmp_path), STATUS=str(status), **ACCOUNT | env)
  return call


@needs_proc
def test_a_worker_is_set_up_trains_and_evaluates(cloud, tmp_path):
  result = cloud('setup')
  assert result.returncode == 0, result.stderr
  assert result.stdout.splitlines() == [
      'python3 -m pip install --quiet --user uv',
      'python3 -m uv pip install --python venv .[tpu]']

  argv = ['--config=my configs/x.py', "--config.x=it's $HOME; exit"]
  hold = tmp_path / 'home/hold'
  hold.touch()
  result = cloud('run', '--', *argv, status=75)
  assert (result.returncode, result.stdout) == (0, '')
  result = cloud('run')
  assert result.stderr == 'a run is going on already\n'
  result = cloud('setup')
  assert result.returncode == 2
  assert result.stderr == 'error: a run is going on\n'

  threading.Timer(1.5, hold.unlink).start()
  result = cloud('logs')  # waits for the end
  assert result.returncode == 75  # that of the run
  assert result.stdout.splitlines() == [
      f'<{word}>' for word in
      ('tpu,cpu', '-m', 'flax_imdb.main', '--workdir=gs://b/run', *argv)]

  result = cloud('eval', status=2, WORKDIR='')
  assert result.returncode == 2
  assert result.stdout.splitlines() == [
      f'<{word}>' for word in (
          'tpu,cpu', '-m', 'flax_imdb.main', '--mode=eval',
          '--workdir=runs/flax-imdb')]

  cloud('run', status='killed')  # with its shell: leaves no exit status
  assert cloud('logs').returncode == 1


@needs_proc
def test_babysit_starts_a_run_once_and_follows_it(cloud):
  # describe prints nothing here: the VM is created.
  result = cloud('babysit', DELAY='0')
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  assert '<--workdir=gs://b/run>' in lines and 'python3 -m pip' in lines[0]
  again = cloud('babysit', DELAY='0')  # finds it set up
  assert again.stdout.splitlines() == lines[2:]


# gpu.sh and slurm.sbatch


def test_gpu_sh_dry_run_prints_what_it_runs(tmp_path):
  python = program(tmp_path, 'python', 'env; printf "<%s>\\n" "$@"')
  settings = ['XLA_PYTHON_CLIENT_PREALLOCATE=false', 'JAX_PLATFORMS=cuda']
  argv = ['--workdir=a b', '--config.seed=1']
  dry = run('gpu.sh', '--dry-run', *argv, path=tmp_path)
  assert shlex.split(dry.stdout) == [
      *settings, 'python', '-m', 'flax_imdb.main', *argv]
  real = run('gpu.sh', *argv, path=python)
  lines = real.stdout.splitlines()
  assert set(settings) < set(lines)
  assert [line[1:-1] for line in lines if line[0] == '<'] == [
      '-m', 'flax_imdb.main', *argv]


def test_gpu_sh_yields_to_settings():
  own = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'true', 'JAX_PLATFORMS': 'cpu'}
  dry = run('gpu.sh', '--dry-run', **own)
  assert shlex.split(dry.stdout)[:2] == [f'{k}={v}' for k, v in own.items()]


def slurm(tmp_path, status, **env):
  """Plays a job whose processes end with a status; returns what it requeues."""
  program(tmp_path, 'srun', f'printf "<%s>\\n" "$@"; exit {status}')
  program(tmp_path, 'scontrol', f'echo "$*" >> {tmp_path}/scontrol.log')
  result = subprocess.run(
      [BASH, ROOT / 'launch/slurm.sbatch', '--workdir=a b'], check=False,
      env={'PATH': f'{tmp_path}:/usr/bin:/bin', 'SLURM_JOB_ID': '17', **env},
      capture_output=True, text=True)
  assert result.returncode == status
  assert result.stdout.splitlines() == [
      '<--kill-on-bad-exit=0>', '<launch/gpu.sh>', '<--workdir=a b>']
  log = tmp_path / 'scontrol.log'
  return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize('status', [*errors.STATUSES, 143])
def test_slurm_goes_back_into_the_queue_to_start_again(status, tmp_path):
  wanted = ['requeue 17'] if status in errors.AGAIN else []
  assert slurm(tmp_path, status) == wanted


@pytest.mark.parametrize(('status', 'count', 'requeued'), [
    (69, '19', ['requeue 17']), (69, '20', []), (75, '20', ['requeue 17'])])
def test_slurm_does_not_wait_for_ever(status, count, requeued, tmp_path):
  assert slurm(tmp_path, status, SLURM_RESTART_COUNT=count) == requeued


def test_slurm_has_a_task_a_gpu_and_a_signal_that_training_knows():
  options = dict(re.findall(r'^#SBATCH --([\w-]+)=?(\S*)$', (
      ROOT / 'launch/slurm.sbatch').read_text(), flags=re.MULTILINE))
  assert options['ntasks-per-node'] == options['gpus-per-node']
  assert 'gpus-per-task' not in options
  assert options['signal'].startswith('TERM@')  # B: would spare the processes
  assert {'requeue', 'open-mode'} <= options.keys()


# k8s.yaml


@pytest.fixture(scope='module')
def jobset():
  return yaml.safe_load((ROOT / 'launch/k8s.yaml').read_text())


def test_kubernetes_gets_a_pod_a_host(jobset):
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  pod = job['template']['spec']
  given = jobset['metadata']['annotations']
  x, y = map(int, given['topology'].split('x'))
  assert job['parallelism'] * int(given['chips-per-host']) == x * y
  assert job['completions'] == job['parallelism']
  assert pod['nodeSelector'] == {
      'cloud.google.com/gke-tpu-accelerator': given['accelerator'],
      'cloud.google.com/gke-tpu-topology': given['topology']}
  resources = pod['containers'][0]['resources']
  assert resources['limits'] == resources['requests'] == {
      'google.com/tpu': given['chips-per-host']}
  assert all(isinstance(value, str) for value in given.values())
  assert given['workdir'].startswith('gs://')


def test_kubernetes_ends_at_exit_status_2_and_restarts_after_others(jobset):
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  assert job['podFailurePolicy']['rules'] == [
      {'action': 'FailJob', 'onExitCodes': {'operator': 'In', 'values': [2]}}]
  assert job['template']['spec']['restartPolicy'] == 'Never'
  assert job['backoffLimit'] == 0
  policy = jobset['spec']['failurePolicy']
  assert policy['maxRestarts'] > 0
  assert [(rule['action'], rule['onJobFailureReasons'])
          for rule in policy['rules']] == [('FailJobSet', ['PodFailurePolicy'])]


def test_kubernetes_installs_and_becomes_the_program(jobset, tmp_path):
  pod = jobset['spec']['replicatedJobs'][0]['template']['spec']['template']
  container = pod['spec']['containers'][0]
  env = {item['name']: item['value'] for item in container['env']}
  program(tmp_path, 'pip', 'printf "<%s>" "$@"; echo')
  program(tmp_path, 'python', 'printf "<%s>" $$ "$@"; echo; exit 75')
  process = subprocess.Popen(
      container['command'], env=env | {'PATH': f'{tmp_path}:/usr/bin:/bin'},
      stdout=subprocess.PIPE, text=True)
  output, _ = process.communicate()
  source, workdir = (jobset['metadata']['annotations'][key]
                     for key in ('source', 'workdir'))
  assert output.splitlines() == [
      f'<install><--quiet><{source}>',  # and the first process, which alone
      f'<{process.pid}><-m><flax_imdb.main><--workdir={workdir}>']  # is told
  assert process.returncode == 75
  assert source.startswith('flax_imdb[tpu] @ https://')


# What they do after each exit status is what docs/troubleshooting.md says


def test_docs_and_help_have_the_table_of_the_exit_statuses(capsys):
  rows = re.findall(r'^\| (\d+) \| (.*?) \| (.*?) \| (.*?) \|$',
                    (ROOT / 'docs' / 'troubleshooting.md').read_text(),
                    re.MULTILINE)
  assert {int(n): meaning for n, meaning, _, _ in rows} == errors.STATUSES
  for n, _, others, of_slurm in rows:
    again = int(n) in errors.AGAIN
    assert others.startswith('again') == of_slurm.startswith('again') == again
    assert (others == 'end') == (int(n) in (0, errors.UserError.status))
  for kind in (errors.TransientError, errors.Preempted):
    assert kind.status in errors.AGAIN
    assert errors.STATUSES[kind.status].endswith(': start it again')
  with pytest.raises(SystemExit):
    cli.parse(['--help'])
  output = ' '.join(capsys.readouterr().out.split())
  for n, meaning in errors.STATUSES.items():
    assert f'{n} {meaning}' in output


@pytest.mark.parametrize('status', errors.STATUSES)
def test_babysit_and_kubernetes_end_and_start_again_alike(
    status, jobset, tmp_path):
  ready = [state('READY'), IS_SET_UP]
  after = () if status in (0, errors.UserError.status) else (*ready, ends(0))
  result = babysit(tmp_path, *ready, ends(status), *after, RETRIES='2')
  assert result.returncode == (0 if after else status)
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  (rule,) = job['podFailurePolicy']['rules']
  ends_job = status and status in rule['onExitCodes']['values']
  assert bool(status and not after) == bool(ends_job)


def test_main_takes_every_flag_that_launch_gives_or_shows():
  flags = set()
  for path in (ROOT / 'launch').iterdir():
    if path.suffix in ('.sh', '.sbatch', '.yaml'):
      text = path.read_text()
      flags |= set(re.findall(
          r'--(?:mode|workdir|config[.\w]*)(?:=[\w./]+)?(?=[\s"=\]])', text))
  assert {'--workdir', '--mode=eval',
          '--config.global_batch_size=1024'} <= flags
  for flag in flags:
    cli.parse([flag if '=' in flag else f'{flag}=x'])
