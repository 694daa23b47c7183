"""Triton kernels of the ops for CUDA devices, one op a file; each imports triton, and is imported when it is needed."""
