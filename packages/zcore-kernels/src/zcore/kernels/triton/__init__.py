"""Triton kernels of the ops for CUDA devices, one op a file; a file imports triton, and `loading` imports the file."""
