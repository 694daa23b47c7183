#include "cuda/launch.hpp"

#include "zcore/cuda/stream.hpp"

namespace zcore::cuda {

void check_launch(const char* op) {
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
        throw LaunchError(op, cudaGetErrorString(error));
    }
}

const char* architectures() { return ZCORE_CUDA_ARCHITECTURES; }

}  // namespace zcore::cuda
