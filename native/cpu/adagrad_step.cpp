#include "zcore/adagrad_step.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/blocks.hpp"
#include "elements/adagrad.hpp"

namespace zcore::ZCORE_ISA {

static void step_block(float* ZCORE_RESTRICT param, const float* ZCORE_RESTRICT grad, float* ZCORE_RESTRICT sum,
                       std::size_t count, const Adagrad& hyper) {
    const AdagradElement by(hyper);
    for (std::size_t at = 0; at < count; ++at) {
        step_element(by, param[at], grad[at], sum[at]);
    }
}

void adagrad_part(const AdagradPiece& piece, std::size_t begin, std::size_t end, const Adagrad& hyper) {
    alignas(64) float params[block_numel], grads[block_numel], sums[block_numel];
    for (std::size_t at = begin; at < end; at += block_numel) {
        const std::size_t count = block_at(at, end);
        float* const param = load_block(piece.param, at, count, params);
        const float* const grad = load_block(piece.grad, at, count, grads);
        float* const sum = load_block(piece.sum, at, count, sums);
        step_block(param, grad, sum, count, hyper);
        store_block(piece.sum, at, count, sum);
        store_block(piece.param, at, count, param);
        store_block(piece.copy, at, count, param);
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/each_set.hpp"
#include "cpu/pieces.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void adagrad_part(const AdagradPiece&, std::size_t, std::size_t, const Adagrad&))

void adagrad_step(std::span<const AdagradPiece> pieces, const Adagrad& hyper, int threads) {
    const auto step = ZCORE_CHOOSE(adagrad_part);
    for_each_part(pieces, threads, [&](std::size_t index, std::size_t begin, std::size_t end) {
        step(pieces[index], begin, end, hyper);
    });
}

}  // namespace zcore

#endif
