#!/usr/bin/env bash
# Trains on all GPUs of this host:  launch/gpu.sh [ARGS of flax_imdb.main]
#   launch/gpu.sh --config.global_batch_size=1024 --workdir=runs/gpu
set -euo pipefail

# The model and its activations take well under 1 GB; without this, jax takes
# three quarters of each GPU's memory away from its neighbours.
export XLA_PYTHON_CLIENT_PREALLOCATE="${XLA_PYTHON_CLIENT_PREALLOCATE:-false}"
# Say so rather than train on the CPU when the driver or jax[cuda12] is missing.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}"

exec python -m flax_imdb.main "$@"
