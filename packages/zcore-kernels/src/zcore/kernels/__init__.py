"""Fast numeric ops in C++, CUDA and Triton, found by name through the op registry of zcore.core.

Declared place: floor 2, beside zcore.comm and zcore.offload; imports zcore.core only. Nothing is offered here yet.
"""
