"""CUDA kernels compiled ahead, in the extension `_cuda`; `loading` says whether there is one, and launches from it."""
