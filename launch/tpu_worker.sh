#!/usr/bin/env bash
# What launch/tpu_vm.sh does on each worker of a TPU VM, in the checkout there:
#   launch/tpu_worker.sh setup | is_set_up | start ARGS | follow | eval ARGS
set -euo pipefail
cd "$(dirname "$0")/.."

# Say so rather than train on the CPU when the TPU is missing or taken.
export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"
export PYTHONUNBUFFERED=1
program=(venv/bin/python -m flax_imdb.main)

command="$1"
shift
case $command in
  setup)
    # The image's own Python is too old; uv brings one.
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --allow-existing --python 3.11 venv
    python3 -m uv pip install --python venv '.[tpu]'
    touch venv/is_set_up
    ;;
  is_set_up) test -e venv/is_set_up ;;
  start)
    exec 9> run.lock  # held by the run as long as it lives
    if ! flock -n 9; then
      echo 'a run is going on already' >&2
      exit
    fi
    rm -f run.status
    exec > run.log 2>&1 < /dev/null
    # In a session of its own, it outlives this connection.
    # shellcheck disable=SC2016
    setsid bash -c '"$@"; echo $? > run.status' - "${program[@]}" "$@" &
    ;;
  follow)
    flock run.lock true &  # waits until the run is over
    tail -n +1 -f --pid=$! run.log
    exit "$(cat run.status || echo 1)"  # without: killed together with its shell
    ;;
  eval) "${program[@]}" --mode=eval "$@" ;;
esac
