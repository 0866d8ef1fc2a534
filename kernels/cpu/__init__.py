"""Loops compiled by numba: what the operators of `kernels` run on a CPU, in place of their plain-torch twins."""
