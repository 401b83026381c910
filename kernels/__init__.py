"""Triton kernels and their launchers, one file an op; importing has no side effects. Installed as bertfast.kernels."""
