// LAMB over flat pieces, each a parameter or this rank's part of one, in two passes.    [arXiv 1904.00962, alg. 2]
//
//     g  <- factor g
//     m  <- m + (1 - beta1) (g - m)
//     v  <- beta2 v + (1 - beta2) g g
//     u   = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + wd p
//     p  <- p - lr ratio u                             ratio = |p| / |u|, of whole parameters: the caller's business
//
// The first pass moves m and v and sums squares; the second computes u again, which costs less than keeping it. In fp32
// they move 24 and 16 bytes an element.
#pragma once

#include <span>
#include <vector>

#include "zcore/flat.hpp"

namespace zcore {

struct Lamb {
    double lr;
    double beta1;
    double beta2;
    double eps;
    double weight_decay;
    double bias_correction1;       // 1 - beta1^t
    double bias_correction2_sqrt;  // sqrt(1 - beta2^t)
    double grad_factor = 1.0;
};

struct LambPiece {
    Flat param;
    Flat grad;
    Flat exp_avg;
    Flat exp_avg_sq;
    Flat copy;
    std::size_t numel;
};

struct LambSquares {
    double param = 0.0;
    double update = 0.0;
};

// Moves m and v; the sums of squares of p and of u, of each piece, in a fixed order.
std::vector<LambSquares> lamb_average(std::span<const LambPiece> pieces, const Lamb& hyper, int threads);

// p <- p - lr ratio u, with one ratio for each piece.
void lamb_apply(std::span<const LambPiece> pieces, std::span<const double> ratios, const Lamb& hyper, int threads);

}  // namespace zcore
