"""Kernels: one folder per operation, with its contract, its reference and, where there is one, its Triton form."""
