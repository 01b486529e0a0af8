"""Triton kernels of focalnet; installed as ``focalnet.kernels``. Imports torch and triton only."""
