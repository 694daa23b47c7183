#include "cuda/launch.hpp"

#include "zcore/cuda/stream.hpp"

namespace zcore::cuda {

void check_launch(const char* op) {
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
        throw LaunchError(op, cudaGetErrorString(error));
    }
}

static __global__ void empty_kernel() {}

const char* why_unusable() {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, empty_kernel);
    cudaGetLastError();  // not for a later launch to find
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* architectures() { return ZCORE_CUDA_ARCHITECTURES; }

}  // namespace zcore::cuda
