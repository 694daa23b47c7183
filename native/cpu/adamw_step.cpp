#include "zcore/adamw_step.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include <cmath>

#include "cpu/blocks.hpp"

namespace zcore::ZCORE_ISA {

static void step_block(float* ZCORE_RESTRICT param, const float* ZCORE_RESTRICT grad, float* ZCORE_RESTRICT exp_avg,
                       float* ZCORE_RESTRICT exp_avg_sq, std::size_t count, const AdamW& hyper) {
    const float decay = hyper.is_decoupled ? rounded(1.0 - hyper.lr * hyper.weight_decay) : 1.0f;
    const float penalty = rounded(hyper.weight_decay);
    const bool is_penalised = !hyper.is_decoupled && penalty != 0.0f;  // else an infinite parameter would become NaN
    const float factor = rounded(hyper.grad_factor), beta2 = rounded(hyper.beta2), eps = rounded(hyper.eps);
    const float rest1 = rounded(1.0 - hyper.beta1), rest2 = rounded(1.0 - hyper.beta2);
    const float step_size = rounded(hyper.lr / hyper.bias_correction1);
    const float bias = rounded(hyper.bias_correction2_sqrt);
    for (std::size_t at = 0; at < count; ++at) {
        const float p = param[at] * decay, scaled = grad[at] * factor;
        const float g = is_penalised ? multiply_add(penalty, p, scaled) : scaled;
        const float m = multiply_add(rest1, g - exp_avg[at], exp_avg[at]);
        const float v = multiply_add(rest2 * g, g, beta2 * exp_avg_sq[at]);
        exp_avg[at] = m;
        exp_avg_sq[at] = v;
        param[at] = p - step_size * m / (std::sqrt(v) / bias + eps);
    }
}

void adamw_part(const AdamWPiece& piece, std::size_t begin, std::size_t end, const AdamW& hyper) {
    alignas(64) float params[block_numel], grads[block_numel], first[block_numel], second[block_numel];
    for (std::size_t at = begin; at < end; at += block_numel) {
        const std::size_t count = block_at(at, end);
        float* const param = load_block(piece.param, at, count, params);
        const float* const grad = load_block(piece.grad, at, count, grads);
        float* const exp_avg = load_block(piece.exp_avg, at, count, first);
        float* const exp_avg_sq = load_block(piece.exp_avg_sq, at, count, second);
        step_block(param, grad, exp_avg, exp_avg_sq, count, hyper);
        store_block(piece.exp_avg, at, count, exp_avg);
        store_block(piece.exp_avg_sq, at, count, exp_avg_sq);
        store_block(piece.param, at, count, param);
        store_block(piece.copy, at, count, param);
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
