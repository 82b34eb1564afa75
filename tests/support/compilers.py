"""Compilers for chips that are not there: who needs one is skipped without."""

import importlib.util

import pytest

needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec('libtpu'),
    reason='libtpu is not installed (pip install .[aot])')
needs_cuda_plugin = pytest.mark.skipif(
    not importlib.util.find_spec('jax_cuda12_plugin'),
    reason='the CUDA plugin is not installed '
    '(pip install jax-cuda12-plugin jax-cuda12-pjrt)')
needs_ptxas = pytest.mark.skipif(
    not importlib.util.find_spec('nvidia.cuda_nvcc')
    if importlib.util.find_spec('nvidia') else True,
    reason='ptxas is not installed (pip install nvidia-cuda-nvcc-cu12)')
