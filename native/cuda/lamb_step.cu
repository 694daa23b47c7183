#include "cuda/step_kernel.cuh"
#include "zcore/cuda/steps.hpp"

namespace zcore::cuda {

void lamb_average(std::span<const LambPiece> pieces, const Lamb& hyper, const float* grad_factor, double* scratch,
                  double* squares, Stream stream) {
    using Step = LambAverageStep;
    const auto give_slots = [&](Arguments<Step>& arguments, std::size_t) { arguments.sums = scratch; };
    const auto add_slots = [&](const Arguments<Step>& arguments, std::size_t first) {
        const std::uint32_t count = arguments.pieces.count;
        total_kernel<<<count, block_threads, 0, stream>>>(arguments, squares + first * Step::num_sums);
        check_launch("lamb_average");
        scratch += static_cast<std::size_t>(arguments.pieces.first_chunk[count]) * Step::num_sums;
    };
    const Step step{LambElement(hyper), {hyper.grad_factor, grad_factor}};
    launch_steps("lamb_average", pieces, step, stream, give_slots, add_slots);
}

void lamb_apply(std::span<const LambPiece> pieces, const double* ratios, const Lamb& hyper, Stream stream) {
    using Step = LambApplyStep;
    const auto give_ratios = [&](Arguments<Step>& arguments, std::size_t first) {
        arguments.step.ratios = ratios + first;
    };
    const auto nothing = [](const Arguments<Step>&, std::size_t) {};
    const Step step{LambElement(hyper), hyper.lr, nullptr, 0.0f};
    launch_steps("lamb_apply", pieces, step, stream, give_ratios, nothing);
}

}  // namespace zcore::cuda
