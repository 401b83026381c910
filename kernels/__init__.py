"""Triton kernels, one file an op: the kernels first, then the launchers that bertfast.ops registers for CUDA.

A launcher has its op's name and takes exactly its arguments. Importing a file registers nothing and needs no device.
"""
