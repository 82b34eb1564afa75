#!/usr/bin/env bash
# Trains on a Cloud TPU: on one TPU VM, or on all hosts of a larger slice.
#
#   launch/tpu_vm.sh [--dry-run] [--spot] COMMAND [-- ARGS of flax_imdb.main]
#
#   create   makes the TPU VM; from now on it costs money
#   setup    copies this checkout to every worker, as a host is called there,
#            and installs it
#   run      starts training on every worker; it goes on without this machine
#   logs     shows what the workers print until the run is over
#   eval     scores what was trained
#   delete   ends the VM and its costs
#   babysit  create, setup, run and logs, and again whenever the VM was taken
#            away or something failed that may go away, from the last checkpoint,
#            until the run is finished; a VM that is set up it takes as it is:
#            after changes, setup by hand
#
# --dry-run prints the lines and does nothing, without gcloud or a project; those
#           of babysit are for a VM that was just taken away.
# --spot    asks for a VM that costs less and may be taken away at any time.
#
# babysit and several workers keep the run in a bucket, WORKDIR=gs://BUCKET/DIR,
# to which the VM's service account needs the roles storage.objectUser and
# storage.legacyBucketReader.
#
# Before the first time: install gcloud, `gcloud auth login`, and for several
# workers `ssh-add ~/.ssh/google_compute_engine`. Ctrl-C ends neither run nor
# VM: logs and babysit come back to it. The first failing worker's exit status
# is that of run, logs and eval, as docs/usage.md explains them.
set -euo pipefail

# Settings, from the environment.
NAME="${NAME:-flax-imdb}"                      # of the VM
PROJECT="${PROJECT:-}"                         # must be set: your project's ID
ZONE="${ZONE:-}"                               # must be set: has such TPUs
ACCELERATOR="${ACCELERATOR:-v5litepod-8}"      # type and size
VERSION="${VERSION:-v2-alpha-tpuv5-lite}"      # of the VM's software
WORKDIR="${WORKDIR:-}"  # gs://BUCKET/DIR; unset: on the VM, and lost with it
RETRIES="${RETRIES:-3}"    # babysit: failures in a row of a run, with its VM up
OUTSIDE="${OUTSIDE:-20}"   # babysit: those that may go away (exit status 69)
WAITS="${WAITS:-100}"      # babysit: attempts in a row to have a VM
DELAY="${DELAY:-30}"       # babysit: seconds between them, doubled up to 600

dry_run='' spot=''
worker='bash flax_imdb/launch/tpu_worker.sh'

say() { echo "tpu_vm: $*" >&2; }
die() { echo "error: $*" >&2; exit 2; }

# Prints a command line as one would type it.
show() {
  local word line=''
  for word; do
    if [[ $word == *\'* ]]; then
      word=$(printf %q "$word")
    elif [[ $word =~ [^A-Za-z0-9_./:=-] ]]; then
      word="'$word'"
    fi
    line+="$word "
  done
  echo "${line% }" >&3
}
exec 3>&1  # so that it also shows from within $(...)

do_line() { if [[ $dry_run ]]; then show "$@"; else "$@" 3>&-; fi; }
vm() {
  do_line gcloud compute tpus tpu-vm "$@" --project="$PROJECT" --zone="$ZONE"
}
on_workers() { vm ssh "$NAME" --worker=all --command="$1"; }

create() {
  vm create "$NAME" --accelerator-type="$ACCELERATOR" --version="$VERSION" \
    ${spot:+"--spot"}
}

setup() {
  local archive="${TMPDIR:-/tmp}/$NAME.tar.gz"
  do_line tar -czf "$archive" -C "$(dirname "$0")/.." --exclude=__pycache__ \
    flax_imdb configs launch pyproject.toml README.md LICENSE &&
  vm scp "$archive" "$NAME:flax_imdb.tar.gz" --worker=all &&
  # A run holds the lock, and must not lose its files.
  on_workers "mkdir -p flax_imdb && { flock -n flax_imdb/run.lock true || \
{ echo error: a run is going on >&2; exit 2; }; } && \
tar -xzf flax_imdb.tar.gz -C flax_imdb && $worker setup"
}

# Succeeds when the VM is there and set up; does one thing about it if not.
have_vm() {
  local state
  state=$(vm describe "$NAME" '--format=value(state)') || state=''
  case ${dry_run:+PREEMPTED}$state in
    READY) ;;
    PREEMPTED | TERMINATED | STOPPED)
      failures=0 outside=0  # it was not the run's fault
      vm delete "$NAME" --quiet && create || return ;;
    '') create || return ;;
    *) say "$NAME is $state"; return 1 ;;
  esac
  if ! on_workers "$worker is_set_up" || [[ $dry_run ]]; then setup; fi
}

