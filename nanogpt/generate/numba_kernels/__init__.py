"""A decoder for CPUs whose kernels Numba compiles for the processor at hand."""
