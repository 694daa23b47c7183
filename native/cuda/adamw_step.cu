#include "cuda/step_kernel.cuh"
#include "zcore/cuda/steps.hpp"

namespace zcore::cuda {

void adamw_step(std::span<const AdamWPiece> pieces, const AdamW& hyper, const float* grad_factor, Stream stream) {
    const PlainStep<AdamWElement, 2> step{AdamWElement(hyper), {hyper.grad_factor, grad_factor}};
    launch_steps("adamw_step", pieces, step, stream);
}

}  // namespace zcore::cuda
