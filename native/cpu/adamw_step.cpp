#include "zcore/adamw_step.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/blocks.hpp"
#include "elements/adamw.hpp"

namespace zcore::ZCORE_ISA {

static void step_block(float* ZCORE_RESTRICT param, const float* ZCORE_RESTRICT grad, float* ZCORE_RESTRICT exp_avg,
                       float* ZCORE_RESTRICT exp_avg_sq, std::size_t count, const AdamW& hyper) {
    const AdamWElement by(hyper);
    for (std::size_t at = 0; at < count; ++at) {
        step_element(by, param[at], grad[at], exp_avg[at], exp_avg_sq[at]);
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
