// How kernels of blocks are launched, by a function and not by CUDA's brackets: so that their files are C++, too, and
// the tests can run them on the CPU (tests/cuda_on_host.hpp).
#pragma once

#include <cstddef>

#include "cuda/launch.hpp"
#include "zcore/cuda/stream.hpp"

#if defined(__CUDACC__)

namespace zcore::cuda {

// Memory of a thread block, as much as its launch asks for.
template <typename Element>
__device__ __forceinline__ Element* shared_memory() {
    extern __shared__ uint4 memory[];
    return reinterpret_cast<Element*>(memory);
}

// The most that a thread block has without saying so before: of what its launch asks for, and of what the kernel
// declares itself, which no kernel here does beyond the second number.
constexpr std::size_t usual_shared_bytes = 48 << 10, most_declared_bytes = 16 << 10;

// Lets a kernel have all that the device has for a thread block. It is always all, so that a thread which launches a
// small one at the same time takes nothing away. What fails is found by `check_launch`.
inline void allow_all_shared_memory(const void* kernel) {
    int device = 0, all = 0;
    cudaFuncAttributes attributes{};
    if (cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
        cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) {
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             all - static_cast<int>(attributes.sharedSizeBytes));
    }
}

// Nothing where there are no thread blocks. Throws LaunchError where CUDA refuses.
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), std::size_t blocks, unsigned threads,
            std::size_t shared_bytes, Stream stream, const Arguments&... arguments) {
    if (blocks == 0) {
        return;
    }
    if (shared_bytes + most_declared_bytes > usual_shared_bytes) {
        allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
    }
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
    check_launch(op);
}

}  // namespace zcore::cuda

#endif