babysit() {
  trap 'exit 130' INT  # gcloud exits with 1 then, which would only be a failure
  local failures=0 outside=0 waits=0 pause=$DELAY status
  while (( failures < RETRIES && outside < OUTSIDE && waits < WAITS )); do
    if have_vm; then
      waits=0 status=0
      on_workers "$worker start $1 && $worker follow" || status=$?
      [[ ! $dry_run ]] || return 0
      case $status in
        0) say "finished; to end the costs: $0 delete"; return ;;
        2) exit 2 ;;  # a mistake, as its line says
        69) outside=$((outside + 1)) ;;  # looks less and less often
        75) failures=0 outside=0 pause=$DELAY ;;  # stopped and saved
        *) failures=$((failures + 1)) outside=0 pause=$DELAY ;;
      esac
      say "the run ended with exit status $status"
    else
      waits=$((waits + 1))
    fi
    say "looks at the VM again in $pause s"
    sleep "$pause"
    pause=$((pause < 300 ? 2 * pause : 600))
  done
  say "gives up after $((failures + outside)) failed runs and $waits attempts" \
    "to have a VM"
  exit 1
}

while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=yes ;;
    --spot) spot=yes ;;
    *) die "unknown flag $1; see the top of $0" ;;
  esac
  shift
done
command="${1:-}"
case $command in
  create | setup | run | logs | eval | delete | babysit) shift ;;
  *) die "give one of create, setup, run, logs, eval, delete, babysit" ;;
esac
[[ $# -eq 0 || $1 == -- ]] || die "unexpected $1: ARGS stand after --"
[[ $# -eq 0 ]] || shift

if [[ $dry_run ]]; then
  PROJECT="${PROJECT:-PROJECT}" ZONE="${ZONE:-ZONE}"
  WORKDIR="${WORKDIR:-gs://BUCKET/$NAME}"
else
  [[ $PROJECT ]] || die 'set PROJECT to the ID of your Google Cloud project'
  [[ $ZONE ]] || die 'set ZONE to one that has such TPUs, such as us-west4-a'
  command -v gcloud > /dev/null ||
    die 'gcloud is not installed: see https://cloud.google.com/sdk/docs/install'
fi
case $command in run | eval | babysit)
  [[ $ACCELERATOR =~ -([0-9]+)$ ]] ||
    die "ACCELERATOR=$ACCELERATOR: write it as type and size, as v5litepod-8"
  # One host has up to 8 chips or, as older types count, 8 cores.
  if [[ $WORKDIR != gs://?* ]]; then
    [[ $command != babysit ]] ||
      die 'babysit resumes from the workdir: set WORKDIR to gs://BUCKET/DIR'
    (( BASH_REMATCH[1] <= 8 )) || die "$ACCELERATOR has several workers, which" \
      'share the workdir: set WORKDIR to gs://BUCKET/DIR'
  fi
  for arg; do
    [[ $arg != --workdir* ]] || die 'set WORKDIR instead of --workdir'
  done
  args=$(printf '%q ' --workdir="${WORKDIR:-runs/$NAME}" "$@")
  args=${args% } ;;
esac

case $command in
  create) create ;;
  setup) setup ;;
  run) on_workers "$worker start $args" ;;
  logs) on_workers "$worker follow" ;;
  eval) on_workers "$worker eval $args" ;;
  delete) vm delete "$NAME" ;;
  babysit) babysit "$args" ;;
esac
