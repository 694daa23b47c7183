#include <algorithm>

#include "cuda/step_kernel.cuh"
#include "zcore/cuda/steps.hpp"

namespace zcore::cuda {

template <int num_states>
static void launch(std::span<const SgdPiece> pieces, const Sgd& hyper, const float* grad_factor, Stream stream) {
    const PlainStep<SgdElement, num_states> step{SgdElement(hyper), {hyper.grad_factor, grad_factor}};
    launch_steps("sgd_step", pieces, step, stream);
}

void sgd_step(std::span<const SgdPiece> pieces, const Sgd& hyper, const float* grad_factor, Stream stream) {
    // All have momentum or none has; a piece of nothing may have no address.
    const auto has = [](const SgdPiece& piece) { return static_cast<bool>(piece.momentum_buffer); };
    const auto step = std::any_of(pieces.begin(), pieces.end(), has) ? launch<1> : launch<0>;
    step(pieces, hyper, grad_factor, stream);
}

}  // namespace zcore::cuda
