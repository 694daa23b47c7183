#include "zcore/cuda/squared_norm.hpp"

#include "cuda/step_kernel.cuh"

namespace zcore::cuda {

std::size_t num_partial_sums(std::size_t numel) { return num_chunks(numel); }

void squared_norm(const NormPiece& piece, double* scratch, float* total, Stream stream) {
    using Step = SquaredNormStep;
    const auto give_slots = [&](Arguments<Step>& arguments, std::size_t) { arguments.sums = scratch; };
    const auto add_slots = [&](const Arguments<Step>& arguments, std::size_t) {
        total_kernel<<<1, block_threads, 0, stream>>>(arguments, total);
        check_launch("squared_norm");
    };
    launch_steps("squared_norm", std::span(&piece, 1), Step{}, stream, give_slots, add_slots);
}

}  // namespace zcore::cuda
