#!/usr/bin/env bash
# Trains on all GPUs of this host:
#   launch/gpu.sh [--dry-run] [ARGS of flax_imdb.main]
#   launch/gpu.sh --config.global_batch_size=1024 --workdir=runs/gpu
# --dry-run prints the line instead. The settings below yield to your own.
set -euo pipefail

# The model and its activations take well under 1 GB; without this, jax takes
# three quarters of each GPU's memory away from its neighbours.
export XLA_PYTHON_CLIENT_PREALLOCATE="${XLA_PYTHON_CLIENT_PREALLOCATE:-false}"
# Say so rather than train on the CPU when the driver or jax[cuda12] is missing.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}"
# The embedding's gradient adds up rows in whatever order the threads arrive:
# without this, a resumed run would not reach the same bits.
deterministic=--xla_gpu_deterministic_ops
if [[ ${XLA_FLAGS:-} != *"$deterministic"* ]]; then
  export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$deterministic=true"
fi

if [[ ${1:-} == --dry-run ]]; then
  shift
  echo "XLA_PYTHON_CLIENT_PREALLOCATE=$XLA_PYTHON_CLIENT_PREALLOCATE" \
    "JAX_PLATFORMS=$JAX_PLATFORMS XLA_FLAGS='$XLA_FLAGS'" \
    "python -m flax_imdb.main${1:+$(printf ' %q' "$@")}"
else
  exec python -m flax_imdb.main "$@"
fi
