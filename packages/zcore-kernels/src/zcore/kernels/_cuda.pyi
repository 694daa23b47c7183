"""The kernels of native/cuda, as bindings/ has them; in the wheel only where it was built with a CUDA compiler.

Addresses are those of tensors on the current device; whoever calls has checked them. A kernel is queued on `stream`,
the number of a CUDA stream, and has not run when the call returns. A launch that is refused raises RuntimeError, which
names the op and what CUDA says.
"""

def architectures() -> str:
    """What the kernels were compiled for: "sm_80 sm_90 sm_100 compute_100", the last as PTX, for later devices."""
