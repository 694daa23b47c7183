"""Where tests of Triton's kernels run: on a GPU where there is one, else in Triton's interpreter, on CPU tensors.

The interpreter has to be chosen before triton is imported, so test_triton.py runs their files in a process of its own;
`TRITON_INTERPRET=1 pytest` with a file's name does, too.
"""

import torch

from zcore.kernels.triton.loading import is_interpreted, why_unavailable

DEVICE = torch.device("cpu" if is_interpreted() or not torch.cuda.is_available() else "cuda")
WHY_SKIPPED = why_unavailable() or (
    None
    if is_interpreted() or DEVICE.type == "cuda"
    else "runs on a GPU, or with TRITON_INTERPRET=1, by test_triton.py"
)
