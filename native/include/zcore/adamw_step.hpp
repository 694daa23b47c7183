// One step of Adam or AdamW over flat pieces, in one pass.
//
//     g  <- factor g                                   scale of the loss, clipping: whatever the gradient is multiplied by
//     p  <- p - lr wd p                                AdamW    [arXiv 1711.05101, alg. 2]
//     g  <- g + wd p                                   Adam     [arXiv 1412.6980, alg. 1]
//     m  <- m + (1 - beta1) (g - m)
//     v  <- beta2 v + (1 - beta2) g g
//     p  <- p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
//
// In fp32 it moves 28 bytes an element (reads p g m v, writes p m v): bound by memory. It computes in fp32 whatever
// the types are, and rounds to the nearest where it writes less. It rounds in between where torch's fused step does.
#pragma once

#include <span>

#include "zcore/flat.hpp"

namespace zcore {

struct AdamW {
    double lr;
    double beta1;
    double beta2;
    double eps;
    double weight_decay;
    double bias_correction1;       // 1 - beta1^t
    double bias_correction2_sqrt;  // sqrt(1 - beta2^t)
    double grad_factor = 1.0;
    bool is_decoupled = true;  // AdamW; else Adam
};

// `copy` is the parameter in the type that modules compute with; none where they take `param` itself.
struct AdamWPiece {
    Flat param;
    Flat grad;
    Flat exp_avg;
    Flat exp_avg_sq;
    Flat copy;
    std::size_t numel;
};

void adamw_step(std::span<const AdamWPiece> pieces, const AdamW& hyper, int threads);

}  // namespace zcore
