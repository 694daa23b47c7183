// One step of Lion over flat pieces, in one pass.    [arXiv 2302.06675, alg. 2]
//
//     g  <- factor g
//     p  <- p - lr wd p
//     p  <- p - lr sign(beta1 m + (1 - beta1) g)       sign(0) = 0; NaN stays
//     m  <- beta2 m + (1 - beta2) g
//
// In fp32 it moves 20 bytes an element (reads p g m, writes p m).
#pragma once

#include <span>

#include "zcore/flat.hpp"

namespace zcore {

struct Lion {
    double lr;
    double beta1;
    double beta2;
    double weight_decay;
    double grad_factor = 1.0;
};

struct LionPiece {
    Flat param;
    Flat grad;
    Flat exp_avg;
    Flat copy;
    std::size_t numel;
};

void lion_step(std::span<const LionPiece> pieces, const Lion& hyper, int threads);

}  // namespace zcore
