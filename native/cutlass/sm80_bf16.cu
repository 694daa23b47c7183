#include "sm80.cuh"

namespace zcore::grouped {

void run_sm80_bf16(const Products& all, std::span<std::byte> workspace, cudaStream_t stream) {
    run_sm80<cutlass::bfloat16_t>(all, workspace, stream);
}

}  // namespace zcore::grouped
