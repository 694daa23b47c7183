#include "zcore/lion_step.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/blocks.hpp"

namespace zcore::ZCORE_ISA {

static inline float sign(float value) {
    const float one = value > 0.0f ? 1.0f : value < 0.0f ? -1.0f : 0.0f;
    return value == value ? one : value;
}

static void step_block(float* ZCORE_RESTRICT param, const float* ZCORE_RESTRICT grad, float* ZCORE_RESTRICT exp_avg,
                       std::size_t count, const Lion& hyper) {
    const float decay = rounded(1.0 - hyper.lr * hyper.weight_decay), lr = rounded(hyper.lr);
    const float factor = rounded(hyper.grad_factor);
    const float rest1 = rounded(1.0 - hyper.beta1), rest2 = rounded(1.0 - hyper.beta2);
    for (std::size_t at = 0; at < count; ++at) {
        const float g = grad[at] * factor, m = exp_avg[at];
        const float kept = param[at] * decay;
        param[at] = kept - lr * sign(multiply_add(rest1, g - m, m));
        exp_avg[at] = multiply_add(rest2, g - m, m);
    }
}

void lion_part(const LionPiece& piece, std::size_t begin, std::size_t end, const Lion& hyper) {
    alignas(64) float params[block_numel], grads[block_numel], averages[block_numel];
    for (std::size_t at = begin; at < end; at += block_numel) {
        const std::size_t count = block_at(at, end);
        float* const param = load_block(piece.param, at, count, params);
        const float* const grad = load_block(piece.grad, at, count, grads);
        float* const exp_avg = load_block(piece.exp_avg, at, count, averages);
        step_block(param, grad, exp_avg, count, hyper);
        store_block(piece.exp_avg, at, count, exp_avg);
        store_block(piece.param, at, count, param);
        store_block(piece.copy, at, count, param);
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/each_set.hpp"
#include "cpu/pieces.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void lion_part(const LionPiece&, std::size_t, std::size_t, const Lion&))

void lion_step(std::span<const LionPiece> pieces, const Lion& hyper, int threads) {
    const auto step = ZCORE_CHOOSE(lion_part);
    for_each_part(pieces, threads, [&](std::size_t index, std::size_t begin, std::size_t end) {
        step(pieces[index], begin, end, hyper);
    });
}

}  // namespace zcore

#endif
