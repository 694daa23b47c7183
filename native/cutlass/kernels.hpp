// What each file of kernels offers to the one that chooses among them, and how they report what failed.
#pragma once

#include <cuda_runtime_api.h>
#include <cutlass/cutlass.h>

#include <span>
#include <stdexcept>
#include <string>

#include "groups.hpp"

namespace zcore::grouped {

using Run = void(const Products& all, std::span<std::byte> workspace, cudaStream_t stream);

Run run_sm80_bf16, run_sm80_f16, run_sm90_bf16, run_sm90_f16;

struct Scales {
    const float* rows;     // [total]
    const float* columns;  // [num_groups, n]
};
void run_sm90_fp8(const Products& all, const Scales& scales, std::span<std::byte> workspace, cudaStream_t stream);

// Something refused to run; who knows the op tells its name.
struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void check(cudaError_t status) {
    if (status != cudaSuccess) {
        throw Failure(cudaGetErrorString(status));
    }
}

inline void check(cutlass::Status status) {
    if (status != cutlass::Status::kSuccess) {
        throw Failure(std::string("CUTLASS says ") + cutlassGetStatusString(status));
    }
}

}  // namespace zcore::grouped
