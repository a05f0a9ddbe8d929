"""Kernels of the binary path: `reference` says in plain numpy what each one means; the others say it fast.

reference    numpy, slow, exact
cpu          Numba: vector instructions, two threads
cuda         CUDA C++ through CuPy
cuda_shim    the same CUDA sources, compiled for the CPU: what proves them where there is no GPU
"""
