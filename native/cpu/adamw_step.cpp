#include "zcore/adamw_step.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include <cmath>

#include "cpu/blocks.hpp"

namespace zcore::ZCORE_ISA {

static void step_block(float* ZCORE_RESTRICT param, const float* ZCORE_RESTRICT grad, float* ZCORE_RESTRICT exp_avg,
                       float* ZCORE_RESTRICT exp_avg_sq, std::size_t count, const AdamW& hyper) {
    const float decay = hyper.is_decoupled ? 1.0f - hyper.lr * hyper.weight_decay : 1.0f;
    const float penalty = hyper.weight_decay;
    const bool is_penalised = !hyper.is_decoupled && penalty != 0.0f;  // else an infinite parameter would become NaN
    const float factor = hyper.grad_factor, beta2 = hyper.beta2, eps = hyper.eps;
    const float rest1 = 1.0f - hyper.beta1, rest2 = 1.0f - hyper.beta2;
    const float step_size = hyper.lr / hyper.bias_correction1, unbias = 1.0f / hyper.bias_correction2_sqrt;
    for (std::size_t at = 0; at < count; ++at) {
        const float p = param[at] * decay;
        const float g = is_penalised ? grad[at] * factor + penalty * p : grad[at] * factor;
        const float m = exp_avg[at] + rest1 * (g - exp_avg[at]);
        const float v = beta2 * exp_avg_sq[at] + rest2 * g * g;
        exp_avg[at] = m;
        exp_avg_sq[at] = v;
        param[at] = p - step_size * m / (std::sqrt(v) * unbias + eps);
    }
}

void adamw_part(const AdamWPiece& piece, std::size_t begin, std::size_t end, const AdamW& hyper) {
    alignas(64) float grads[block_numel], first[block_numel], second[block_numel];
    for (std::size_t at = begin; at < end; at += block_numel) {
        const std::size_t count = block_at(at, end);
        const float* const grad = load_block(piece.grad, at, count, grads);
        float* const exp_avg = load_block(piece.exp_avg, at, count, first);
        float* const exp_avg_sq = load_block(piece.exp_avg_sq, at, count, second);
        step_block(piece.param + at, grad, exp_avg, exp_avg_sq, count, hyper);
        store_block(piece.exp_avg, at, count, exp_avg);
        store_block(piece.exp_avg_sq, at, count, exp_avg_sq);
        store_block(piece.copy, at, count, piece.param + at);
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/each_set.hpp"
#include "cpu/pieces.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void adamw_part(const AdamWPiece&, std::size_t, std::size_t, const AdamW&))

void adamw_step(std::span<const AdamWPiece> pieces, const AdamW& hyper, int threads) {
    const auto step = ZCORE_CHOOSE(adamw_part);
    for_each_part(pieces, threads, [&](std::size_t index, std::size_t begin, std::size_t end) {
        step(pieces[index], begin, end, hyper);
    });
}

}  // namespace zcore

#endif
