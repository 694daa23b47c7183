"""Fast numeric ops in C++, CUDA and Triton, found by name through the op registry of zcore.core.

    ops/      one op a file: its schema for torch, its reference in torch, and what serves it
    optim     optimizers for any training loop
    aio       reads and writes between tensors and files, many at a time

Each is imported by itself; this package imports nothing.
"""
