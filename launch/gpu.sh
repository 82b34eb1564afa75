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

if [[ ${1:-} == --dry-run ]]; then
  shift
  echo "XLA_PYTHON_CLIENT_PREALLOCATE=$XLA_PYTHON_CLIENT_PREALLOCATE" \
    "JAX_PLATFORMS=$JAX_PLATFORMS" \
    "python -m flax_imdb.main${1:+$(printf ' %q' "$@")}"
else
  exec python -m flax_imdb.main "$@"
fi
