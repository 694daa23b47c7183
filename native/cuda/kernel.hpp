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

// The most that a launch may ask for without saying so before.
constexpr std::size_t usual_shared_bytes = 48 << 10;

// Nothing where there are no thread blocks. Throws LaunchError where CUDA refuses.
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), std::size_t blocks, unsigned threads,
            std::size_t shared_bytes, Stream stream, const Arguments&... arguments) {
    if (blocks == 0) {
        return;
    }
    if (shared_bytes > usual_shared_bytes) {
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    }
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
    check_launch(op);
}

}  // namespace zcore::cuda

#endif
