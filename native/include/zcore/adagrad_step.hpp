// One step of Adagrad over flat pieces, in one pass.    [Duchi et al. 2011, as torch.optim.Adagrad has it]
//
//     g  <- factor g + wd p
//     s  <- s + g g
//     p  <- p - lr g / (sqrt(s) + eps)                 lr decayed by the caller: lr / (1 + (t - 1) lr_decay)
//
// In fp32 it moves 20 bytes an element (reads p g s, writes p s).
#pragma once

#include <span>

#include "zcore/flat.hpp"

namespace zcore {

struct Adagrad {
    double lr;
    double eps;
    double weight_decay;
    double grad_factor = 1.0;
};

struct AdagradPiece {
    Flat param;
    Flat grad;
    Flat sum;
    Flat copy;
    std::size_t numel;
};

void adagrad_step(std::span<const AdagradPiece> pieces, const Adagrad& hyper, int threads);

}  // namespace zcore
