// One step of SGD with momentum over flat pieces, in one pass, as torch.optim.SGD has it.
//
//     g  <- factor g + wd p
//     b  <- g at the first step, else momentum b + (1 - dampening) g
//     p  <- p - lr b                                   Nesterov: p - lr (g + momentum b)
//
// In fp32 it moves 20 bytes an element (reads p g b, writes p b); without momentum 12, and there is no b.
#pragma once

#include <span>

#include "zcore/flat.hpp"

namespace zcore {

struct Sgd {
    double lr;
    double momentum;
    double dampening;
    double weight_decay;
    bool is_nesterov;
    bool is_first;
    double grad_factor = 1.0;
};

struct SgdPiece {
    Flat param;
    Flat grad;
    Flat momentum_buffer;
    Flat copy;
    std::size_t numel;
};

void sgd_step(std::span<const SgdPiece> pieces, const Sgd& hyper, int threads);

}  // namespace zcore
