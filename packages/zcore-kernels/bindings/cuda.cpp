// zcore.kernels._cuda: the kernels of native/cuda for Python. Addresses are of memory of torch's current device,
// `stream` is the number of a CUDA stream (torch.cuda.Stream.cuda_stream).
#include <nanobind/nanobind.h>

#include "cuda_blocks.hpp"
#include "cuda_steps.hpp"
#include "grouped_matmul.hpp"
#include "zcore/cuda/stream.hpp"

NB_MODULE(_cuda, module) {
    nanobind::set_leak_warnings(false);  // torch's registry keeps ops, and what they hold, beyond the interpreter's end
    module.def("architectures", &zcore::cuda::architectures);
    module.def("why_unusable", &zcore::cuda::why_unusable, nanobind::sig("def why_unusable() -> str | None"));
    bind_cuda_steps(module);
    bind_cuda_blocks(module);
#if defined(ZCORE_HAS_CUTLASS)
    bind_grouped_matmul(module);
#endif
}
