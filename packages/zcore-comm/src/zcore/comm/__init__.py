"""Collectives and parallel layers that keep links busy: bucketed, overlapped, compressed, hierarchical.

Declared place: floor 2, beside zcore.kernels and zcore.offload; imports zcore.core only. Nothing is offered here yet.
"""
