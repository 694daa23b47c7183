"""CPU and NVMe tiers for parameters and optimizer states, behind the tensor store contract of zcore.core.

Declared place: floor 2, beside zcore.comm and zcore.kernels; imports zcore.core only. Nothing is offered here yet.
"""
