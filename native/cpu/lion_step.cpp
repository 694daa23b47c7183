#include "zcore/lion_step.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/blocks.hpp"
#include "elements/lion.hpp"

namespace zcore::ZCORE_ISA {

static void step_block(float* ZCORE_RESTRICT param, const float* ZCORE_RESTRICT grad, float* ZCORE_RESTRICT exp_avg,
                       std::size_t count, const Lion& hyper) {
    const LionElement by(hyper);
    for (std::size_t at = 0; at < count; ++at) {
        step_element(by, param[at], grad[at], exp_avg[at]);
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
