#include "cuda/step_kernel.cuh"
#include "zcore/cuda/steps.hpp"

namespace zcore::cuda {

void adagrad_step(std::span<const AdagradPiece> pieces, const Adagrad& hyper, const float* grad_factor, Stream stream) {
    const PlainStep<AdagradElement, 1> step{AdagradElement(hyper), {hyper.grad_factor, grad_factor}};
    launch_steps("adagrad_step", pieces, step, stream);
}

}  // namespace zcore::cuda
