#include "cuda/step_kernel.cuh"
#include "zcore/cuda/steps.hpp"

namespace zcore::cuda {

void lion_step(std::span<const LionPiece> pieces, const Lion& hyper, const float* grad_factor, Stream stream) {
    const PlainStep<LionElement, 1> step{LionElement(hyper), {hyper.grad_factor, grad_factor}};
    launch_steps("lion_step", pieces, step, stream);
}

}  // namespace zcore::cuda
